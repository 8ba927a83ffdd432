"""The Unlearning Depth Score: values of the public code, by hand, in a run and in `check`."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import results, run_processes
from simnpo_pl.__main__ import main
from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.metrics.functional import depth_score
from simnpo_pl.module.depth import UDS, measure_depth
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.runs.folder import add_depth
from simnpo_pl.runs.record import Run
from simnpo_pl.utils.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def measure(models: dict[str, str], rows: list[TokenRow], **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{name: settings.pop(name) for name in ("precision",) if name in settings},
    )
    splits = [Split(settings.pop("split", "forget"), [{}] * len(rows), [[row] for row in rows], {})]
    data = SimpleNamespace(
        eval=EvalOptions(tokens_per_batch=settings.pop("tokens", 512)),
        evaluation=lambda: SimpleNamespace(splits=splits),
        largest_id=lambda: max(max(row.input_ids) for row in rows),
    )
    return measure_depth(trainer, PolicyModule(models["start"], **settings), data, **models)


@pytest.fixture(scope="module")
def public(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "goldens/A/uds.json").read_text())


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, str]:
    folder = shared / "goldens/A"
    return {"start": str(folder / "target"), "retrained": str(folder / "retain"), "unlearned": str(folder / "policy")}


def scored(row: dict[str, Any]) -> TokenRow:
    """A row of the public code, which scores the tokens after positions [a, z)."""
    first, last = row["positions"]
    ids = row["input_ids"]
    return TokenRow(ids, [token if first < i <= last else IGNORE_INDEX for i, token in enumerate(ids)])


def test_public_values_by_row_and_layer(public: dict[str, Any], models: dict[str, str]):
    """Many rows a batch, packed, against the public code's one; the last layer as without its second norm."""
    entry, rows = measure(models, [scored(row) for row in public["rows"]])
    assert entry["metrics"][UDS] == pytest.approx(public["extra"]["uds_prenorm"], abs=1e-5)
    assert entry["n"] == 40
    low, high = entry["intervals"][UDS]
    assert low < entry["metrics"][UDS] < high
    for row, expected in zip(rows, public["rows"], strict=True):
        last = expected["prenorm"]
        assert row["retrained"][:-1] == pytest.approx(expected["s1_delta"][:-1], abs=1e-5)
        assert row["unlearned"][:-1] == pytest.approx(expected["s2_delta"][:-1], abs=1e-5)
        assert row["retrained"][-1] == pytest.approx(last["s1_delta_last"], abs=1e-5)
        assert row["unlearned"][-1] == pytest.approx(last["s2_delta_last"], abs=1e-5)
        assert row["uds"] == pytest.approx(last["uds"], abs=1e-5)
    drops = [torch.tensor([row[name] for row in rows]) for name in ("retrained", "unlearned")]
    score = depth_score(*drops, least=1.5)
    assert score.isfinite().sum() == public["extra"]["uds_prenorm_threshold_1p5_rows_used"]
    assert score.nanmean().item() == pytest.approx(public["extra"]["uds_prenorm_threshold_1p5"], abs=1e-5)


def test_whole_answers(public: dict[str, Any], models: dict[str, str]):
    """As `fit` scores them; the first layer, which the last norm does not touch."""
    found = public["answer_span"]["rows"]
    _, rows = measure(models, [scored(row) for row in found], tokens=100)
    for row, expected in zip(rows, found, strict=True):
        assert row["retrained"][0] == pytest.approx(expected["s1_delta"][0], abs=1e-5)
        assert row["unlearned"][0] == pytest.approx(expected["s2_delta"][0], abs=1e-5)


def test_ends_of_the_scale_and_bfloat16(public: dict[str, Any], models: dict[str, str]):
    """The start model lacks nothing, exactly; the retrained model all that it lacks; bfloat16 is close."""
    rows = [scored(row) for row in public["rows"][:8]]
    none, _ = measure({**models, "unlearned": models["start"]}, rows)
    everything, _ = measure({**models, "unlearned": models["retrained"]}, rows)
    assert none["metrics"][UDS] == pytest.approx(0.0, abs=1e-6)
    assert everything["metrics"][UDS] == pytest.approx(1.0, abs=1e-6)
    exact, _ = measure(models, rows)
    for settings in ({"dtype": "bfloat16"}, {"precision": "bf16-mixed"}):
        rounded, _ = measure(models, rows, **settings)
        assert rounded["metrics"][UDS] == pytest.approx(exact["metrics"][UDS], abs=0.02)


