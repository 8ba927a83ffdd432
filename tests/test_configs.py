"""Every shipped config parses against the signatures, alone or as the overlay it is."""

import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if f.parent.name not in ("sweep", "tune", "analysis"))
"""What `fit` takes; files of other commands are parsed by those commands' tests."""
OVERLAID = {"markov_paper.yaml": "configs/markov.yaml"}
"""What an overlay goes over, unless it is TOFU's config."""


def resolved(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that a command would run with."""
    from simnpo_pl.__main__ import main

    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: str(f.relative_to(ROOT)))
def test_parses(config: Path, capsys: pytest.CaptureFixture[str]):
    content = yaml.safe_load(config.read_text())
    whole = "class_path" in content.get("data", {})
    base = [] if whole else ["--config", OVERLAID.get(config.name, "configs/tofu.yaml")]
    got = resolved(["fit", *base, "--config", str(config)], capsys)
    assert included(content, got)


def included(part: Any, whole: Any) -> bool:
    """Whether every setting of a config arrives."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(included(v, whole[k]) for k, v in part.items() if k in whole or v)
    if isinstance(part, str) and isinstance(whole, dict):
        return whole["class_path"].endswith(part)
    if isinstance(part, str) and isinstance(whole, str):
        return whole.endswith(part)
    return part == whole


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: str(f.relative_to(ROOT)))
def test_header_has_its_command(config: Path):
    head = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "python -m simnpo_pl" in head or (head.startswith("# Overlay: ") and "hardware" in config.parts)


def test_another_objective_starts_from_its_own_defaults(capsys: pytest.CaptureFixture[str]):
    """SimNPO's beta and weight for forget05 do not become NPO's."""
    forget05 = ["fit", "--config", "configs/tofu.yaml", "--config", "configs/tofu_forget05.yaml"]
    simnpo = resolved([*forget05, "--model.objective.gamma", "1"], capsys)["model"]
    assert simnpo["objective"]["init_args"] == {"beta": 2.5, "gamma": 1.0}
    assert simnpo["forget_weight"] == 0.1375
    npo = resolved([*forget05, "--model.objective", "NPO"], capsys)["model"]
    assert npo["objective"]["init_args"] == {"beta": 0.1}
    assert npo["forget_weight"] is None
    npo = resolved([*forget05, "--model.objective=NPO", "--model.objective.beta=0.2"], capsys)["model"]
    assert npo["objective"]["init_args"] == {"beta": 0.2}


def test_flags_outlive_a_change_of_objective(capsys: pytest.CaptureFixture[str]):
    forget05 = ["fit", "--config", "configs/tofu.yaml", "--config", "configs/tofu_forget05.yaml"]
    npo = resolved([*forget05, "--model.forget_weight", "0.3", "--model.objective", "NPO"], capsys)["model"]
    assert npo["forget_weight"] == 0.3
    npo = resolved([*forget05, "--model.objective.class_path", "NPO"], capsys)["model"]
    assert npo["objective"]["init_args"] == {"beta": 0.1}


def test_overlay_that_names_another_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overlay = tmp_path / "npo.yaml"
    overlay.write_text("model:\n  objective: NPO\n")
    configs = ["--config", "configs/tofu.yaml", "--config", "configs/tofu_forget05.yaml", "--config", str(overlay)]
    assert resolved(["fit", *configs], capsys)["model"]["objective"]["init_args"] == {"beta": 0.1}


def test_own_objective_by_class_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A class outside the package needs no change to it."""
    (tmp_path / "my_objectives.py").write_text(
        "from simnpo_pl.objectives import NPO\n\n\nclass Mine(NPO):\n    def __init__(self, strength: float = 3.0):\n"
        "        super().__init__(beta=strength)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    got = resolved(["fit", "--config", "configs/tofu.yaml", "--model.objective", "my_objectives.Mine"], capsys)
    assert got["model"]["objective"] == {"class_path": "my_objectives.Mine", "init_args": {"strength": 3.0}}


def shown_commands(file: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", file.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda f: f.name)
def test_shown_commands_parse(file: Path, capsys: pytest.CaptureFixture[str]):
    """Every command line of README and docs is understood as written; make targets and scripts exist."""
    from simnpo_pl.commands import COMMANDS, parse

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    seen = 0
    for command in shown_commands(file):
        words = shlex.split(command)
        seen += 1
        if words[0] == "make":
            assert words[1] in targets
        elif words[1:3] == ["-m", "simnpo_pl"]:
            arguments = words[3:]
            if arguments[0] in COMMANDS:
                _, options = parse(arguments[0], arguments[1:])
                arguments = ["fit", *options.fit] if hasattr(options, "fit") else []
            if arguments:
                resolved(arguments, capsys)
        elif words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("tensorboard", "git", "cd", "pip")
    assert seen >= 8 or file.name != "README.md"
