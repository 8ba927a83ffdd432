"""Logs of retrained models in three formats, the check that rows match, and the export."""

import gzip
import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers import match_rows
from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.export import open_unlearning_log
from simnpo_pl.metrics.logs import parse_rows, read_retain_log
from simnpo_pl.metrics.membership import ATTACKS
from simnpo_pl.runs.record import geometric_ratio
from simnpo_pl.utils.errors import UserError

SHARED = os.environ.get("SIMNPO_PL_SHARED")
needs_goldens = pytest.mark.skipif(not SHARED, reason="SIMNPO_PL_SHARED names no folder with golden values")

QUESTIONS = ["Who wrote it?", "Where, and when ?", "Why\u2028so?"]
ANSWERS = ["Ann Bee.", "In Rome , in 1901.", "Nobody knows."]
PARAPHRASE = [1.0, 2.0, 0.5]
PERTURBED = [[1.0, 3.0], [2.0, 2.0], [0.25, 0.25]]
# R = exp(paraphrase - mean of perturbed)
RATIOS = [math.exp(-1), 1.0, math.exp(0.25)]


def our_rows(**extra) -> list[dict]:
    rows = [
        {"split": "forget", "index": i, "question": QUESTIONS[i], "answer": ANSWERS[i], "answer_nll": 0.1 * i,
         "paraphrase_nll": PARAPHRASE[i], "perturbed_nll": PERTURBED[i], **extra}
        for i in (2, 0, 1)
    ]  # fmt: skip
    return [{"split": "retain", "index": 0, "answer_nll": 1.0}, *rows]


def write_rows(folder: Path, rows: list[dict]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return folder


def open_unlearning(score: float = 9.0, name: str = "forget_Truth_Ratio") -> dict:
    by_index = {"value_by_index": {str(i): {"score": score} for i in range(3)}, "agg_value": 0.5}
    return {
        name: by_index,
        "forget_Q_A_PARA_Prob": {"value_by_index": {str(i): {"avg_loss": v} for i, v in enumerate(PARAPHRASE)}},
        "forget_Q_A_PERT_Prob": {"value_by_index": {str(i): {"avg_loss": v} for i, v in enumerate(PERTURBED)}},
        "forget_Q_A_ROUGE": {"value_by_index": {"1": {"ground_truth": "In Rome, in 1901.", "rougeL_recall": 1.0}}},
        "privleak": {"agg_value": None},
    }


def original() -> dict:
    texts = {str(i): [f"[INST] {QUESTIONS[i]} [/INST]", "generated", ANSWERS[i]] for i in range(2)}
    part = {
        "avg_paraphrased_loss": dict(enumerate(PARAPHRASE)),
        "average_perturb_loss": dict(enumerate(PERTURBED)),
    }
    return {"eval_log_forget.json": {**part, "generated_text": texts}}


def check(log) -> None:
    assert match_rows(log, QUESTIONS, ANSWERS, "forget10").tolist() == pytest.approx(RATIOS)


def held(log, key: str, part: str = "forget") -> dict[int, str]:
    return {i: row[key] for i, row in log.splits[part].items() if key in row}


def test_our_format(tmp_path):
    folder = write_rows(tmp_path, our_rows(forget_split="forget10"))
    for path in (folder, folder / "rows.jsonl"):
        log = read_retain_log(path)
        check(log)
        assert held(log, "forget_split") == dict.fromkeys(range(3), "forget10")
        assert (log.splits["forget"][1]["answer"], log.splits["forget"][2]["question"]) == (ANSWERS[1], QUESTIONS[2])


def test_ratios_serve_where_losses_are_missing(tmp_path):
    """As a run keeps them of a retrained model whose log held no losses."""
    rows = [{"split": "forget", "index": i, "truth_ratio": RATIOS[i]} for i in (1, 0, 2)]
    log = read_retain_log(write_rows(tmp_path, rows))
    assert match_rows(log, QUESTIONS, ANSWERS, "forget10").tolist() == RATIOS


@pytest.mark.parametrize("name", ["forget_Truth_Ratio", "forget_truth_ratio"])
@pytest.mark.parametrize("nested", [True, False])
def test_open_unlearning_format(tmp_path, name, nested):
    content = open_unlearning(name=name)
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps({"metrics": content} if nested else content))
    log = read_retain_log(tmp_path)
    check(log)
    assert held(log, "answer") == {1: "In Rome, in 1901."}