def test_rows_that_begin_alike_are_patched_apart(public: dict[str, Any], models: dict[str, str]):
    """Packed rows share their first tokens; a token patched in one row is a prompt's in the next."""
    row = scored(public["rows"][0])
    first = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
    later = TokenRow(row.input_ids, [IGNORE_INDEX] * (first + 2) + row.labels[first + 2 :])
    _, together = measure(models, [row, later])
    apart = [measure(models, [one])[1][0] for one in (row, later)]
    for one, other in zip(together, apart, strict=True):
        assert one["retrained"] == pytest.approx(other["retrained"], abs=1e-5)
        assert one["unlearned"] == pytest.approx(other["unlearned"], abs=1e-5)


def test_by_hand():
    """Layers 1 and 2 count: (0.5 + 1) / (1 + 1); what exceeds the retrained model's or is below 0 is cut."""
    retrained = torch.tensor([[0.04, 1.0, 1.0], [2.0, 2.0, 0.0]])
    unlearned = torch.tensor([[9.0, 0.5, 3.0], [-1.0, 1.0, 5.0]])
    assert depth_score(retrained, unlearned).tolist() == pytest.approx([0.75, 0.25])


def test_models_of_other_shapes(models: dict[str, str], model_folder: Path, public: dict[str, Any]):
    with pytest.raises(UserError, match="has 2 layers of 32; give a retrained model of the start model's architecture"):
        measure({**models, "retrained": str(model_folder)}, [scored(public["rows"][0])])


