"""Every shipped config parses against the signatures, alone or as the overlay it is."""

import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from simnpo_pl import objectives

ROOT = Path(__file__).parents[1]
OTHERS = ("sweep", "tune", "analysis", "verify", "study")
CONFIGS = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if not {*f.relative_to(ROOT).parts} & {*OTHERS})
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


TOFU_1B = (5e-5, "SimNPO", {"beta": 3.5, "gamma": 3.5}, 0.25, 1.0)
"""Learning rate, objective, its settings, forget and retain weight."""
PAPER_10 = (1e-5, "SimNPO", {"beta": 4.5, "gamma": 0.0}, 0.125, 1.0)
PAPER_05 = (1e-5, "SimNPO", {"beta": 2.5, "gamma": 0.0}, 0.1375, 1.0)
LORA = (2e-4, *TOFU_1B[1:])
SMOLLM2 = (5e-5, "SimNPO", {"beta": 1.0, "gamma": 0.0}, 0.5, 1.0)
OWN = ("auto", *SMOLLM2[1:])
NEWS = (1e-5, "SimNPO", {"beta": 0.7, "gamma": 3.0}, 1.0, 0.1)
WMDP = (4e-6, "SimNPO", {"beta": 5.5, "gamma": 0.0}, 1.0, 5.0)
FINETUNE = (1e-5, "FineTune", {}, 1.0, 0.0)
RECIPES = {
    "demo": (1.2e-3, "SimNPO", {"beta": 0.65, "gamma": 0.0}, 0.25, 1.0),
    "finetune": FINETUNE,
    **{f"hardware/{f.stem}": TOFU_1B for f in CONFIGS if f.parent.name == "hardware"},
    "hardware/lora": LORA,
    "markov": (2e-3, "SimNPO", {"beta": 4.0, "gamma": 0.0}, 1.0, 1.0),
    "markov_paper": (5e-4, "SimNPO", {"beta": 4.0, "gamma": 0.0}, 1.0, 1.0),
    "models/llama2-7b": PAPER_10,
    "muse_books": (1e-5, "SimNPO", {"beta": 0.75, "gamma": 0.0}, 1.0, 0.1),
    "muse_demo": (3e-4, "SimNPO", {"beta": 0.7, "gamma": 0.0}, 1.0, 1.0),
    "muse_news": NEWS,
    "own": OWN,
    "tofu": TOFU_1B,
    "tofu_forget05": PAPER_05,
    "tofu_smollm2": SMOLLM2,
    "wmdp_bio": WMDP,
    "wmdp_cyber": WMDP,
}
FIRST_PAGES = {file.name: file for file in (ROOT / "README.md", ROOT / "docs" / "quickstart.md")}
SHOWN = {
    "configs/demo.yaml": RECIPES["demo"],
    "configs/tofu.yaml": TOFU_1B,
    "configs/tofu.yaml --config configs/hardware/low_memory.yaml": TOFU_1B,
    "configs/tofu.yaml --config configs/hardware/lora.yaml": LORA,
    "configs/tofu.yaml --data.forget_split forget05": TOFU_1B,
    "configs/tofu.yaml --model.objective NPO --model.retain_weight 5": (5e-5, "NPO", {"beta": 0.1}, 1.0, 5.0),
    "configs/tofu.yaml --model.objective RMU --model.retain_loss EmbedDiff": (5e-5, "RMU", None, 1.0, 1.0),
    "configs/tofu.yaml --config configs/hardware/ddp.yaml": TOFU_1B,
    "configs/tofu.yaml --config configs/models/llama2-7b.yaml": PAPER_10,
    "configs/tofu.yaml --config configs/tofu_forget05.yaml": PAPER_05,
    "configs/muse_news.yaml": NEWS,
    "configs/wmdp_bio.yaml --data.forget bio_forget.jsonl": WMDP,
    "configs/tofu.yaml --data.path FOLDER --data.forget_split forget05 --model.name FOLDER": TOFU_1B,
    "configs/finetune.yaml --model.name MODEL": FINETUNE,
    "configs/finetune.yaml --model.name MODEL --data.train_split retain90": FINETUNE,
    "configs/finetune.yaml --model.name START --data.train_split forget10": FINETUNE,
    "configs/tofu.yaml --model.objective RKLD --model.memorizing FOLDER": (5e-5, "RKLD", None, 1.0, 1.0),
    "configs/own.yaml --data.forget forget.jsonl --data.retain retain.jsonl --model.name MODEL": OWN,
}
"""What the commands of `fit` on the first pages give."""
NEWER = {
    "configs/tofu.yaml --model.objective AltPO --model.retain_weight 2": (5e-5, "AltPO", {"beta": 0.1}, 1, 2),
    "configs/tofu.yaml --model.objective JensUn --model.retain_loss JSD --model.lr 8e-6 "
    "--data.refusals idontknow.jsonl": (8e-6, "JensUn", None, 1, 1),
    "configs/tofu.yaml --model.objective IHL": (5e-5, "IHL", None, 1, 1),
    "configs/tofu.yaml --model.update SAM": TOFU_1B,
    "configs/tofu.yaml --model.objective NPO --model.update GRU": (5e-5, "NPO", {"beta": 0.1}, 1, 1),
}
"""What commands of docs/methods.md give."""
COMBINED = {
    **NEWER,
    # Whichever of the paper's two comes last holds as a whole.
    "configs/tofu.yaml --config configs/models/llama2-7b.yaml --config configs/tofu_forget05.yaml": PAPER_05,
    "configs/tofu.yaml --config configs/tofu_forget05.yaml --config configs/models/llama2-7b.yaml": PAPER_10,
    "configs/tofu.yaml --config configs/tofu_forget05.yaml --model.objective NPO": (1e-5, "NPO", {"beta": 0.1}, 1, 1),
    "configs/tofu.yaml --config configs/models/llama2-7b.yaml --model.objective GradDiff": (1e-5, "GradDiff", {}, 1, 1),
    "configs/wmdp_bio.yaml --model.objective NPO --model.retain_weight 5": (4e-6, "NPO", {"beta": 0.1}, 1.0, 5.0),
}