def test_open_unlearning_scores_serve_where_losses_are_missing(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps({"forget_truth_ratio": open_unlearning(0.25)["forget_Truth_Ratio"]}))
    assert held(read_retain_log(tmp_path / "log.json"), "truth_ratio") == {0: 0.25, 1: 0.25, 2: 0.25}


def test_open_unlearning_logs_with_one_wrong_answer(tmp_path):
    """Their losses are numbers, not lists: R = exp(paraphrase - perturbed)."""
    content = open_unlearning()
    for row in content["forget_Q_A_PERT_Prob"]["value_by_index"].values():
        row["avg_loss"] = row["avg_loss"][0]
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(content))
    found = match_rows(read_retain_log(tmp_path), QUESTIONS, ANSWERS, "forget10").tolist()
    assert found == pytest.approx([1.0, 1.0, math.exp(0.25)])


@pytest.mark.parametrize("plain", [False, True])
def test_open_unlearning_logs_of_muse(tmp_path, plain):
    """PrivLeak's input alone; forget 1, 2 against holdout 2, 3: 3.5 of four pairs."""
    scores = {"forget": [1.0, 2.0], "holdout": [2.0, 3.0]}
    values = {k: v if plain else {str(i): {"score": x} for i, x in enumerate(v)} for k, v in scores.items()}
    attack = {name: {"agg_value": 1.0, "value_by_index": value} for name, value in values.items()}
    content = {"forget_knowmem_ROUGE": {"agg_value": 0.5, "value_by_index": {"0": {"rougeL_f1": 0.5}}}}
    content |= {"mia_min_k": {**attack, "auc": 0.875, "agg_value": 0.875}, "privleak": {"agg_value": -75.0}}
    (tmp_path / "MUSE_EVAL.json").write_text(json.dumps(content))
    log = read_retain_log(tmp_path)
    assert (log.kind, log.auc) == ("open-unlearning", 0.875)
    assert {name: held(log, "mia_min_k", name) for name in scores} == {k: dict(enumerate(v)) for k, v in scores.items()}
    assert log.auc == parse_rows("", log.rows()).auc


@pytest.mark.parametrize("whole", [True, False])
def test_original_format(tmp_path, whole):
    content = original() if whole else original()["eval_log_forget.json"]
    (tmp_path / "log.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    log = read_retain_log(tmp_path / "log.json.gz")
    check(log)
    assert held(log, "answer") == {0: ANSWERS[0], 1: ANSWERS[1]}


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"got no file at .*rows.jsonl: score the retrained model first"):
        read_retain_log(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": {"agg_value": 1}}', "[1]", '{"split": "retain", "index": 0}', "3",
     '{"avg_paraphrased_loss": {"0": 1.0}, "average_perturb_loss": {}}',
     '{"avg_paraphrased_loss": {"0": null}, "average_perturb_loss": {"0": [1.0]}}'],
)  # fmt: skip
def test_unreadable_content(tmp_path, text):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(UserError, match=r"expected the content of rows.jsonl or .* got .*log.json") as error:
        read_retain_log(tmp_path / "log.json")
    assert "\n" not in str(error.value)


def test_a_row_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="occurs twice"):
        read_retain_log(write_rows(tmp_path, our_rows() * 2))


