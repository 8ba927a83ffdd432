"""`fit --help` is read from the sources: it must say what the real parser knows, without importing it."""

import re
import subprocess
import sys

import pytest

from simnpo_pl.__main__ import RUNS, main
from simnpo_pl.cli.help import options_help, read_classes, trainer_settings


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options of the real parser and what it says of each."""
    words = [sys.executable, "-m", "simnpo_pl", "fit", "--help_all"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    entries = re.split(r"^  (?=-)", shown.split("options:", 1)[1], flags=re.MULTILINE)
    return {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in entries if entry.startswith("--")}


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """Options of the quick help and what it says of each."""
    entries = re.split(r"^  (?=--[a-z_.]+ \S+$)", options_help("fit", RUNS["fit"]), flags=re.MULTILINE)
    return {entry.split()[0]: " ".join(entry.split()) for entry in entries if entry.startswith("--")}


def test_every_option_of_the_parser_is_shown(parsed: dict[str, str], shown: dict[str, str]):
    groups = {
        "--trainer",
        "--model",
        "--data",
        "--eval",
        "--export",
        "--checkpoint",
        "--print_config",
        "--weights_only",
    }
    expected = {name for name in parsed if not name.endswith(".help")} - groups
    assert len(expected) > 80
    assert expected - set(shown) == set()
    # The adapter's and the data modules' own settings are classes' to the parser.
    classes = {name for name in shown if name.startswith(("--model.lora.", "--data."))}
    assert set(shown) - expected - classes == set()


def test_defaults_are_the_parsers(parsed: dict[str, str], shown: dict[str, str]):
    def default(text: str) -> str:
        found = re.search(r"default: ([^)]*?\)?)(?:\)|, known)", text)
        return "null" if found is None else found[1].lower()

    compared = 0
    for name in parsed.keys() & shown.keys() - {"--model.retain_loss", "--model.name"}:
        assert default(shown[name]) == default(parsed[name]), (shown[name], parsed[name])
        compared += 1
    assert compared > 80
    assert "(default: NLL)" in shown["--model.retain_loss"]
    assert "(required)" in shown["--model.name"]


def test_every_class_is_shown_with_its_settings(parsed: dict[str, str]):
    text = options_help("fit", RUNS["fit"])
    for option, abstract in (("model.objective", ["Objective"]), ("model.retain_loss", ["RetainLoss"])):
        known = re.findall(r"simnpo_pl\.[\w.]+\.(\w+)", parsed[f"--{option}"].split("known subclasses:")[1])
        assert len(known) > 3
        for name in set(known) - set(abstract):
            assert re.search(rf"^  {name}\b", text, re.MULTILINE), name
    assert "SimNPO  beta=4.5 gamma=0.0" in text
    assert all(re.search(rf"^  {name}\b", text, re.MULTILINE) for name in ("TofuData", "MuseData", "WmdpData"))


def test_settings_are_explained(shown: dict[str, str]):
    assert not [name for name, text in shown.items() if re.fullmatch(r"\S+ \S+ \(.*\)", text)]
    assert all(setting.text for setting in trainer_settings())


def test_a_constant_from_another_module_is_followed():
    settings = {s.name: s for s in read_classes("benchmarks")["UnlearningData"].settings}
    assert settings["chat_date"].default == "26 Jul 2024"
    assert {s.name: s for s in read_classes("module/unlearning.py")["UnlearningModule"].settings}[
        "schedule"
    ].kind == "linear|constant"


@pytest.mark.parametrize("command", RUNS)
def test_nothing_heavy_is_imported(command: str):
    code = (
        "import sys; from simnpo_pl.__main__ import main; main([sys.argv[1], '--help']); "
        "assert not {'torch', 'lightning', 'transformers', 'jsonargparse'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: python -m simnpo_pl {command} --config FILE")
    assert ("--export.best" in shown) == (command == "fit")


def test_help_wins_over_other_words(capsys: pytest.CaptureFixture[str]):
    main(["fit", "--config", "no/such.yaml", "-h"])
    assert "--model.objective NAME" in capsys.readouterr().out
