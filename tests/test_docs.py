"""Documents: links inside the repository lead somewhere, commands and configs exist, tables name every objective."""

import re
import shlex
from pathlib import Path

import pytest

from simnpo_pl import objectives
from simnpo_pl.__main__ import RUNS
from simnpo_pl.studies import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_configs_exist(page: Path):
    for block in re.findall(r"^```\w*.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"python -m simnpo_pl (.*)", line)
            if match:
                words = shlex.split(match[1], comments=True)
                assert words[0] in {**RUNS, **COMMANDS}, line
                for file in (w for w in words if re.fullmatch(r"configs/\S+\.yaml", w)):
                    assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_objective_is_in_the_table(page: str):
    text = (ROOT / page).read_text()
    found = [
        cls for cls in vars(objectives).values() if isinstance(cls, type) and issubclass(cls, objectives.Objective)
    ]
    names = {cls.__name__ for cls in found if cls is not objectives.Objective}
    assert not {name for name in names if f"`{name}`" not in text}


def test_every_target_of_make_exists():
    targets = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {one or other for one, other in targets} <= set(known)