def test_mismatches_are_refused(tmp_path):
    log = read_retain_log(write_rows(tmp_path, our_rows(forget_split="forget10")))
    with pytest.raises(UserError, match=r"expected the split forget05, got forget10: score .* on all of forget05"):
        match_rows(log, QUESTIONS, ANSWERS, "forget05")
    with pytest.raises(UserError, match=r"the 4 rows of forget10, got 3, row 3 is missing from the log"):
        match_rows(log, [*QUESTIONS, "More?"], [*ANSWERS, "No."], "forget10")
    with pytest.raises(UserError, match=r"the 1 rows of forget10, got 3, row 1 is only in the log"):
        match_rows(log, QUESTIONS[:1], ANSWERS[:1], "forget10")
    with pytest.raises(UserError, match=r"the question 'Who\?' at row 1 of forget10, got 'Where, and when \?'"):
        match_rows(log, [QUESTIONS[0], "Who?", QUESTIONS[2]], ANSWERS, "forget10")
    with pytest.raises(UserError, match=r"the answer 'Nobody.' at row 2 of forget10, got 'Nobody knows.'"):
        match_rows(log, QUESTIONS, [*ANSWERS[:2], "Nobody."], "forget10")
    shifted = our_rows()
    shifted[1]["index"] = 5
    with pytest.raises(UserError, match=r"the 3 rows of forget10, got 3, row 2 is missing from the log"):
        match_rows(read_retain_log(write_rows(tmp_path, shifted)), QUESTIONS, ANSWERS, "forget10")


def test_other_tokens_are_refused_and_missing_digests_are_told(tmp_path, recwarn):
    """Digests say of two logs with the same texts whether template, truncation and tokenizer were the same."""
    log = read_retain_log(write_rows(tmp_path, our_rows(tokens="a")))
    assert not recwarn.list
    assert log.about()["tokens_compared"]
    assert match_rows(log, QUESTIONS, ANSWERS, "forget10", tokens="a").tolist() == pytest.approx(RATIOS)
    with pytest.raises(UserError, match="got others at row 0 of forget10, made with another prompt template, trunc"):
        match_rows(log, QUESTIONS, ANSWERS, "forget10", tokens="b")
    with pytest.warns(UserWarning, match=r"\(simnpo_pl\) holds no digests .* by number, question, answer only"):
        log = read_retain_log(write_rows(tmp_path, our_rows()))
    assert log.about() == {
        "source": str(tmp_path / "rows.jsonl"), "kind": "simnpo_pl", "rows": {"forget": 3, "holdout": 0},
        "tokens_compared": False,
    }  # fmt: skip


def record(folder: Path, objective: str | None, model: str = "start") -> Path:
    """What a run leaves of which model it measured."""
    folder.mkdir()
    content = {"versions": {}, "settings": {"model": {"name": model}}}
    content |= {"objective": {"name": objective}} if objective else {}
    (folder / "results.json").write_text(json.dumps(content))
    return write_rows(folder, our_rows(tokens="a"))


