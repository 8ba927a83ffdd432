"""The page that maps the paper's tables and figures to commands: complete, understood, and run at small scale."""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_tiny", ROOT / "scripts" / "reproduce_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_and_figure_is_there(script: ModuleType):
    titles = " / ".join(script.sections(script.PAGE.read_text()))
    for name in (
        "Table 1",
        "Table A3",
        "Table 2",
        "Table A2",
        "Table A4",
        "Figures 2 and 3",
        "Figure 6",
        "Figures A1 and A2",
    ):
        assert name in titles, name


def test_each_command_has_its_small_form(script: ModuleType):
    """The same commands in the same order, after what prepares the small data."""
    for title, (full, small) in script.sections(script.PAGE.read_text()).items():
        called = [
            [shlex.split(command)[3] for command in commands if " simnpo_pl " in command] for commands in (full, small)
        ]
        assert full, title
        assert called[1][-len(called[0]) :] == called[0], title


def test_commands_are_understood(script: ModuleType):
    from simnpo_pl.__main__ import RUNS
    from simnpo_pl.studies import parse

    for full, small in script.sections(script.PAGE.read_text()).values():
        for command in [*full, *small]:
            name, *arguments = shlex.split(command)[3:]
            if name not in RUNS:
                parse(name, arguments)


def test_what_a_command_leaves(script: ModuleType):
    def left(command: str) -> list[str]:
        return [str(path) for path in script.targets(shlex.split(command))]

    assert left("python -m simnpo_pl sweep a.yaml --folder runs/a -o b.md") == ["runs/a", "b.md"]
    assert left("python -m simnpo_pl relearn runs/a runs/b --lr 1e-3") == ["runs/a"]


def test_a_failing_command_stops_the_script(script: ModuleType, tmp_path: Path):
    with pytest.raises(SystemExit, match="ended with exit code 2"):
        script.run("python -m simnpo_pl sweep no.yaml", tmp_path / "log.txt")
    assert "cannot read no.yaml" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_small_commands_run():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "reproduce_tiny.py")], check=True, cwd=ROOT)
