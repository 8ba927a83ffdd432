"""Membership inference: AUC and its orientation, each attack's score by hand, goldens, several processes."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.tokenization import PromptTemplate, TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.evaluation.scoring import gradient_norms, score_rows
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.metrics.functional import lowest_share
from simnpo_pl.metrics.logs import RetainLog, parse_rows, read_retain_log
from simnpo_pl.metrics.membership import (
    ATTACKS,
    MembershipAUC,
    PrivLeak,
    ReferenceScore,
    ZlibScore,
    membership_auc,
    privleak,
)
from simnpo_pl.models import head
from simnpo_pl.models.head import Head
from simnpo_pl.models.logprobs import AnswerStates, Scorer
from simnpo_pl.utils.errors import UserError

EOS = 1


def feed(metric: Any, values: list[float], feature: str = "nll") -> None:
    metric.update(torch.arange(len(values)), torch.zeros(len(values)), {feature: torch.tensor(values)})


# -- the area and PrivLeak ---------------------------------------------------------------------------------------------

scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_auc_is_that_of_scikit_learn(forget: list[float], holdout: list[float]):
    """Holdout rows are the positive class, ties count half."""
    expected = roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout)
    assert membership_auc(torch.tensor(forget), torch.tensor(holdout)) == pytest.approx(expected, abs=1e-12)


def test_auc_orientation_and_bad_scores():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([3.0, math.inf])
    assert membership_auc(low, high) == 1.0
    assert membership_auc(high, low) == 0.0
    assert math.isnan(membership_auc(torch.tensor([0.1, math.nan]), high))
    assert math.isnan(membership_auc(torch.tensor([]), high))


def test_privleak_by_hand():
    """1 - AUC falls from 0.8 to 0.4: half is gone, -50 %; it rises from 0.5 to 1: +100 %."""
    assert privleak(0.6, 0.2) == pytest.approx(-50)
    assert privleak(0.0, 0.5) == pytest.approx(100)
    assert privleak(0.3, 0.3) == 0
    assert math.isnan(privleak(0.5, 1.0))
    assert math.isnan(privleak(math.nan, 0.5))


def test_metrics_over_two_splits():
    """Forget 1, 2 against holdout 2, 3, 4: five pairs in order, one tie, 5.5 / 6; rows are of the parts."""
    attack = MembershipAUC(RowMean("nll", 2), RowMean("nll", 4))
    metric = PrivLeak(attack, 0.5)
    one, two, three = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1, 3])
    metric.update("forget", one, two, {"nll": torch.tensor([1.0, 2.0])})
    metric.update("holdout", three, torch.zeros(3), {"nll": torch.tensor([2.0, 3.0, 4.0])})
    auc = 5.5 / 6
    assert attack.compute() == {"value": pytest.approx(auc), "n": 2, "m": 3}
    metric = pickle.loads(pickle.dumps(metric)).to("cpu")
    expected = {"value": pytest.approx((0.5 - auc) / 0.5 * 100), "n": 2, "m": 3, "retrained_auc": 0.5}
    assert metric.compute() == expected
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute()["n"] == 0


def test_zlib_of_what_is_scored(model_folder: Path):
    """Of a cut answer the loss is that of its beginning, and so is the size; whole answers and plain text stay."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    answer = "He was born in Norwood, far from the sea."
    whole = PromptTemplate(tokenizer).encode("Where?", answer)
    for lost in (0, 4):
        limit = len(whole.input_ids) - lost
        build = EvaluationBuilder(PromptTemplate(tokenizer, max_length=limit, truncate=True), EvalOptions())
        build.questions("forget", [{"question": "Where?", "answer": answer}])
        build.text("holdout", [TokenRow([5, 6], [-100, 6])], [answer], ())
        build.membership_inference()
        sizes = [build.splits[name].scores["mia_zlib"].bytes.item() for name in ("forget", "holdout")]
        # The end counts among the lost tokens.
        said = tokenizer.decode(tokenizer(f" {answer}")["input_ids"][1 : 1 - lost]).strip() if lost else answer
        assert answer.startswith(said)
        assert sizes == [len(zlib.compress(text.encode())) for text in (said, answer)]