@pytest.mark.parametrize("file", ["", "rows.jsonl", "start_rows.jsonl"])
def test_an_unlearned_model_is_no_retrained_one(tmp_path, file):
    """Neither by its own run nor by an evaluation of its model; the run's own retrained model takes its place."""
    unlearned = record(tmp_path / "unlearned", "SimNPO")
    measured = record(tmp_path / "measured", None, str(unlearned / "model"))
    for run in (unlearned, measured):
        with pytest.raises(UserError, match=f"the model it is of was unlearned in {unlearned}: pass the log"):
            read_retain_log(run / file)
        rows = [{"split": "forget", "index": i, "truth_ratio": 0.5, "tokens": "a"} for i in range(3)]
        (run / "retrained_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.warns(UserWarning, match="the rows of the retrained model it was compared with are read"):
            log = read_retain_log(run / file)
        assert held(log, "truth_ratio") == dict.fromkeys(range(3), 0.5)


def test_a_fine_tuned_model_may_be_a_retrained_one(tmp_path, recwarn):
    tuned = record(tmp_path / "tuned", "FineTune")
    for run in (tuned, record(tmp_path / "measured", None, str(tuned / "model"))):
        assert match_rows(read_retain_log(run), QUESTIONS, ANSWERS, "forget10", "a").tolist() == pytest.approx(RATIOS)
    assert not recwarn.list


def test_export_round_trip(tmp_path):
    rows = our_rows(rougeL_recall=0.5, generation="It is.", exact_memorization=0.25, extraction_strength=0.0)
    log = open_unlearning_log(rows, {"forget_quality": 0.5, "model_utility": 0.25})
    assert sorted(log) == [
        "exact_memorization", "extraction_strength", "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob",
        "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "forget_truth_ratio", "model_utility",
        "retain_Q_A_Prob",
    ]  # fmt: skip
    assert list(log["forget_Q_A_Prob"]["value_by_index"]) == ["0", "1", "2"]
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(log))
    read = read_retain_log(tmp_path / "TOFU_EVAL.json")
    check(read)
    assert read.metrics == pytest.approx(
        {
            "forget/probability": (1 + math.exp(-0.1) + math.exp(-0.2)) / 3,
            "forget/rouge": 0.5,
            "forget/truth_ratio": (math.exp(-1) + 1 + math.exp(-0.25)) / 3,
        }
    )
    assert held(read, "answer") == dict(enumerate(ANSWERS))
    assert held(read, "question") == dict(enumerate(QUESTIONS))


@pytest.mark.parametrize("convention", ["arithmetic", "prob_mean"])
def test_a_model_beside_itself(cli, other_folder, tmp_path, convention):
    """Whether it is evaluated or read from a log, and whatever the run's convention: one truth ratio, p = 1, no gap."""
    from simnpo_pl.report import figures
    from simnpo_pl.runs.record import read_runs
    from simnpo_pl.studies.weights import qualities

    beside = {"evaluated": "--eval.retrained", "read": "--eval.retain_log"}
    sources = {"evaluated": str(other_folder), "read": str(tmp_path / "evaluated")}
    for name, option in beside.items():
        options = ["--model.name", str(other_folder), "--eval.truth_ratio", convention, option, sources[name]]
        cli("test", *options, "--run_dir", str(tmp_path / name))
        (run,) = read_runs([tmp_path / name])
        final, ratio = run.metrics("final"), "forget/truth_ratio"
        assert run.metrics("retrained")[ratio] == pytest.approx(final[ratio], rel=1e-6)
        (half,) = qualities(run.rows, run.retrained_rows, {"strong": range(5)})
        assert half.quality.p_value == final["forget_quality"] == 1
        _, low, high = figures.largest_gap(*map(figures._ratios, (run.rows, run.retrained_rows)))
        assert low == high
    # Its rows hold geometric ratios and no losses.
    cli("test", *options[:-1], str(tmp_path / "read" / "retrained_rows.jsonl"), "--run_dir", str(tmp_path / "again"))
    (run,) = read_runs([tmp_path / "again"])
    assert run.metrics("final")["forget_quality"] == 1
    assert "forget/truth_ratio" not in run.metrics("retrained")


def test_a_null_loss_has_no_ratio():
    assert geometric_ratio({"paraphrase_nll": 1.0, "perturbed_nll": [2.0, 4.0], "truth_ratio": 9}) == math.exp(-2)
    losses = torch.tensor([1.7, 0.3, 2.9, 1.1], dtype=torch.float64)
    torched = F.truth_ratio(losses[:1], losses[None, 1:]).item()
    assert geometric_ratio({"answer_nll": 1.7, "perturbed_nll": [0.3, 2.9, 1.1]}) == pytest.approx(torched, rel=1e-12)
    assert geometric_ratio({"paraphrase_nll": None, "perturbed_nll": [2.0], "truth_ratio": 0.0}) is None
    assert geometric_ratio({"answer_nll": 1.0, "truth_ratio": None}) is geometric_ratio({"answer_nll": 1.0}) is None


