"""The relearning attack on finished runs: which rows, what is measured, what is kept and not done again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simnpo_pl.__main__ import main
from simnpo_pl.report.robustness import OTHERS, SHOWN, spread
from simnpo_pl.studies.relearn import choose_rows

KEY = "share=0.3 epochs=2 lr=0.01"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unlearned"
    options = ["--run_dir", str(folder), "--eval.retrained", str(other_folder), "--trainer.max_epochs", "1"]
    main(["fit", *run_options, *options, "--debug"])
    return folder


def relearn(run: Path, *options: str) -> None:
    main(["relearn", str(run), "--share", "0.3", "--epochs", "2", "--lr", "1e-2", *options, "--debug"])


def test_rows_by_hand():
    """Of equally short answers the earlier rows are taken; a draw is its seed's; too few rows are repeated."""
    lengths = [4, 3, 9, 3, 3]
    assert choose_rows(lengths, "shortest", 2, seed=0) == [1, 3]
    draws = [choose_rows(range(100), "random", 20, seed) for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    assert len(set(draws[0])) == 20
    assert choose_rows(lengths, "random", 5, seed=3) == [0, 1, 2, 3, 4]
    assert choose_rows(lengths[:2], "text", 4, seed=3) == [0, 0, 1, 1]


def test_spread_by_hand():
    """Mean 4, squared deviations 4 + 0 + 4 over n - 1 = 2; the last number is that of all repeats."""
    assert spread([2.0, None, 4.0, 6.0]) == (4.0, 2.0, 3, 4)
    assert spread([5.0]) == (5.0, 0.0, 1, 1)
    assert spread([None]) is None


def test_curve(run: Path, run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Starts at the unlearned model, and is what `fit` with plain fine-tuning on these rows gives."""
    relearn(run, "--subset", "shortest")
    entry = results(run)["relearn"][f"shortest {KEY}"]
    assert entry["settings"] == {"subset": "shortest", "share": 0.3, "epochs": 2, "lr": 0.01}
    (repeat,) = entry["repeats"]
    assert [epoch["epoch"] for epoch in repeat["epochs"]] == [0, 1, 2]
    before, *after = (epoch["metrics"] for epoch in repeat["epochs"])
    final = results(run)["final"]["metrics"]
    assert {name: before[name] for name in final if name in before} == pytest.approx(
        {name: final[name] for name in before if name in final}, rel=1e-5
    )
    assert {"forget_quality", "forget/probability", "forget/truth_ratio"} <= set(before)
    assert after[1]["forget/probability"] > before["forget/probability"]
    for epoch in repeat["epochs"]:
        # 3 of 10 rows are relearned.
        parts = 0.3 * epoch["metrics"][SHOWN] + 0.7 * epoch["metrics"][OTHERS]
        assert parts == pytest.approx(epoch["metrics"]["forget/probability"], rel=1e-5)
    assert [epoch["step"] for epoch in repeat["epochs"]] == [0, 1, 2]
    assert after[1][SHOWN] > after[1][OTHERS]

    lines = capsys.readouterr().out.splitlines()
    assert f"{run.name}: relearning 3 shortest rows, lr 0.01, draw 0; {run / 'model'}" in lines
    for model in ("SimNPO", "retrained"):
        row = next(
            line for line in lines if line.startswith(f"| {run.name} | {model} | 3 shortest rows | forget prob.")
        )
        assert len(row.split("|")) == 4 + 3 + 2

    again = tmp_path / "again"
    options = ["--model.name", str(run / "model"), "--model.objective", "FineTune", "--model.retain_loss", "null"]
    options += ["--data.forget_rows", str(repeat["rows"]), "--model.warmup_epochs", "0", "--model.lr", "1e-2"]
    main(["fit", *run_options, *options, "--run_dir", str(again), "--debug"])
    for epoch, expected in zip(results(again)["epochs"], after, strict=True):
        for name in ("forget/probability", "forget/truth_ratio", "forget/exact_memorization"):
            assert expected[name] == pytest.approx(epoch["metrics"][name], rel=1e-5)


def test_no_setting_of_the_method_reaches_the_attack(run: Path, tmp_path: Path):
    """A run with other settings, its other models gone, is attacked alike."""
    relearn(run, "--subset", "shortest")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("results.json"))
    record = {name: value for name, value in results(run).items() if name != "relearn"}
    (copy / "results.json").write_text(json.dumps(record))
    changed = {
        **{"objective": {"class_path": "RKLD"}, "retain_loss": {"class_path": "KL"}, "update": {"class_path": "GRU"}},
        **{"forget_weight": 0.3, "retain_weight": 2.0, "reference": "/gone", "memorizing": "/gone"},
        **{"trainable": ["nothing"], "lora": {"rank": 2}, "lr": 1.0, "warmup_epochs": 9.0, "warmup_steps": 99},
        **{"schedule": "constant", "dtype": "bfloat16", "compile": True},
    }
    kept = {"name", "optimizer", "weight_decay", "betas", "gradient_checkpointing", "attn_implementation"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert changed.keys() | kept == config["model"].keys()
    config["model"] |= changed
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    relearn(copy, "--subset", "shortest")
    assert results(copy)["relearn"] == results(run)["relearn"]


def test_an_adapter_exported_alone(run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Loaded in bfloat16 it is merged in float32 and trained as any model; to be rounded it needs float32, too."""
    folder = tmp_path / "adapter"
    options = ["--model.lora.rank", "2", "--model.dtype", "bfloat16", "--export.adapter", "true", "--eval.start"]
    main(["fit", *run_options, *options, "false", "--trainer.max_epochs", "1", "--run_dir", str(folder)])
    relearn(folder, "--subset", "shortest")
    (repeat,) = results(folder)["relearn"][f"shortest {KEY}"]["repeats"]
    before, *_, after = (epoch["metrics"][SHOWN] for epoch in repeat["epochs"])
    assert after > 2 * before
    main(["check", str(folder), "--attacks", "quantize"])
    assert "not tested: weights rounded to 8 bits (RUN/model: the adapter is not merged" in capsys.readouterr().out
    main(["check", str(folder), "--attacks", "quantize", "--model.dtype", "float32"])
    assert "8-bit" in results(folder)["quantized"]


def test_what_is_there_is_not_done_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    """One more draw is added to the two that are there; with all there nothing is opened."""
    from simnpo_pl.studies import relearn as module

    opened: list[Any] = []
    reopen: Callable[..., Any] = module.reopen
    monkeypatch.setattr(module, "reopen", lambda *a, **named: (opened.append(a), reopen(*a, **named))[1])
    relearn(run, "--subset", "random", "--repeats", "2")
    first = results(run)["relearn"][f"random {KEY}"]["repeats"]
    relearn(run, "--subset", "random", "--repeats", "3")
    second = results(run)["relearn"][f"random {KEY}"]["repeats"]
    assert second[:2] == first
    assert [repeat["seed"] for repeat in second] == [0, 1, 2]
    assert len({tuple(repeat["rows"]) for repeat in second}) > 1
    # The retrained model, too.
    assert len(opened) == 2 * 3
    relearn(run, "--subset", "random", "--repeats", "3")
    assert len(opened) == 2 * 3
    assert results(run)["final"]["metrics"]


def test_the_control_is_the_retrained_model(run: Path, other_folder: Path):
    """Before the attack it is as it was evaluated; it is shown the same rows for as many steps."""
    relearn(run, "--subset", "shortest")
    (repeat,) = results(run)["relearn"][f"shortest {KEY}"]["repeats"]
    control = repeat["control"]
    expected = results(run)["retrained"]["metrics"]["forget/probability"]
    assert control[0]["metrics"]["forget/probability"] == pytest.approx(expected, rel=1e-5)
    assert [epoch["step"] for epoch in control] == [epoch["step"] for epoch in repeat["epochs"]]
    assert control[2]["metrics"][SHOWN] > control[0]["metrics"][SHOWN]


def test_another_control_is_attacked_on_the_rows_and_tokens_of_the_run(run: Path, other_folder: Path, tmp_path: Path):
    """Its own tokenizer and context do not count; all draws get it, and the run's own model is not attacked again."""

    def repeats() -> list[dict[str, Any]]:
        return results(run)["relearn"][f"random {KEY}"]["repeats"]

    relearn(run, "--subset", "random", "--repeats", "2")
    before, other = repeats(), tmp_path / "other"
    shutil.copytree(other_folder, other, ignore=shutil.ignore_patterns("tokenizer*"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    relearn(run, "--subset", "random", "--repeats", "1", "--retrained", str(other))
    assert repeats() == [{**one, "retrained": str(other)} for one in before]
    assert {one["retrained"] for one in before} == {str(other_folder)}
    # Without one named, the run's own is meant.
    relearn(run, "--subset", "random", "--repeats", "1")
    assert repeats() == before


def test_what_is_measured_is_kept_where_the_control_fails(run: Path, other_folder: Path, tmp_path: Path, capsys: Any):
    """One that is not there stops the attack before it begins; one that breaks later leaves the run's own curve."""
    options = ["relearn", str(run), "--subset", "shortest", "--epochs", "1", "--lr", "3e-3", "--retrained"]
    with pytest.raises(SystemExit):
        main([*options, str(tmp_path / "gone")])
    assert f"--retrained: folder {tmp_path / 'gone'} does not exist" in capsys.readouterr().err
    broken, key = tmp_path / "broken", "shortest share=0.2 epochs=1 lr=0.003"
    assert key not in results(run).get("relearn", {})
    shutil.copytree(other_folder, broken)
    (broken / "model.safetensors").write_text("")
    with pytest.raises(SystemExit):
        main([*options, str(broken)])
    assert f"--retrained: the model in {broken} cannot be loaded" in capsys.readouterr().err
    (kept,) = results(run)["relearn"][key]["repeats"]
    assert kept.keys() == {"seed", "rows", "epochs"}
    main([*options, str(other_folder)])
    (whole,) = results(run)["relearn"][key]["repeats"]
    assert {name: whole[name] for name in kept} == kept
    assert whole["control"]


def test_rows_that_were_never_to_be_forgotten(run: Path, tmp_path: Path):
    """As many retain rows, or blocks of text, and so equally many steps; no forget row is relearned."""
    text = tmp_path / "text.txt"
    text.write_text("Rivers flow down to the sea.\n\nSnow melts in spring, and the fields turn green.")
    relearn(run, "--subset", "shortest", "retain", "--text", str(text), "--repeats", "1")
    found = results(run)["relearn"]
    curves = [found[f"{kind} {KEY}"]["repeats"][0] for kind in ("shortest", "retain", f"text {text}")]
    assert found[f"text {text} {KEY}"]["settings"]["text"] == str(text)
    for curve in curves:
        assert len(curve["rows"]) == 3
        assert [epoch["step"] for epoch in curve["epochs"]] == [0, 1, 2]
    for curve in curves[1:]:
        for epoch in curve["epochs"]:
            assert SHOWN not in epoch["metrics"]
            assert epoch["metrics"][OTHERS] == pytest.approx(epoch["metrics"]["forget/probability"], rel=1e-5)
    ends = [curve["epochs"][2]["metrics"]["forget/probability"] for curve in curves]
    assert ends[0] > max(ends[1:])


def test_a_run_that_unlearned_some_of_the_rows(run_options: list[str], tmp_path: Path):
    """Rows 1, 4, 6 and 8 of ten: half of them are relearned, the others are the other half; these four are sampled."""
    rows, folder = [1, 4, 6, 8], tmp_path / "run"
    options = ["--data.forget_rows", str(rows), "--trainer.max_epochs", "1", "--run_dir", str(folder), "--debug"]
    main(["fit", *run_options, *options])
    assert "all forget rows were measured; rows to be forgotten: 4" in results(folder)["verdict"]["reasons"]
    main(["relearn", str(folder), "--share", "0.5", "--epochs", "1", "--subset", "random", "--debug"])
    (attack,) = results(folder)["relearn"].values()
    relearned, before = attack["repeats"][0]["rows"], attack["repeats"][0]["epochs"][0]["metrics"]
    others = set(rows) - set(relearned)
    assert len(others) == len(relearned) == 2
    scored = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for part, name in ((relearned, SHOWN), (others, OTHERS)):
        values = [row["probability"] for row in scored if row["split"] == "forget" and row["index"] in part]
        assert before[name] == pytest.approx(sum(values) / 2, rel=1e-5)
    main(["leak", str(folder), "--k", "2", "--debug"])
    (sampled,) = results(folder)["leak"].values()
    assert sampled["n"] == 4
    drawn = [json.loads(line) for line in next(folder.glob("leak_*.jsonl")).read_text().splitlines()]
    assert [(row["index"], row["answer"]) for row in drawn[:4]] == [
        (row["index"], row["answer"]) for row in scored if row["split"] == "forget" and row["index"] in rows
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", "0"), "--share: must be above 0 and at most 1, got 0"),
        (("--epochs", "0"), "--epochs: must be at least 1, got 0"),
        (("--repeats", "-1"), "--repeats: must be at least 1, got -1"),
        (("--lr", "nan"), "--lr: must be above 0, got nan"),
        (("--seed", "-1"), "--seed: must be at least 0, got -1"),
        (("--subset", "longest"), "invalid choice: 'longest'"),
        ((), "holds no results.json; give folders that fit or test wrote, or, for another model, the config"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["relearn", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_that_cannot_be_attacked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for finished, message in ((False, "holds an unfinished run; resume it: --run_dir"), (True, "holds no model/")):
        (tmp_path / "results.json").write_text(json.dumps({**results(run), "finished": finished}))
        with pytest.raises(SystemExit):
            main(["relearn", str(tmp_path)])
        assert message in capsys.readouterr().err