def test_zlib_and_reference_scores():
    metric = ZlibScore(["aaaa", "ünïcode"])
    feed(metric, [3.0, 5.0])
    metric.compute()
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in ("aaaa", "ünïcode")]
    assert metric.rows == pytest.approx({0: 3 / sizes[0], 1: 5 / sizes[1]})
    metric = ReferenceScore(torch.tensor([3.0, 5.5, 1.0]))
    feed(metric, [3.0 + 1e-6, 5.0, 1.0 + 3e-5])
    metric.compute()
    # A millionth is rounding and no difference; three hundred-thousandths are one.
    assert metric.rows == {0: 0.0, 1: -0.5, 2: 3e-5}


# -- scores of tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "expected"), [(0.4, 4.5), (0.2, 5.0), (0.1, 5.0), (0.6, 4.0), (1.0, 3.0)])
def test_lowest_share(share: float, expected: float):
    """Five log-probs -1 .. -5: int(0.4 x 5) = 2 lowest are -5 and -4; never fewer than one."""
    assert lowest_share(torch.tensor([-1.0, -4.0, -2.0, -3.0, -5.0]), share) == expected
    assert math.isnan(lowest_share(torch.tensor([]), share))
    assert lowest_share(torch.tensor([-2.0]), share) == 2.0


def states_of(rows: list[list[tuple[list[float], int]]]) -> AnswerStates:
    """States whose head is the identity: each position given by the probabilities of four tokens and its label."""
    flat = [(row, probs, label) for row, positions in enumerate(rows) for probs, label in positions]
    return AnswerStates(
        hidden=torch.tensor([probs for _, probs, _ in flat]).log(),
        predictors=torch.arange(len(flat)),
        labels=torch.tensor([label for _, _, label in flat]),
        rows=torch.tensor([row for row, _, _ in flat]),
        size=len(rows),
        head=Head(nn.Identity(), 4),
    )


SHARP, LAST = [0.5, 0.0, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]