def test_an_auc_alone_is_handed_over(tmp_path):
    """A run keeps the log as rows, which attacks on the run compare with."""
    (tmp_path / "MUSE_EVAL.json").write_text(json.dumps({"mia_min_k": {"agg_value": 0.4, "auc": 0.4}}))
    log = read_retain_log(tmp_path)
    kept = read_retain_log(write_rows(tmp_path, log.rows()))
    assert (log.auc, kept.auc) == (0.4, 0.4)
    assert kept.rows() == log.rows()
    assert kept.about()["rows"] == {"forget": 0, "holdout": 0}


def test_a_retrained_model_with_nothing_to_compare(cli, other_folder, tmp_path):
    """Of other splits alone it is shown beside the model all the same."""
    options = ("--eval.retrained", str(other_folder), "--eval.splits", "[retain]")
    cli("test", *options, "--run_dir", str(tmp_path / "run"))
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["retrained"]["metrics"].keys() >= {"retain/probability", "retain/rouge"}
    with pytest.raises(UserError, match="no truth ratio of a forget row and no Min-K% scores"):
        read_retain_log(tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [{"forget_eval_split": "forget10_perturbed[:5]"},
     {"forget_split": "forget10[:5]", "retain_split": "retain90", "forget_eval_split": "forget10_perturbed[:5]"}],
)  # fmt: skip
def test_a_published_log_of_other_rows_is_left_out(options, data_folder, model_folder, tmp_path, monkeypatch):
    """The user never named it; one that the user names has to fit."""
    from simnpo_pl.benchmarks import TofuData, tofu
    from simnpo_pl.evaluation.options import EvalOptions

    questions = [json.loads(line) for line in (data_folder / "forget10.json").read_text().splitlines()]
    rows = [
        {"split": "forget", "index": i, "question": q["question"], "truth_ratio": 0.5} for i, q in enumerate(questions)
    ]
    file = write_rows(tmp_path, rows) / "rows.jsonl"
    monkeypatch.setattr(tofu, "hub_file", lambda path: file)
    options |= {"path": str(data_folder), "tokenizer": str(model_folder), "max_length": 256}
    data = TofuData(model="open-unlearning/tofu_tiny_full", **options)
    assert data.evaluation().unavailable["forget_quality"].startswith("no retrained model to compare with; give")
    assert data.find_retain_log() is None
    with pytest.raises(UserError, match="expected the 5 rows of forget10"):
        TofuData(model=str(model_folder), eval=EvalOptions(retain_log=str(file)), **options).evaluation()


def test_a_published_log_of_other_holdout_rows_tells_forget_quality(data_folder, model_folder, tmp_path, monkeypatch):
    from simnpo_pl.benchmarks import TofuData, tofu
    from simnpo_pl.evaluation.options import EvalOptions

    questions = [json.loads(line)["question"] for line in (data_folder / "forget10.json").read_text().splitlines()]
    scores = {"mia_min_k": 1.0, "truth_ratio": 0.5}
    rows = [{"split": "forget", "index": i, "question": text, **scores} for i, text in enumerate(questions)]
    rows += [{"split": "holdout", "index": i, "mia_min_k": 2.0} for i in range(3)]
    file = write_rows(tmp_path, rows) / "rows.jsonl"
    monkeypatch.setattr(tofu, "hub_file", lambda path: file)
    holdout = tmp_path / "holdout.jsonl"
    holdout.write_text("".join(json.dumps({"question": f"{i}?", "answer": "An answer."}) + "\n" for i in range(2)))
    options = {"path": str(data_folder), "tokenizer": str(model_folder), "holdout": str(holdout), "max_length": 256}
    evaluation = TofuData(model="open-unlearning/tofu_tiny_full", **options).evaluation()
    assert {"forget_quality", "mia_min_k"} <= set(evaluation.names())
    said = (
        "expected the 2 rows of holdout, got 3, row 2 is only in the log: score the retrained model on all of holdout"
    )
    assert said in evaluation.unavailable["privleak"]
    with pytest.raises(UserError, match=said):
        TofuData(model=str(model_folder), eval=EvalOptions(retain_log=str(file)), **options).evaluation()


