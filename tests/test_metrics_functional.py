"""Metric functions against values derived by hand and against scipy and scikit-learn."""

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

from simnpo_pl.metrics import functional as F
from simnpo_pl.utils.errors import UserError

NAN, INF = math.nan, math.inf


def nll(*probabilities: float) -> torch.Tensor:
    return -torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize("module", ["functional", "base", "generated", "membership", "titles"])
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"simnpo_pl.metrics.{module}")).failed == 0


def test_answer_probability():
    assert F.answer_probability(nll(1.0, 0.25)).tolist() == pytest.approx([1.0, 0.25])
    assert F.answer_probability(torch.tensor([1.0])).dtype == torch.float64


def test_choice_probability():
    """0.3 / (0.3 + 0.1 + 0.2) = 1/2."""
    assert F.choice_probability(nll(0.3), nll(0.1, 0.2)[None]).item() == pytest.approx(0.5)


def test_choice_probability_where_every_probability_underflows():
    """exp(-1000) is 0 in float64, but equal losses still share the probability: 1/2."""
    assert F.choice_probability(torch.tensor([1000.0]), torch.tensor([[1000.0]])).item() == pytest.approx(0.5)


def test_truth_ratio_geometric():
    """Geometric mean of 1/2 and 1/8 is 1/4; over the paraphrase's 1/2: R = 1/2."""
    assert F.truth_ratio(nll(0.5), nll(0.5, 0.125)[None]).item() == pytest.approx(0.5)


def test_truth_ratio_arithmetic():
    """Mean of 1/2 and 1/8 is 5/16; over 1/2: R = 5/8."""
    assert F.truth_ratio(nll(0.5), nll(0.5, 0.125)[None], "arithmetic").item() == pytest.approx(0.625)


def test_truth_ratio_prob_mean():
    """P = 1/2, q = 1/4: P / (P + q) = 2/3."""
    assert F.truth_ratio(nll(0.5), nll(0.5, 0.125)[None], "prob_mean").item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", F.CONVENTIONS)
def test_truth_ratio_keeps_nan_and_survives_underflow(kind):
    right, wrong = torch.tensor([2000.0, NAN, 1.0]), torch.tensor([[2000.0, 2000.0], [1.0, 1.0], [NAN, 1.0]])
    equal, *rest = F.truth_ratio(right, wrong, kind).tolist()
    assert equal == pytest.approx(0.5 if kind == "prob_mean" else 1.0)
    assert all(math.isnan(value) for value in rest)


def test_truth_ratio_errors():
    with pytest.raises(UserError, match="geometric, arithmetic, prob_mean, got 'harmonic'"):
        F.truth_ratio(torch.zeros(1), torch.zeros(1, 2), "harmonic")
    with pytest.raises(UserError, match=r"shapes \(N,\) and \(N, K\), got \(2,\) and \(3, 1\)"):
        F.truth_ratio(torch.zeros(2), torch.zeros(3, 1))


def test_aggregates_of_truth_ratios():
    """min(R, 1/R) of 1/2, 4, 0, inf is 1/2, 1/4, 0, 0: mean 3/16. max(0, 1-R) is 1/2, 0, 1, 0: mean 3/8."""
    ratios = torch.tensor([0.5, 4.0, 0.0, INF])
    assert F.forget_truth_ratio(ratios) == 0.1875
    assert F.utility_truth_ratio(ratios) == 0.375


@pytest.mark.parametrize("ratios", [torch.tensor([0.5, NAN]), torch.tensor([])])
def test_aggregates_never_hide_nan(ratios):
    assert math.isnan(F.forget_truth_ratio(ratios))
    assert math.isnan(F.utility_truth_ratio(ratios))


def test_forget_quality_of_separated_samples():
    """All of one below all of the other: D = 1, and 2 of C(5, 2) = 10 orders are as extreme: p = 1/5."""
    result = F.forget_quality(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))
    assert result.p_value == pytest.approx(0.2)
    assert result.log10_p == pytest.approx(math.log10(0.2))
    assert result[2:] == (1.0, 2, 3)


def test_forget_quality_is_scipys_and_rank_based():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(90, generator=generator), torch.rand(70, generator=generator) ** 2
    result, test = F.forget_quality(one, two), ks_2samp(one.double().numpy(), two.double().numpy())
    assert (result.p_value, result.ks_statistic) == (test.pvalue, test.statistic)
    assert F.forget_quality(1 / one, 1 / two).p_value == pytest.approx(result.p_value)


