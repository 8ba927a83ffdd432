"""The analysis of reference-model bias: numbers by hand, runs on the tiny model."""

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simnpo_pl.__main__ import main
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.runs.record import Run
from simnpo_pl.studies import launch, weights
from simnpo_pl.studies.weights import by_length, by_order, qualities
from simnpo_pl.utils.errors import UserError


def run_of(folder: Path, weights: list[dict[str, Any]], **rows: list[dict[str, Any]]) -> Run:
    """A run folder with these rows."""
    files = {"weights": weights, **rows}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run("run", folder, {})


def weight_row(index: int, length: int, weight: float, logp: float = -1.0, epoch: int = 1, step: int = 1):
    return {
        **{"index": index, "epoch": epoch, "step": step, "weight": weight, "length": length, "logp": logp},
        "probability": math.exp(logp / length),
    }


# -- numbers -------------------------------------------------------------------------------------------------


def test_pearson():
    """x 0, 1, 2 and y 0, 1, 0 about their means: covariance 0. x 1, 2, 3 and y 1, 3, 2: 1 / sqrt(2 * 2)."""
    assert weights.pearson([0, 1, 2], [0, 1, 0])[0] == pytest.approx(0, abs=1e-12)
    assert weights.pearson([1, 2, 3], [1, 3, 2])[0] == pytest.approx(0.5)
    assert math.isnan(weights.pearson([7, 7, 7], [1, 2, 3])[0])
    assert math.isnan(weights.pearson([1, 2], [1, 2])[0])


def test_summary_of_an_epoch(tmp_path: Path):
    """Weights 1, 3, 2 at lengths 1, 2, 3; the epoch after has none of the rows asked for."""
    rows = [weight_row(i, n, w) for i, (n, w) in enumerate([(1, 1.0), (2, 3.0), (3, 2.0)])]
    run = run_of(tmp_path, [*rows, weight_row(0, 1, 0.5, epoch=2)])
    assert list(weights.chosen_epochs(run, [1, 7])) == [1]
    assert list(weights.chosen_epochs(run, [9])) == [2]
    (line,) = weights.table([run], [1, 7]).splitlines()[2:]
    # p is 2/3: Student's t of 1 / sqrt(3) with one degree of freedom.
    assert line.startswith("| run | 1 | 3 | 2 (1 to 3) | 0.50 (p 0.667) | ")
    assert line.endswith(" | - |")


def test_no_weights(tmp_path: Path):
    with pytest.raises(UserError, match="holds no gradient weights; give a run of fit whose objective reads whole"):
        weights.chosen_epochs(run_of(tmp_path, []), [1])


def start_row(index: int, nll: float | None, split: str = "forget") -> dict[str, Any]:
    return {"split": split, "index": index, "answer_nll": nll}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ([start_row(0, 0.5), start_row(1, 0.75), start_row(0, 9.0, "retain")], {0: 0.5, 1: 0.75}),
        ([start_row(0, 0.9), start_row(1, 0.75)], None),  # step 1 saw 0.5: another model or other rows
        ([start_row(0, 0.5)], None),
        ([start_row(0, 0.5), start_row(1, None)], None),
        ([], None),
    ],
)
def test_difficulty_is_the_start_models_loss(
    start: list[dict[str, Any]], expected: dict[int, float] | None, tmp_path: Path
):
    """Row 0 is in the first step, with loss 1 / 2; row 1 in the second, where the policy has moved already."""
    run = run_of(tmp_path, [weight_row(0, 2, 1.0), weight_row(1, 2, 1.0, logp=-3.0, step=2)], start_rows=start)
    assert weights.difficulty(run) == expected


def test_halves_by_length(tmp_path: Path):
    """Lengths 5, 3, 5, 9, 4: two shortest are rows 1 and 4; of five rows the longer half has three."""
    run = run_of(tmp_path, [weight_row(i, n, 1.0) for i, n in enumerate([5, 3, 5, 9, 4])])
    assert by_length(run) == {"shortest": [1, 4], "longest": [0, 2, 3]}
    assert by_order(5) == {"strong": [0, 1], "weak": [2, 3, 4]}


def evaluated(ratios: list[float | None], nll: float = 0.0) -> list[dict[str, Any]]:
    return [{"split": "forget", "index": i, "truth_ratio": r, "answer_nll": nll} for i, r in enumerate(ratios)]


def test_quality_of_halves():
    """Two rows against two: where one sample lies above the other p is 2 / C(4, 2) = 1/3, where they agree 1.

    A loss of log 2 is a probability of 1/2.
    """
    ours, retrained = evaluated([1.0, 2.0, 5.0, 6.0], math.log(2)), evaluated([3.0, 4.0, 5.0, 6.0])
    first, second = qualities(ours, retrained, by_order(4))
    assert (first.name, first.unlearned, first.retrained) == ("strong", [1.0, 2.0], [3.0, 4.0])
    assert (first.quality.p_value, first.quality.ks_statistic) == (pytest.approx(1 / 3), 1.0)
    assert (second.quality.p_value, second.quality.n) == (1.0, 2)
    assert second.probability == pytest.approx(0.5)