def test_min_k_scores_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Probabilities 1/2, 0, 1/4, 1/4: the log-prob has mean -1.5 ln 2 and standard deviation 0.5 ln 2.

    So token 0 (log-prob -ln 2) is one deviation above the mean, tokens 2 and 3 are one below. The EOS is sure in
    row 0, missing in row 1 and all there is in row 2. Row 3 has a token without probability.
    """
    rows = [[(SHARP, 0), (SHARP, 2), (LAST, EOS)], [(SHARP, 0), (SHARP, 0)], [(LAST, EOS)], [(SHARP, 0), (LAST, 0)]]
    states, ends, ln2 = states_of(rows), torch.tensor([1, 0, 1, 0]), math.log(2)
    wanted = {
        "min_k": torch.tensor([True, True, True, True]),
        "min_k_plus_plus": torch.tensor([True, False, True, True]),
    }
    for budget in (2**25, 8):
        monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
        found = score_rows(states, ends, 0.5, wanted)
        assert found["nll"].tolist() == pytest.approx([ln2, ln2, 0.0, math.inf])
        assert found["min_k"].tolist() == pytest.approx([2 * ln2, ln2, math.nan, math.nan], nan_ok=True)
        assert found["min_k_plus_plus"].tolist() == pytest.approx([1.0] + [math.nan] * 3, nan_ok=True)
        assert found["exact_memorization"].tolist() == pytest.approx([0.5, 1, math.nan, math.nan], nan_ok=True)
        assert found["extraction_strength"].tolist() == pytest.approx([0, 1, math.nan, math.nan], nan_ok=True)
    whole = score_rows(states, ends, 1.0, wanted)
    assert whole["min_k_plus_plus"][0].item() == pytest.approx(0.0, abs=1e-6)
    assert whole["min_k"][0].item() == pytest.approx(1.5 * ln2)
    assert "min_k" not in score_rows(states, ends)


def test_a_sure_distribution_has_a_score(monkeypatch: pytest.MonkeyPatch):
    """No variance: the deviation is taken for a thousandth, so that nothing is divided by zero."""
    wanted = {"min_k_plus_plus": torch.tensor([True])}
    score = score_rows(states_of([[(LAST, EOS), (LAST, EOS)]]), torch.tensor([0]), wanted=wanted)
    assert score["min_k_plus_plus"].tolist() == [0.0]


# -- gradient norms ----------------------------------------------------------------------------------------------------


def token_rows() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, EOS], [5, 6, 11, EOS, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, EOS], [-100, -100, 11, EOS, -100, -100]])
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long(), "end": torch.tensor([1, 1])}


def test_gradient_norm_by_hand(model_folder: Path):
    """Mean over tensors of the L2 norm, of the loss without EOS, from a plain backward pass; nothing is left behind."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = []
    for ids, answer in (([5, 6, 7, 8, 9], 2), ([5, 6, 11], 2)):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits[0, answer - 1 : -1]
        nn.functional.cross_entropy(logits, torch.tensor(ids[answer:])).backward()
        norms = [p.grad.norm() for p in model.parameters()]
        expected.append(torch.stack(norms).mean().item())
    model.zero_grad()
    frozen = next(model.parameters()).requires_grad_(False)
    model.train()
    with torch.inference_mode():
        rows = {name: value.clone() for name, value in token_rows().items()}
        found = gradient_norms(model, Scorer(model), rows)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(p.grad is None for p in model.parameters())