def test_log10_p_continues_where_p_underflows():
    """Separated samples of size n: p = 2 / C(2n, n), 1e-299 at n = 500 and below any float at n = 1000."""
    for n in (500, 1000):
        result = F.forget_quality(torch.arange(n), torch.arange(n) + n)
        exact = math.log10(2) - math.log10(math.comb(2 * n, n))
        assert result.log10_p == pytest.approx(exact, rel=1e-9)
    assert result.p_value == 0.0
    # n = 3000, D = 1/2: 2 C(6000, 1500) / C(6000, 3000), from integers.
    result = F.forget_quality(torch.arange(3000), torch.arange(3000) + 1500)
    exact = math.log10(2) + math.log10(math.comb(6000, 1500)) - math.log10(math.comb(6000, 3000))
    assert result.log10_p == pytest.approx(exact, rel=1e-9)
    unequal = F.forget_quality(torch.arange(3000), torch.arange(2000) + 3000)
    assert unequal.p_value == 0.0
    assert -INF < unequal.log10_p < -323


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (torch.tensor([1.0, NAN]), torch.ones(2), "unlearned model, got 1 NaN among 2"),
        (torch.ones(2), torch.tensor([NAN]), "retrained model, got 1 NaN among 1"),
        (torch.ones(2), torch.ones(0), "retrained model, got none"),
    ],
)
def test_forget_quality_errors(one, two, message):
    with pytest.raises(UserError, match=message):
        F.forget_quality(one, two)


def test_model_utility():
    """3 / (1/1 + 1/(1/2) + 1/(1/2)) = 3/5."""
    assert F.model_utility({"a": 1.0, "b": 0.5, "c": 0.5}) == pytest.approx(0.6)
    values = [0.1, 0.7, 0.93, 0.4]
    assert F.model_utility(dict(zip("abcd", values, strict=True))) == pytest.approx(hmean(values))
    assert F.model_utility({"a": 1.0, "b": 0.0}) == 0.0


def test_model_utility_errors():
    assert math.isnan(F.model_utility({"a": 0.0, "b": NAN}))
    with pytest.raises(UserError, match=r"0 or more, got b = -0\.1"):
        F.model_utility({"a": 1.0, "b": -0.1})
    with pytest.raises(UserError, match="at least one part, got none"):
        F.model_utility({})


def test_rouge():
    """Stems "cat sit here" and "the cat sit": 2 of 3 words in common, in order: all 2/3."""
    scores = F.rouge_l("cats sitting here", "the cat sits")
    assert scores == pytest.approx({"rougeL_recall": 2 / 3, "rougeL_f1": 2 / 3, "rouge1_recall": 2 / 3})
    assert F.rouge_l("", "the cat")["rougeL_recall"] == 0.0


ASCII = st.text(st.characters(max_codepoint=127), max_size=60) | st.lists(
    st.sampled_from(["Cats", "cat", "running,", "ran", "well-known", "it's", "x_1", "3.5%", "\n"]), max_size=12
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(ASCII, ASCII, st.booleans())
def test_rouge_of_ascii_text_is_that_of_rouge_score(prediction, target, stem):
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=stem).score(target, prediction)
    assert F.rouge_l(prediction, target, stem) == {
        "rougeL_recall": theirs["rougeL"].recall,
        "rougeL_f1": theirs["rougeL"].fmeasure,
        "rouge1_recall": theirs["rouge1"].recall,
    }


@pytest.mark.parametrize(
    ("target", "half", "recall"),
    [
        ("作者出生于北京。", "作者出生", 4 / 7),
        ("東京タワーの近く", "東京", 2 / 8),
        ("เขาเกิด", "เขา", 3 / 6),  # a vowel above its consonant is part of it
        ("Она родилась в Москве", "она родилась", 2 / 4),
        ("그는 서울에서 태어났다", "그는", 1 / 3),
        ("ولد في القاهرة", "ولد", 1 / 3),
        ("उसका जन्म दिल्ली में हुआ", "उसका जन्म", 2 / 5),
        ("Győr", "gy r", 0.0),
        ("Écrit par José", "E\u0301crit par Jose", 2 / 3),  # composed or not, an accent is part of its letter
        ("2023年出版", "2023 年", 2 / 4),
    ],
)
def test_rouge_of_any_script(target, half, recall):
    """Word for word is 1, in every script; part of it is the share of its words, or characters."""
    for stem in (True, False):
        assert set(F.rouge_l(target, target, stem).values()) == {1.0}
        assert F.rouge_l(half, target, stem)["rougeL_recall"] == pytest.approx(recall)


@pytest.mark.parametrize(
    ("correct", "strength", "exact"),
    [
        ([1, 0, 1, 1], 0.5, 0.75),  # k = 2 of 4
        ([1, 1, 1, 0], 0.0, 0.75),  # not even the last token is right
        ([0, 0, 0, 1], 0.25, 0.25),
        ([1, 1, 1], 1.0, 1.0),
        ([], NAN, NAN),
    ],
)
def test_memorization(correct, strength, exact):
    correct = torch.tensor(correct, dtype=torch.bool)
    assert F.extraction_strength(correct) == pytest.approx(strength, nan_ok=True)
    assert F.exact_memorization(correct) == pytest.approx(exact, nan_ok=True)


def test_exact_memorization_is_an_accuracy():
    from sklearn.metrics import accuracy_score

    correct = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = accuracy_score(torch.ones(50).numpy(), correct.float().numpy())
    assert F.exact_memorization(correct) == pytest.approx(expected)