@pytest.fixture(scope="module")
def run(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "deep"
    options = ["--run_dir", str(folder), "--eval.retrained", str(other_folder), "--eval.depth", "true"]
    main(["fit", *run_options, *options, "--debug"])
    return folder


def test_a_run_measures_it(run: Path):
    """The same by `check`, which does not measure it again; rows, layers, interval and sentence are kept."""
    found = results(run)
    entry, rows = found["depth"], [json.loads(line) for line in (run / "depth.jsonl").read_text().splitlines()]
    score = found["final"]["metrics"][UDS]
    assert 0 <= score <= 1
    # In an untrained model some rows have no layer in which the retrained model lacks anything.
    known = [row["uds"] for row in rows if row["uds"] is not None]
    assert score == entry["metrics"][UDS] == pytest.approx(sum(known) / len(known))
    assert (len(rows), found["counts"][UDS]) == (10, len(known))
    assert found["final"]["intervals"][UDS] == entry["intervals"][UDS]
    assert [len(entry["layers"][model]) for model in ("retrained", "unlearned")] == [2, 2]
    assert entry["sentence"] in found["verdict"]["reasons"]
    assert "evaluation, depth" in found["seconds"]
    main(["check", str(run), "--attacks", "depth", "--debug"])
    assert results(run) == found
    for name in ("depth", "verdict"):
        del found[name]
    del found["final"]["metrics"][UDS], found["counts"][UDS], found["final"]["intervals"]
    (run / "results.json").write_text(json.dumps(found))
    main(["check", str(run), "--attacks", "depth", "--debug"])
    again = results(run)
    assert again["depth"]["layers"]["unlearned"] == pytest.approx(entry["layers"]["unlearned"], abs=1e-6)
    assert again["final"]["metrics"][UDS] == pytest.approx(score, abs=1e-6)
    assert again["depth"]["settings"] == entry["settings"]


def test_what_is_missing_is_said(
    cli_error: Callable[..., str],
    run_options: list[str],
    other_folder: Path,
    model_folder: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert "which no log holds: give --eval.retrained MODEL" in cli_error("fit", "--eval.depth", "true")
    retrained = ["--eval.depth", "true", "--eval.retrained"]
    said = cli_error("test", *retrained, str(other_folder), "--run_dir", str(tmp_path / "a"))
    assert "--eval.depth needs the start model, which only fit knows" in said
    deeper = make_model(2, num_hidden_layers=3)
    said = cli_error("fit", *retrained, str(deeper), "--run_dir", str(tmp_path / "b"))
    assert "has 3 layers of 32" in said
    assert not (tmp_path / "b").exists()
    place = run_options.index("--model.name")
    options = [*run_options[:place], *run_options[place + 2 :], "--out", str(tmp_path), "--attacks", "depth"]
    for given, lacking in (([], "the start model, --start"), (["--start", str(model_folder)], "a retrained model, --")):
        main(["check", str(other_folder), *options, *given, "--debug"])
        assert f"not tested: hidden states (the Unlearning Depth Score needs {lacking}" in capsys.readouterr().out


def test_a_lack_of_memory_leaves_the_other_results(
    cli: Callable[..., None], other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run ends, and `check` measures what is missing."""
    from simnpo_pl.module.depth import DepthModule

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    options = ["--eval.retrained", str(other_folder), "--eval.depth", "true", "--trainer.max_epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(DepthModule, "test_step", fail)
        with pytest.warns(UserWarning, match="--eval.depth: it could not be measured .*no memory"):
            cli("fit", *options, "--run_dir", str(tmp_path))
    found = results(tmp_path)
    assert "no memory" in found["unavailable"][UDS]
    assert found["finished"]
    assert found["final"]["metrics"].keys() >= found["start"]["metrics"].keys() - {UDS}
    main(["check", str(tmp_path), "--attacks", "depth", "--debug"])
    assert 0 <= results(tmp_path)["final"]["metrics"][UDS] <= 1
    assert UDS not in results(tmp_path)["unavailable"]


def test_a_run_without_final_metrics_is_told_before_the_passes(
    cli: Callable[..., None], other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cli("fit", "--eval.final", "false", "--trainer.max_epochs", "1", "--run_dir", str(tmp_path))
    main(["check", str(tmp_path), "--attacks", "depth", "--retrained", str(other_folder), "--debug"])
    said = "not tested: hidden states (the Unlearning Depth Score needs a run of fit with --eval.final true)"
    assert said in capsys.readouterr().out


def test_text_without_a_forget_split(public: dict[str, Any], models: dict[str, str]):
    with pytest.raises(UserError, match="reads the answers of a split `forget`, which is not measured here"):
        measure(models, [scored(public["rows"][0])], split="retain")


COMMANDS = [
    line.removeprefix("python -m simnpo_pl ")
    for block in re.findall(r"## Unlearning Depth Score\n\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(
    command: str, run: Path, run_options: list[str], model_folder: Path, other_folder: Path, tmp_path: Path
):
    """As they are written, on small models and rows."""
    names = {"runs/demo": run, "MODEL": run / "model", "START": model_folder, "RETRAINED": other_folder}
    words = [str(names.get(word, word)) for word in shlex.split(command)]
    place = run_options.index("--model.name")
    if words[0] == "fit":
        words += [*run_options[2:], "--trainer.max_epochs", "1", "--run_dir", str(tmp_path / "run")]
    elif "--config" in words:
        words += [*run_options[2:place], *run_options[place + 2 :], "--out", str(tmp_path)]
    main([*words, "--debug"])
    if words[0] == "fit":
        assert UDS in results(tmp_path / "run")["final"]["metrics"]


def test_a_score_of_no_row_has_a_reason(public: dict[str, Any], models: dict[str, str], tmp_path: Path):
    """A model retrained to be the start model lacks nothing."""
    depth = measure({**models, "retrained": models["start"]}, [scored(row) for row in public["rows"][:3]])
    record: dict[str, Any] = {"final": {"metrics": {}}}
    add_depth(Run("run", tmp_path, record), record, *depth)
    assert math.isnan(record["final"]["metrics"][UDS])
    assert "lack nothing of any forget row" in record["unavailable"][UDS]
    assert "Score - over 0 of 3 rows" in record["depth"]["sentence"]


def test_a_broken_model_has_no_score(public: dict[str, Any], models: dict[str, str], tmp_path: Path):
    """Its rows are not left out."""
    model = AutoModelForCausalLM.from_pretrained(models["unlearned"])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    rows = [scored(row) for row in public["rows"][:3]]
    depth = measure({**models, "unlearned": str(tmp_path / "broken")}, rows)
    record: dict[str, Any] = {"final": {"metrics": {}}}
    add_depth(Run("run", tmp_path, record), record, *depth)
    assert math.isnan(record["final"]["metrics"][UDS])
    assert record["unavailable"][UDS] == "one of its scores is not a number"
    assert record["counts"][UDS] == 3
    assert record["final"]["intervals"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_two_processes_find_the_same(
    overlay: str, cli: Callable[..., None], run_options: list[str], other_folder: Path, tmp_path: Path
):
    """Whole or sharded models; each process keeps the states of its own rows."""
    options = ["--eval.retrained", str(other_folder), "--eval.depth", "true", "--trainer.max_epochs", "1"]
    options += ["--eval.tokens_per_batch", "128"]
    cli("fit", *options, "--run_dir", str(tmp_path / "one"))
    config = ["--config", f"configs/hardware/{overlay}.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    words = ["fit", *run_options, *config, *options, "--run_dir", str(tmp_path / "two"), "--debug"]
    assert run_processes(2, words, tmp_path / "log") == 0
    one, two = (results(tmp_path / name)["depth"] for name in ("one", "two"))
    assert (two["n"], len((tmp_path / "two" / "depth.jsonl").read_text().splitlines())) == (one["n"], 10)
    for model, drops in one["layers"].items():
        assert two["layers"][model] == pytest.approx(drops, abs=2e-3), model