def test_gradient_norm_without_dropout():
    """A model with dropout is scored in eval mode: twice the same."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5))
    model.train()
    once, again = (gradient_norms(model, Scorer(model), token_rows()) for _ in range(2))
    assert once.tolist() == again.tolist()


def test_gradient_norm_of_an_adapter_is_that_of_the_merged_model(model_folder: Path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    beside = gradient_norms(model, Scorer(model), token_rows())
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == []
    merged = model.merge_and_unload()
    assert beside.tolist() == pytest.approx(gradient_norms(merged, Scorer(merged), token_rows()).tolist(), rel=1e-4)


@pytest.mark.parametrize("split", ["forget", "holdout"])
def test_gradient_norm_goldens(shared: Path, split: str):
    """The first twenty rows; public code has train mode on, which makes no difference without dropout."""
    folder = shared / "goldens" / "A" / "policy"
    file = {"forget": shared / "tofu" / "forget10_perturbed.json", "holdout": shared / "goldens/data/holdout10.json"}
    lines = [json.loads(line) for line in file[split].read_text().splitlines()[:20]]
    encode = PromptTemplate(AutoTokenizer.from_pretrained(folder), "Question: {question}\nAnswer:\n{answer}")
    encoded = encode.encode_rows([(row["question"], row["answer"]) for row in lines], split)
    rows = {**collate(encoded), "end": torch.tensor([row.end for row in encoded])}
    model = AutoModelForCausalLM.from_pretrained(folder)
    golden = json.loads((folder.parent / "metrics_policy.json").read_text())["metrics"]["mia_gradnorm"]
    found = gradient_norms(model, Scorer(model), rows).tolist()
    assert found == pytest.approx(golden[split]["value_by_index"][:20], rel=1e-5)


# -- logs --------------------------------------------------------------------------------------------------------------


def log_rows(**changed: Any) -> list[dict[str, Any]]:
    forget = [{"split": "forget", "index": i, "mia_min_k": float(i)} for i in range(2)]
    row = {"split": "holdout", "index": 0, "mia_min_k": 1.0, "question": "Who?", "min_k_share": 0.4}
    return [*forget, {**row, **changed}]


def privleak_of(log: RetainLog, forget: int, holdout: list[str], share: float = 0.4) -> tuple[Any, dict[str, str]]:
    """PrivLeak, or why it is not measured, of splits of these rows."""
    build = EvaluationBuilder(None, EvalOptions(min_k=share))
    for name, questions in (("forget", ["Any?"] * forget), ("holdout", holdout)):
        texts = [{"question": question, "answer": "Yes."} for question in questions]
        build.add(Split(name, texts, [[TokenRow([1, 2], [-100, 2])] for _ in texts], {}))
    build.membership_inference(log)
    return build.summary.get("privleak"), build.unavailable


def test_min_k_of_our_rows():
    """Forget 0, 1 against holdout 1: one pair in order, one tie."""
    metric, _ = privleak_of(parse_rows("log", log_rows()), 2, ["Who?"])
    assert metric.retrained_auc == 0.75
    rated = [{**row, "paraphrase_nll": 1.0, "perturbed_nll": [1.0]} for row in log_rows()]
    assert [row["truth_ratio"] for row in parse_rows("log", rated).splits["forget"].values()] == [1.0, 1.0]
    unrated = parse_rows("log", [{**r, "mia_min_k": None} for r in rated])
    assert "has no Min-K% scores" in privleak_of(unrated, 2, ["Who?"])[1]["privleak"]


@pytest.mark.parametrize(
    ("forget", "holdout", "share", "message"),
    [
        (3, ["Who?"], 0.4, r"the 3 rows of forget, got 2, row 2 is missing from the log: score the retrained model"),
        (2, ["Who?", "What?"], 0.4, r"the 2 rows of holdout, got 1"),
        (2, ["Why?"], 0.4, r"the question 'Why\?' at row 0 of holdout, got 'Who\?'"),
        (2, ["Who?"], 0.2, r"of the share 0.2, got 0.4: .* the same --eval.min_k"),
    ],
)
def test_min_k_of_other_rows_is_refused(forget: int, holdout: list[str], share: float, message: str):
    with pytest.raises(UserError, match=message):
        privleak_of(parse_rows("log", log_rows()), forget, holdout, share)


def test_min_k_of_other_tokens_is_refused():
    with pytest.raises(UserError, match="got others at row 0 of holdout, made with another prompt template"):
        privleak_of(parse_rows("log", log_rows(tokens="of another template")), 2, ["Who?"])


@pytest.mark.parametrize(("forget", "holdout", "auc"), [(0.0, 1.0, 1), (2.0, 1.0, 0), (0.0, math.nan, math.nan)])
def test_retrained_areas_at_the_ends(forget: float, holdout: float, auc: float):
    """An area of 1 leaves nothing to divide by, which is said; of 0, PrivLeak is -100 times the AUC."""
    rows = [{**row, "mia_min_k": holdout if row["split"] == "holdout" else forget} for row in log_rows()]
    metric, reasons = privleak_of(parse_rows("log", rows), 2, ["Who?"])
    if auc == 0:
        assert privleak(0.25, metric.retrained_auc) == -25
        assert "privleak" not in reasons
    else:
        assert metric is None
        assert reasons["privleak"] == (
            f"the retrained model's AUC of Min-K% is {auc:g}, and PrivLeak divides by 1 - AUC"
        )


def test_min_k_of_open_unlearning(tmp_path: Path):
    part = {"agg_value": 1.0, "value_by_index": {"0": {"score": 1.0}}}
    content = {"forget_truth_ratio": {"value_by_index": {"0": {"score": 1.0}}, "agg_value": 1.0}}
    content["mia_min_k"] = {"forget": part, "holdout": part, "auc": 0.25, "agg_value": 0.25}
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(content))
    log = read_retain_log(tmp_path)
    assert privleak_of(log, 1, ["Any?"])[0].retrained_auc == 0.25
    with pytest.raises(UserError, match="the 2 rows of holdout, got 1"):
        privleak_of(log, 1, ["Any?", "More?"])


def test_rows_of_a_log_make_the_same_log():
    """What a run keeps of a log it read serves those who open the run again."""
    rated = [{**row, "truth_ratio": 0.5} if row["split"] == "forget" else row for row in log_rows()]
    for rows in (log_rows(), rated, [row for row in rated if "question" not in row]):
        log = parse_rows("log", rows)
        assert parse_rows("log", log.rows()) == log


# -- whole runs --------------------------------------------------------------------------------------------------------

HOLDOUT = ("--data.holdout", "retain90[:6]", "--eval.gradnorm", "true", "--eval.min_k", "0.3")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All attacks on the start model, with reference and retrained model."""
    from simnpo_pl.__main__ import main

    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    folder = tmp_path_factory.mktemp("membership") / "run"
    other = ["--eval.mia_reference", str(other_folder), "--eval.retrained", str(other_folder)]
    main(["test", *run_options, *HOLDOUT, *other, "--run_dir", str(folder), "--debug"])
    return folder