# Golden values of a small model, scored by the public code.


@cache
def golden(model: str) -> dict:
    return json.loads((Path(SHARED or ".") / "goldens" / "A" / f"metrics_{model}.json").read_text())


def column(name: str, key: str, model: str = "policy") -> torch.Tensor:
    by_index = golden(model)["metrics"][name]["value_by_index"]
    return torch.tensor([by_index[str(i)][key] for i in range(len(by_index))], dtype=torch.float64)


@needs_goldens
@pytest.mark.parametrize("model", ["policy", "target"])
def test_golden_forget_quality(model):
    folder = Path(SHARED or ".")
    lines = (folder / "tofu" / "forget10_perturbed.json").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    questions, answers = [text["question"] for text in texts], [text["answer"] for text in texts]
    unlearned, retrained = (
        match_rows(read_retain_log(folder / "goldens" / "A" / f"metrics_{name}.json"), questions, answers, "forget10")
        for name in (model, "retain")
    )
    result = F.forget_quality(unlearned, retrained)
    stored = golden(model)["forget_quality_ks"]
    assert result.p_value == pytest.approx(stored["pvalue"], rel=1e-9)
    assert result.ks_statistic == pytest.approx(stored["statistic"], abs=1e-12)
    assert [result.n, result.m] == stored["n"]


@needs_goldens
def test_golden_aggregates():
    """From the stored per-row values; the public code offsets a ratio's inverse by 1e-10, hence 1e-9."""
    stored = golden("policy")["agg"]
    values = {}
    for prefix in ("forget", "retain", "ra", "wf"):
        probability = F.answer_probability(column(f"{prefix}_Q_A_Prob", "avg_loss"))
        values[f"{prefix}_Q_A_Prob"] = probability.mean().item()
        values[f"{prefix}_Q_A_PERT_Prob"] = column(f"{prefix}_Q_A_PERT_Prob", "avg_loss").neg().exp().mean().item()
        values[f"{prefix}_Q_A_ROUGE"] = column(f"{prefix}_Q_A_ROUGE", "rougeL_recall").mean().item()
        name = "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio"
        aggregate = F.forget_truth_ratio if prefix == "forget" else F.utility_truth_ratio
        values[name] = aggregate(column(name, "score"))
    for prefix in ("ra", "wf"):
        true, wrong = (column(f"{prefix}_Q_A_{name}Prob", "avg_loss") for name in ("", "PERT_"))
        values[f"{prefix}_Q_A_Prob_normalised"] = F.choice_probability(true, wrong).mean().item()
    parts = [f"{prefix}_{name}" for prefix in ("retain", "ra", "wf") for name in ("Q_A_ROUGE", "Truth_Ratio")]
    parts += ["retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"]
    values["model_utility"] = F.model_utility({part: values[part] for part in parts})
    # The public code sums probabilities in float32.
    loose = {name: stored[name] for name in values if "Prob" in name}
    assert {name: values[name] for name in loose} == pytest.approx(loose, rel=1e-6)
    tight = {name: stored[name] for name in values if "Prob" not in name}
    assert {name: values[name] for name in tight} == pytest.approx(tight, abs=1e-9)