def test_halves_need_truth_ratios():
    with pytest.raises(UserError, match="the retrained model has no truth ratio of forget row 1; evaluate the rows"):
        qualities(evaluated([1.0, 2.0]), evaluated([1.0, None]), by_order(2))


# -- perturbed references --------------------------------------------------------------------------------------


def parameters(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_causal_lm(str(folder)).parameters()])


def test_perturb_averages_with_a_random_model(model_folder: Path, other_folder: Path, tmp_path: Path):
    """Share 1 does not depend on the model's weights, and share 1/4 is three parts of the model to one of it."""

    def perturbed(model: Path, *options: str) -> torch.Tensor:
        out = tmp_path / f"{model.name}{'-'.join(options)}"
        main(["perturb", str(model), "--out", str(out), *options, "--debug"])
        return parameters(out)

    random = perturbed(model_folder, "--share", "1")
    assert torch.equal(random, perturbed(other_folder, "--share", "1"))
    assert not torch.equal(random, perturbed(model_folder, "--share", "1", "--seed", "5"))
    own = parameters(model_folder)
    torch.testing.assert_close(perturbed(model_folder, "--share", "0.25"), 0.75 * own + 0.25 * random)
    assert torch.equal(perturbed(model_folder, "--share", "0"), own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "1.5", "--out", "new"], "--share: must be at least 0 and at most 1, got 1.5"),
        (["--out", "."], "--out: . exists already; give another folder"),
    ],
)
def test_perturb_refuses(options: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["perturb", str(model_folder), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# -- runs of the analysis ------------------------------------------------------------------------------------------


def test_perturbed_reference_and_halves(
    run_options: list[str],
    model_folder: Path,
    other_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A sweep makes a perturbed reference, which a run uses; `weights` reads the runs."""

    def start(command: list[str], log: Path) -> int:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        main([*command[3:], "--debug"])
        return 0

    # Runs are made in this process, since starting one takes longer than they do.
    monkeypatch.setattr(launch, "start", start)
    quick = ["--trainer.max_epochs", "2", "--eval.max_new_tokens", "2", "--eval.retrained", str(other_folder)]
    npo = "--model.objective NPO"
    sweep = {
        **{"title": "Halves", "folder": str(tmp_path / "runs"), "table": "halves"},
        "models": {"perturbed": f"perturb {model_folder} --share 0.25 --seed 1"},
        "fit": shlex.join([*run_options, *quick]),
        "methods": {"NPO": npo, "perturbed": f"{npo} --model.reference {{folder}}/models/perturbed"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    main(["sweep", str(tmp_path / "sweep.yaml"), "--debug"])
    assert "| method | FQ strongly memorized | FQ weakly memorized | MU | n | seeds |" in capsys.readouterr().out
    own, perturbed = (tmp_path / "runs" / "all" / name / "seed-0" for name in ("NPO", "perturbed"))
    record = json.loads((perturbed / "results.json").read_text())
    assert record["settings"]["model"]["reference"] == str(tmp_path / "runs" / "models" / "perturbed")
    # The policy is the start model and not the reference, so the very first weights are not 1.
    for run, is_one in ((own, True), (perturbed, False)):
        first = [json.loads(line) for line in (run / "weights.jsonl").read_text().splitlines()]
        assert all((abs(row["weight"] - 1) < 1e-4) == is_one for row in first if row["step"] == 1)
    main(["weights", str(own), str(perturbed), "--out", str(tmp_path / "figures"), "--debug"])
    shown = capsys.readouterr().out
    assert "| NPO/seed-0 | 1 | 10 | " in shown
    assert "| model | shortest half: n | forget quality" in shown
    figures = {file.name for file in (tmp_path / "figures").iterdir()}
    assert figures == {f"weights_{name}.png" for name in ("length", "knowledge", "halves")}


def test_no_figures_without_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simnpo_pl.report.drawing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"figures need matplotlib: pip install 'simnpo_pl\[report\]'"):
        main(["weights", "run", "--out", "x", "--debug"])


def test_weights_of_any_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without a retrained model there are no halves to tell apart."""
    folder = tmp_path / "one"
    folder.mkdir()
    run_of(folder, [weight_row(i, 3 + i, 1.0 - 0.1 * i) for i in range(4)])
    (folder / "results.json").write_text(json.dumps({"versions": {}}))
    main(["weights", str(folder), "--out", str(tmp_path / "figures"), "--debug"])
    assert "| one | 1 | 4 | 0.85 (0.7 to 1) | -1.00 (p " in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "figures").iterdir()} == {
        f"weights_{name}.png" for name in ("length", "knowledge")
    }