def test_results_and_rows(evaluated: Path):
    """Aggregates follow from the rows; PrivLeak from the two models' areas."""
    content = results(evaluated)
    found, retrained = content["final"]["metrics"], content["retrained"]["metrics"]
    assert set(content["unavailable"]) == {"forget/fluency"}
    rows = [json.loads(line) for line in (evaluated / "rows.jsonl").read_text().splitlines()]
    by_split = {split: [r for r in rows if r["split"] == split] for split in ("forget", "holdout")}
    assert [len(part) for part in by_split.values()] == [10, 6]
    for name in ATTACKS:
        parts = [torch.tensor([row[name] for row in part]) for part in by_split.values()]
        assert found[name] == pytest.approx(membership_auc(*parts), abs=1e-9)
        assert (content["counts"][name], found[f"{name}/m"]) == (10, 6)
    assert all(row["mia_loss"] == row["answer_nll"] for row in by_split["holdout"])
    assert found["privleak/retrained_auc"] == retrained["mia_min_k"]
    assert found["privleak"] == pytest.approx(privleak(found["mia_min_k"], retrained["mia_min_k"]))
    # The reference model against itself.
    assert retrained["mia_reference"] == 0.5
    assert "mia_reference" not in content


def test_rounded_weights_say_what_they_lack(evaluated: Path, other_folder: Path, tmp_path: Path):
    """The reference attack was asked for, so nobody is told to ask for it."""
    from simnpo_pl.__main__ import main

    folder = shutil.copytree(evaluated, tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("gradnorm: true", "gradnorm: false"))
    main(["quantize", str(folder), "--bits", "8", "--debug"])
    (rounded,) = results(folder)["quantized"].values()
    reason = f"{other_folder} is not measured beside attacks"
    assert rounded["unavailable"]["mia_reference"] == reason
    assert results(folder)["final"]["metrics"].keys() - rounded["metrics"].keys() == {
        *("mia_reference", "mia_reference/m", "mia_gradnorm", "mia_gradnorm/m")
    }


def test_public_format(evaluated: Path):
    log = json.loads((evaluated / "TOFU_EVAL.json").read_text())
    metrics = results(evaluated)["final"]["metrics"]
    for name in ATTACKS:
        assert log[name]["auc"] == log[name]["agg_value"] == metrics[name]
        scores = [entry["score"] for entry in log[name]["holdout"]["value_by_index"].values()]
        assert len(scores) == 6
        assert log[name]["holdout"]["agg_value"] == pytest.approx(sum(scores) / 6)
    assert log["privleak"]["agg_value"] == metrics["privleak"]


