"""Scores of token rows and what they add up to, as public code has them; test_metrics_golden runs the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from helpers import golden
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.evaluation.scoring import MIN_K, MIN_K_PLUS_PLUS, gradient_norms, score_rows
from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.membership import membership_auc, privleak
from simnpo_pl.models.generation import generate
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.logprobs import Scorer

ROWS, LOGS, PUBLISHED = golden("rows.json.gz"), golden("logs.json.gz"), golden("published.json.gz")
MODELS = ("target", "retain", "policy")
END = 1


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, golden_models: dict[str, Path]) -> tuple[Any, dict[str, Any]]:
    return load_causal_lm(str(golden_models[request.param])), ROWS["models"][request.param]


def token_rows(split: str) -> list[list[TokenRow]]:
    """The answers of each row."""
    return [
        [
            TokenRow(ids, [-100] * (len(ids) - scored) + ids[len(ids) - scored :], end=int(ids[-1] == END))
            for ids, scored in zip(row["input_ids"], row["scored"], strict=True)
        ]
        for row in ROWS["rows"][split]
    ]


@pytest.mark.parametrize("split", ["forget", "retain", "real_authors", "world_facts", "holdout"])
def test_scores_by_row(model, split: str):
    """Losses of every answer within 2e-5, attacks within 5e-6; memorization is a share of tokens, so it is equal."""
    lm, expected = model
    rows = token_rows(split)
    answers = [answer for row in rows for answer in row]
    states = Scorer(lm)({"rows": collate(answers)})["rows"]
    every = torch.ones(len(answers), dtype=torch.bool)
    ends = torch.tensor([answer.end for answer in answers])
    found = score_rows(states, ends, 0.4, {MIN_K: every, MIN_K_PLUS_PLUS: every})
    first = [sum(map(len, rows[:i])) for i in range(len(rows))]
    for start, row, entry in zip(first, rows, expected[split], strict=True):
        if "nll" in entry:
            assert found["nll"][start : start + len(row)].tolist() == pytest.approx(entry["nll"], abs=2e-5)
        for name in ("exact_memorization", "extraction_strength"):
            # Public code gives 1/n instead of 0 where not even the last token is right.
            if name in entry and found[name][start] > 0:
                assert found[name][start].item() == pytest.approx(entry[name], abs=1e-6)
        if "mia_loss" in entry:
            assert found["nll"][start].item() == pytest.approx(entry["mia_loss"], abs=2e-5)
            assert found["min_k"][start].item() == pytest.approx(entry["mia_min_k"], abs=2e-5)
            assert found["min_k_plus_plus"][start].item() == pytest.approx(entry["mia_min_k_plus_plus"], abs=2e-5)


def test_gradient_norms_by_row(model):
    lm, expected = model
    rows = [row[0] for row in token_rows("forget")[:3]]
    batch = {**collate(rows), "end": torch.tensor([row.end for row in rows])}
    found = gradient_norms(lm, Scorer(lm), batch)
    assert found.tolist() == pytest.approx([entry["mia_gradnorm"] for entry in expected["forget"][:3]], rel=1e-5)


@pytest.mark.parametrize("split", ["forget", "retain", "real_authors", "world_facts"])
def test_greedy_answers(model, split: str):
    """Token by token, all prompts at once."""
    lm, expected = model
    prompts = [row[0].prompt_ids for row in token_rows(split)]
    assert generate(lm, prompts, 64, [END]) == [entry["generated"] for entry in expected[split]]


def truth_ratios(log: dict[str, Any], split: str, kind: str = "geometric") -> torch.Tensor:
    part = log[split]
    right = part.get("paraphrase", part["answer"])
    return F.truth_ratio(torch.tensor(right), torch.tensor(part["perturbed"]), kind)


@pytest.mark.parametrize("name", MODELS)
def test_aggregates(name: str):
    """Model utility with its parts, forget quality, attacks and PrivLeak from the rows of open-unlearning."""
    log, aggregated = LOGS[name], LOGS[name]["agg"]
    parts = {}
    for split, short in (("retain", "retain"), ("real_authors", "ra"), ("world_facts", "wf")):
        nll, wrong = torch.tensor(log[split]["answer"]), torch.tensor(log[split]["perturbed"])
        probability = F.answer_probability(nll) if split == "retain" else F.choice_probability(nll, wrong)
        parts[f"{split}/probability"] = probability.mean().item()
        parts[f"{split}/rouge"] = torch.tensor(log[split]["rouge"]).double().mean().item()
        parts[f"{split}/truth_ratio"] = F.utility_truth_ratio(truth_ratios(log, split))
        own = "Prob" if split == "retain" else "Prob_normalised"
        assert parts[f"{split}/probability"] == pytest.approx(aggregated[f"{short}_Q_A_{own}"], abs=1e-6)
        assert parts[f"{split}/truth_ratio"] == pytest.approx(aggregated[f"{short}_Truth_Ratio"], abs=1e-6)
    assert F.model_utility(parts) == pytest.approx(aggregated["model_utility"], abs=1e-6)
    forget = truth_ratios(log, "forget")
    assert F.forget_truth_ratio(forget) == pytest.approx(aggregated["forget_truth_ratio"], abs=1e-6)
    if name != "retain":
        result = F.forget_quality(forget, truth_ratios(LOGS["retain"], "forget"))
        assert result.p_value == pytest.approx(aggregated["forget_quality"], rel=1e-4)
        assert result.ks_statistic == pytest.approx(log["ks"]["statistic"], abs=1e-9)
    areas = {}
    for attack, scores in log["mia"].items():
        one, other = (torch.tensor(scores[split], dtype=torch.float64) for split in ("forget", "holdout"))
        areas[attack] = membership_auc(one, other)
        assert areas[attack] == pytest.approx(aggregated[attack], abs=1e-9)
        labels = [0] * len(one) + [1] * len(other)
        assert areas[attack] == pytest.approx(roc_auc_score(labels, torch.cat([one, other])), abs=1e-12)
    retrained = 0.5 if name == "retain" else LOGS["retain"]["agg"]["mia_min_k"]
    assert privleak(areas["mia_min_k"], retrained) == pytest.approx(aggregated["privleak"], rel=1e-6)


@pytest.mark.parametrize("model", PUBLISHED["models"])
@pytest.mark.parametrize(
    ("kind", "entry"),
    [("geometric", "geometric_tofu_aggregate_eval_stat"), ("arithmetic", "arithmetic_tofu_utils")],
)
def test_published_model_utility(model: str, kind: str, entry: str):
    """All values of the authors' own functions on their logs of Llama-2-7B and Phi-1.5."""
    expected, values = PUBLISHED["models"][model][entry], {}
    for part, logged in PUBLISHED["parts"][model].items():
        nll = torch.tensor(logged["avg_gt_loss"])
        wrong = torch.tensor(logged["average_perturb_loss"])
        choice = part in ("real_authors", "world_facts")
        probability = F.choice_probability(nll, wrong) if choice else F.answer_probability(nll)
        aggregate = F.forget_truth_ratio if part == "forget" else F.utility_truth_ratio
        ratios = F.truth_ratio(torch.tensor(logged["avg_paraphrased_loss"]), wrong, kind)
        values[f"{part}.probability"] = probability.mean().item()
        values[f"{part}.rougeL"] = torch.tensor(logged["rougeL_recall"]).double().mean().item()
        values[f"{part}.truth_ratio"] = aggregate(ratios)
    utility = {k: v for k, v in values.items() if not k.startswith("forget")}
    assert {**values, "model_utility": F.model_utility(utility)} == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize("name", [n for n in PUBLISHED["forget_quality"] if not n.endswith("|asis")])
def test_published_forget_quality(name: str):
    expected = PUBLISHED["forget_quality"][name]
    samples = []
    for side in ("unlearned", "retain"):
        logged = PUBLISHED["parts"][expected[side]]["forget"]
        right, wrong = (torch.tensor(logged[key]) for key in ("avg_paraphrased_loss", "average_perturb_loss"))
        start, stop = expected[f"{side}_rows"] or (0, None)
        samples.append(F.truth_ratio(right, wrong, "geometric")[start:stop])
    result = F.forget_quality(*samples)
    assert (result.n, result.m) == (expected["n_unlearned"], expected["n_retain"])
    assert result.p_value == pytest.approx(expected["p_value"], rel=1e-6)
    assert result.ks_statistic == pytest.approx(expected["ks_statistic"], abs=1e-6)