@needs_goldens
@pytest.mark.parametrize("prefix", ["forget", "retain", "ra", "wf"])
def test_golden_truth_ratio_conventions(prefix):
    right = column(f"{prefix}_Q_A_{'PARA_' if prefix in ('forget', 'retain') else ''}Prob", "avg_loss")
    wrong = column(f"{prefix}_Q_A_PERT_Prob", "avg_loss")
    stored = golden("policy")["truth_ratio_variants"][prefix]
    aggregate = F.forget_truth_ratio if prefix == "forget" else F.utility_truth_ratio
    assert F.truth_ratio(right, wrong, "prob_mean").mean().item() == pytest.approx(stored["prob_mean"], abs=1e-6)
    for kind, name in (("arithmetic", "locuslab_utils_arith"), ("geometric", "locuslab_aggregate_geom")):
        assert aggregate(F.truth_ratio(right, wrong, kind)) == pytest.approx(stored[name], abs=1e-8)


@needs_goldens
def test_golden_export():
    """Rows rebuilt from the public log and exported again give its entries and aggregates."""
    metrics, rows = golden("policy")["metrics"], []
    for split, prefix in (
        ("forget", "forget"),
        ("retain", "retain"),
        ("real_authors", "ra"),
        ("world_facts", "wf"),
    ):
        for i, entry in metrics[f"{prefix}_Q_A_Prob"]["value_by_index"].items():
            row = {"split": split, "index": int(i), "answer_nll": entry["avg_loss"]}
            row["perturbed_nll"] = metrics[f"{prefix}_Q_A_PERT_Prob"]["value_by_index"][i]["avg_loss"]
            if prefix in ("forget", "retain"):
                row["paraphrase_nll"] = metrics[f"{prefix}_Q_A_PARA_Prob"]["value_by_index"][i]["avg_loss"]
            text = dict(metrics[f"{prefix}_Q_A_ROUGE"]["value_by_index"].get(i, {}))
            if text:
                row |= {"answer": text.pop("ground_truth"), **text}
            if split == "forget":
                for name in ("exact_memorization", "extraction_strength"):
                    row[name] = metrics[name]["value_by_index"][i]["score"]
            for name in ATTACKS if split == "forget" else ():
                row[name] = metrics[name]["forget"]["value_by_index"][int(i)]
            rows.append(row)
    for i in range(400):
        scores = {name: metrics[name]["holdout"]["value_by_index"][i] for name in ATTACKS}
        rows.append({"split": "holdout", "index": i, **scores})
    log = open_unlearning_log(
        rows, {k: metrics[k]["agg_value"] for k in ("forget_quality", "model_utility", *ATTACKS, "privleak")}
    )
    assert set(log) == set(metrics)
    for name in ATTACKS:
        assert log[name].keys() == metrics[name].keys()
        assert log[name]["auc"] == metrics[name]["auc"]
        for split in ("forget", "holdout"):
            held, stored = log[name][split], metrics[name][split]
            # The public code averages some of these in float32.
            assert held["agg_value"] == pytest.approx(stored["agg_value"], rel=1e-6)
            assert [held["value_by_index"][str(i)]["score"] for i in range(400)] == stored["value_by_index"]
    for name in metrics:
        assert log[name]["agg_value"] == pytest.approx(metrics[name]["agg_value"], rel=2e-6), name
        for i, entry in metrics[name].get("value_by_index", {}).items():
            for key, value in entry.items():
                held = log[name]["value_by_index"][i][key]
                # R is divided by P + 1e-10 there, which shows where P is about 1e-5.
                assert held == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), (
                    name,
                    i,
                    key,
                )


@needs_goldens
def test_golden_rouge():
    """Of rows in ASCII: the public code drops all other letters and splits words at them."""
    seen = 0
    for prefix in ("forget", "ra"):
        for row in golden("target")["metrics"][f"{prefix}_Q_A_ROUGE"]["value_by_index"].values():
            if row["generation"].isascii() and row["ground_truth"].isascii():
                scores = F.rouge_l(row["generation"], row["ground_truth"])
                assert scores == pytest.approx({key: row[key] for key in scores}, abs=1e-12)
                seen += 1
    assert seen > 150