def recipe(got: dict[str, Any]) -> tuple[Any, ...]:
    """Learning rate, objective, settings and weights of a resolved config, weights after the objective's defaults."""
    model = got["model"]
    cls = getattr(objectives, model["objective"]["class_path"].rsplit(".", 1)[-1])
    given = [model["forget_weight"], model["retain_weight"]]
    defaults = [cls.default_forget_weight, cls.default_retain_weight]
    weights = [default if weight is None else weight for weight, default in zip(given, defaults, strict=True)]
    return model["lr"], cls.__name__, model["objective"].get("init_args", {}), *weights


def check(got: dict[str, Any], expected: tuple[Any, ...]) -> None:
    lr, name, settings, *weights = recipe(got)
    # None: the objective's own defaults, whatever these are.
    assert (lr, name, settings if expected[2] is not None else None, *weights) == expected


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: str(f.relative_to(ROOT)))
def test_parses(config: Path, capsys: pytest.CaptureFixture[str]):
    """Every setting arrives, and none of another file is left in the recipe."""
    content = yaml.safe_load(config.read_text())
    whole = "class_path" in content.get("data", {})
    base = [] if whole else ["--config", OVERLAID.get(config.name, "configs/tofu.yaml")]
    got = resolved(["fit", *base, "--config", str(config)], capsys)
    assert included(content, got)
    check(got, RECIPES[str(config.relative_to(ROOT / "configs").with_suffix(""))])


def test_methods_page_shows_these_commands():
    page = (ROOT / "docs" / "methods.md").read_text()
    assert not [command for command in NEWER if f"python -m simnpo_pl fit --config {command}" not in page]


@pytest.mark.parametrize("command", COMBINED)
def test_combinations_give_their_recipe(command: str, capsys: pytest.CaptureFixture[str]):
    got = resolved(["fit", "--config", *command.split()], capsys)
    check(got, COMBINED[command])
    if "tofu" in command and command not in NEWER:
        last = "forget05" if command.rfind("forget05.yaml") > command.rfind("7b.yaml") else "forget10"
        assert got["model"]["name"] == "locuslab/tofu_ft_llama2-7b"
        assert got["data"]["init_args"]["forget_split"] == last
        assert got["data"]["init_args"]["template"] == "[INST] {question} [/INST]{answer}"


@pytest.mark.parametrize("name", ["table1", "tableA2", "tableA3"])
def test_models_of_sweeps_are_fine_tuned(name: str, capsys: pytest.CaptureFixture[str]):
    """The 7B overlay brings the paper's unlearning recipe; what a table starts from is made without."""
    models = yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())["models"]
    assert models
    for options in models.values():
        got = resolved(["fit", *shlex.split(options, comments=True)], capsys)
        check(got, FINETUNE)
        assert got["model"]["retain_loss"] is None


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
    """Commands of a page's blocks, and of README's text."""
    text = file.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    if file.name == "README.md":
        blocks += re.findall(r"`(python -m simnpo_pl [^`\n]+)`", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda f: f.name)
def test_shown_commands_parse(file: Path, capsys: pytest.CaptureFixture[str]):
    """Every command line of README and docs is understood as written, those of the first pages give the recipes above;
    make targets and scripts exist.
    """
    from simnpo_pl.studies import COMMANDS, parse

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for command in shown_commands(file):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets
        elif words[1:3] == ["-m", "simnpo_pl"]:
            arguments = words[3:]
            if arguments[0] in COMMANDS:
                options = parse(arguments[0], arguments[1:])
                arguments = ["fit", *options.fit] if hasattr(options, "fit") else []
            if arguments:
                got = resolved(arguments, capsys)
                if file.name in FIRST_PAGES and words[3] == "fit":
                    check(got, SHOWN[" ".join(arguments[2:])])
        elif words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("tensorboard", "git", "cd", "pip", "python3", "source")


def test_the_first_pages_show_every_recipe():
    commands = [command for page in FIRST_PAGES.values() for command in shown_commands(page)]
    shown = {command.partition("simnpo_pl fit --config ")[2].strip() for command in commands}
    assert shown - {""} == SHOWN.keys()
