"""`fit --help` is jsonargparse's: every option of ours with its text, in 80 columns; the help over all is instant."""

import inspect
import re
import subprocess
import sys

import pytest

from simnpo_pl.__main__ import main
from simnpo_pl.cli import RUNS
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.runs.checkpoint import CheckpointOptions
from simnpo_pl.runs.export import ExportOptions

GROUPS = {"model": UnlearningModule, "eval": EvalOptions, "export": ExportOptions, "checkpoint": CheckpointOptions}
SINGLE = ["run_dir", "ckpt_path", "seed_everything", "trust_remote_code"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", RUNS)
def test_every_option_has_its_text(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, command, "--help")
    assert text.startswith(f"usage: python -m simnpo_pl {command} --config FILE")
    assert RUNS[command] in text
    entries = dict(re.findall(r"^  --([\w.]+) .*\n((?:        .*\n)+)", text, flags=re.MULTILINE))
    options = SINGLE + [
        f"{group}.{name}" for group, cls in GROUPS.items() for name in inspect.signature(cls).parameters
    ]
    assert len(options) > 40
    for name in options:
        assert re.match(r"        [\w`]", entries[name]), name
    ours = text[text.index("  --model.name") :]
    assert max(map(len, ours.splitlines())) <= 80
    assert "default: 10" in entries["trainer.max_epochs"]


def test_classes_are_listed_by_name(capsys: pytest.CaptureFixture[str]):
    text = " ".join(shown(capsys, "fit", "--help").split())
    assert re.search(r"known subclasses: RetainLoss, NLL, KL, JSD, EmbedDiff\)", text)
    assert re.search(r"known subclasses: PairedData, UnlearningData, TofuData, DemoData, MuseData", text)
    assert re.search(r"known subclasses: Objective, .*\bSimNPO, ", text)


@pytest.mark.parametrize(
    ("option", "name", "setting"),
    [
        ("model.objective", "NPO", "beta"),
        ("model.retain_loss", "EmbedDiff", "layer"),
        ("data", "MuseData", "forget_split"),
    ],
)
def test_settings_of_a_class(option: str, name: str, setting: str, capsys: pytest.CaptureFixture[str]):
    text = shown(capsys, "fit", f"--{option}.help", name)
    assert re.search(rf"--{option}\.(init_args\.)?{setting} .*\n +\w", text), text


def test_nothing_heavy_is_imported_for_the_help_and_for_mistakes():
    code = (
        "import sys; from simnpo_pl.__main__ import main\n"
        "for arguments in ([], ['--help'], ['fitt'], ['report', '--oops']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
        "assert not {'torch', 'lightning', 'transformers', 'jsonargparse'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m simnpo_pl COMMAND")
    assert "error: fitt: no such command" in done.stderr
    assert "error: unrecognized arguments: --oops" in done.stderr