def test_own_log_as_the_retrained_models(cli: Callable[..., None], evaluated: Path, other_folder: Path, tmp_path: Path):
    cli("test", *HOLDOUT, "--model.name", str(other_folder), "--run_dir", str(tmp_path / "retrained"))
    assert "give --eval.retain_log FILE" in results(tmp_path / "retrained")["unavailable"]["privleak"]
    for log in ("rows.jsonl", "TOFU_EVAL.json"):
        folder = tmp_path / f"check {log}"
        options = ["--eval.retain_log", str(tmp_path / "retrained" / log)]
        cli("test", *HOLDOUT, *options, "--run_dir", str(folder))
        assert results(folder)["final"]["metrics"]["privleak"] == pytest.approx(
            results(evaluated)["final"]["metrics"]["privleak"]
        )
        assert set(results(folder)["unavailable"]) == {"mia_reference", "forget/fluency"}


def test_two_processes(run_options: list[str], evaluated: Path, other_folder: Path, tmp_path: Path):
    """Every row's score and every area as on one process, gradient norms included."""
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "simnpo_pl", "test", *run_options, *HOLDOUT, "--debug"]
    command += ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command += ["--eval.mia_reference", str(other_folder), "--eval.retrained", str(other_folder)]
    command += ["--eval.cache_dir", str(tmp_path / "cache"), "--run_dir", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "SIMNPO_PL_RUN_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert results(folder)["final"]["metrics"] == pytest.approx(results(evaluated)["final"]["metrics"], rel=1e-5)
    one, two = ([json.loads(x) for x in (f / "rows.jsonl").read_text().splitlines()] for f in (evaluated, folder))
    assert [(r["split"], r["index"]) for r in two] == [(r["split"], r["index"]) for r in one]
    for a, b in zip(one, two, strict=True):
        assert {n: b[n] for n in ATTACKS if n in b} == pytest.approx({n: a[n] for n in ATTACKS if n in a}, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eval.gradnorm", "true"), "--eval.gradnorm: this compares forget with holdout rows; give --data.h"),
        (("--data.holdout", "missing.json"), "cannot read missing.json"),
        (("--data.holdout", "holdout99"), "holdout99"),
        (("--data.holdout", "forget10_perturbed[:2]"), "2 of 10 forget rows are also holdout rows"),
        (("--eval.min_k", "0"), "--eval.min_k is a share of a row's tokens, above 0 and at most 1, got 0"),
        (
            ("--eval.mia_reference", "x", "--data.holdout", "retain90[:2]", "--eval.splits", "[forget]"),
            "--eval.mia_reference: no attack is made here; measure forget and holdout rows",
        ),
        (
            ("--eval.mia_reference", "./none", "--data.holdout", "retain90[:2]"),
            "--eval.mia_reference: folder ./none does not exist",
        ),
    ],
)
def test_mistakes(cli_error: Callable[..., str], options: tuple[str, ...], message: str):
    assert message in cli_error("test", *options)


def test_without_holdout_rows_the_reason_is_given(cli: Callable[..., None], tmp_path: Path, capsys: Any):
    cli("test", "--run_dir", str(tmp_path / "run"))
    unavailable = results(tmp_path / "run")["unavailable"]
    assert {unavailable[name] for name in (*ATTACKS, "privleak")} == {"no holdout rows; give --data.holdout"}
    assert "  membership inference, PrivLeak: no holdout rows; give --data.holdout\n" in capsys.readouterr().out


def test_without_the_holdout_split_nothing_is_attacked(cli: Callable[..., None], tmp_path: Path, monkeypatch: Any):
    """Not even at the cost of a backward pass a row."""
    monkeypatch.setattr("simnpo_pl.module.policy.gradient_norms", lambda *a: pytest.fail("a gradient was taken"))
    cli("test", *HOLDOUT, "--eval.splits", "[forget,retain]", "--run_dir", str(tmp_path / "run"))
    content = results(tmp_path / "run")
    assert {content["unavailable"][name] for name in ATTACKS[:4]} == {
        "it rests on splits that --eval.splits leaves out"
    }
    assert not set(ATTACKS) & set(content["final"]["metrics"])
