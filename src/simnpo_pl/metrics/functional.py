"""Unlearning metrics as pure functions of per-row scores.

Tensors in, tensors or floats out, computed in float64 and in log space where a probability could underflow.
Losses are mean negative log-likelihoods in nats per token, the one end-of-sequence token included.
"""

import math
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import regex
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from simnpo_pl.utils.errors import UserError

CONVENTIONS = ("geometric", "arithmetic", "prob_mean")
ROUGE = ("rougeL_recall", "rougeL_f1", "rouge1_recall")
"""Scores of a generated answer."""
_LETTER = r"[\p{L}\p{M}\p{N}]"
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
UNSPACED = regex.compile(_UNSPACED)
_WORD = regex.compile(rf"(?V1)[{_LETTER}&&{_UNSPACED}]\p{{M}}*|[{_LETTER}--{_UNSPACED}]+")


class ForgetQualityResult(NamedTuple):
    """Outcome of `forget_quality`.

    `log10_p` is finite even if `p_value` underflows to 0; `ks_statistic` is the largest gap between the two empirical
    distribution functions; `n` and `m` are the sizes of the unlearned and retrained samples.
    """

    p_value: float
    log10_p: float
    ks_statistic: float
    n: int
    m: int


def answer_probability(nll: Tensor) -> Tensor:
    """Length-normalized probability exp(-nll) of each answer, `(N,)` float64, from `(N,)` nats per token."""
    return torch.exp(-nll.double())


def choice_probability(true_nll: Tensor, wrong_nll: Tensor) -> Tensor:
    """Probability of the true answer among the listed ones: p / (p + sum of the wrong ones' p), `(N,)` float64.

    Args:
        true_nll: `(N,)` losses of the true answers, nats per token.
        wrong_nll: `(N, K)` losses of the wrong answers, nats per token.

    Example:
        >>> choice_probability(torch.tensor([math.log(2)]), torch.tensor([[math.log(4), math.log(4)]]))
        tensor([0.5000], dtype=torch.float64)
    """
    _check_shapes(true_nll, wrong_nll)
    return torch.softmax(-torch.cat([true_nll.double()[:, None], wrong_nll.double()], dim=1), dim=1)[:, 0]


def truth_ratio(paraphrase_nll: Tensor, perturbed_nll: Tensor, kind: str = "geometric") -> Tensor:
    """Truth ratio R of each row: how likely wrong answers are compared with the paraphrased right one.

    With P = exp(-paraphrase_nll): "geometric" is R = exp(-mean_k perturbed_nll) / P, "arithmetic" is
    R = mean_k exp(-perturbed_nll) / P, and "prob_mean" is P / (P + exp(-mean_k perturbed_nll)).

    Args:
        paraphrase_nll: `(N,)` losses of the paraphrased (or, without one, the true) answers, nats per token.
        perturbed_nll: `(N, K)` losses of the wrong answers, nats per token.
        kind: Which of the three public conventions.

    Returns:
        `(N,)` ratios, float64; infinite if P is 0, NaN if a loss is NaN.

    Raises:
        UserError: An unknown kind, or shapes that do not fit.

    Example:
        >>> truth_ratio(torch.tensor([math.log(2)]), torch.tensor([[math.log(2), math.log(8)]]))
        tensor([0.5000], dtype=torch.float64)
    """
    if kind not in CONVENTIONS:
        raise UserError(f"truth ratio: expected a kind out of {', '.join(CONVENTIONS)}, got {kind!r}")
    _check_shapes(paraphrase_nll, perturbed_nll)
    right, wrong = paraphrase_nll.double(), perturbed_nll.double()
    if kind == "geometric":
        return torch.exp(right - wrong.mean(dim=1))
    if kind == "arithmetic":
        return torch.exp(right + torch.logsumexp(-wrong, dim=1) - math.log(max(wrong.shape[1], 1)))
    return torch.sigmoid(wrong.mean(dim=1) - right)


def closeness(ratios: Tensor) -> Tensor:
    """min(R, 1/R) of truth ratios `(N,)`, float64; R of 0 or infinity counts as 0."""
    ratios = ratios.double()
    return torch.minimum(ratios, 1 / ratios)


def truthfulness(ratios: Tensor) -> Tensor:
    """max(0, 1 - R) of truth ratios `(N,)`, float64."""
    return torch.clamp(1 - ratios.double(), min=0)


def forget_truth_ratio(ratios: Tensor) -> float:
    """Mean of min(R, 1/R): 1 when right and wrong answers are equally likely in every row.

    A NaN or an empty input gives NaN.

    Example:
        >>> forget_truth_ratio(torch.tensor([0.5, 4.0, 0.0, math.inf]))
        0.1875
    """
    return closeness(ratios).mean().item()


def utility_truth_ratio(ratios: Tensor) -> float:
    """Mean of max(0, 1 - R): 1 when the wrong answers have no probability compared with the right one.

    A NaN or an empty input gives NaN.

    Example:
        >>> utility_truth_ratio(torch.tensor([0.5, 4.0]))
        0.25
    """
    return truthfulness(ratios).mean().item()


def forget_quality(unlearned: Tensor, retrained: Tensor) -> ForgetQualityResult:
    """Two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget split.

    scipy's `ks_2samp` with method "auto" gives statistic and p. If p underflows to 0, `log10_p` is the first term
    2 C(2n, n - nD) / C(2n, n) of the exact series for equal sizes (the rest is far smaller), and the first term
    2 exp(-2 D^2 nm / (n + m)) of Smirnov's asymptotic series for unequal sizes.

    Args:
        unlearned: `(N,)` truth ratios of the unlearned model; any monotone function of them gives the same p.
        retrained: `(M,)` truth ratios of the retrained model, of the same questions.

    Raises:
        UserError: NaN in a sample, or an empty one.

    Example:
        >>> result = forget_quality(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        >>> round(result.p_value, 4), result.ks_statistic
        (0.3333, 1.0)
    """
    samples = {"unlearned": unlearned.double().cpu(), "retrained": retrained.double().cpu()}
    for name, sample in samples.items():
        bad = int(sample.isnan().sum())
        if bad or not sample.numel():
            found = f"{bad} NaN among {sample.numel()}" if bad else "none"
            raise UserError(f"forget quality: expected truth ratios of the {name} model, got {found}")
    n, m = unlearned.numel(), retrained.numel()
    test = ks_2samp(*(sample.numpy() for sample in samples.values()))
    p, statistic = float(test.pvalue), float(test.statistic)
    if p > 0:
        log10_p = math.log10(p)
    elif n == m:
        gap = round(statistic * n)
        paths = 2 * math.lgamma(n + 1) - math.lgamma(n - gap + 1) - math.lgamma(n + gap + 1)
        log10_p = (math.log(2) + paths) / math.log(10)
    else:
        log10_p = (math.log(2) - 2 * statistic**2 * n * m / (n + m)) / math.log(10)
    return ForgetQualityResult(p, log10_p, statistic, n, m)


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the parts, each at least 0; NaN if any part is NaN, else 0 if any is 0.

    Raises:
        UserError: No part, or one that is negative.
    """
    if not parts:
        raise UserError("model utility: expected at least one part, got none")
    for name, value in parts.items():
        if value < 0:
            raise UserError(f"model utility: expected every part to be 0 or more, got {name} = {value}")
    if any(math.isnan(value) for value in parts.values()):
        return math.nan
    return 0.0 if min(parts.values()) == 0 else len(parts) / sum(1 / value for value in parts.values())


def rouge_l(prediction: str, target: str, stem: bool = True) -> dict[str, float]:
    """ROUGE: "rougeL_recall", "rougeL_f1" and "rouge1_recall", each 0 to 1.

    A word is a run of letters, marks and digits of any script; in scripts without spaces between words (Chinese,
    Japanese, Thai, Lao, Khmer, Burmese) every character is one. On ASCII text the scores are those of rouge-score,
    whose tokenizer drops all other letters.

    Args:
        prediction: Generated text.
        target: The right text.
        stem: Whether ASCII words are compared without their English endings, as in TOFU, not in MUSE.

    Example:
        >>> rouge_l("the cat", "the cats sat here")["rougeL_recall"]
        0.5
        >>> rouge_l("北京", "北京市")["rougeL_f1"]
        0.8
    """
    scores = _scorer(stem).score(target, prediction)
    found = (scores["rougeL"].recall, scores["rougeL"].fmeasure, scores["rouge1"].recall)
    return dict(zip(ROUGE, map(float, found), strict=True))


def words(text: str) -> list[str]:
    """The words of a text as ROUGE compares them: in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def extraction_strength(correct: Tensor) -> float:
    """1 - k/T, k the length of the shortest prefix after which all remaining tokens are predicted right.

    Args:
        correct: `(T,)` bool, whether the teacher-forced argmax is right at each answer token, without the EOS.

    Returns:
        0 (last token wrong) to 1 (all right); NaN for T = 0.

    Example:
        >>> extraction_strength(torch.tensor([True, False, True, True]))
        0.5
    """
    return correct.flip(0).long().cumprod(0).sum().item() / correct.numel() if correct.numel() else math.nan


def exact_memorization(correct: Tensor) -> float:
    """Share of answer tokens predicted right, 0 to 1; takes what `extraction_strength` takes, NaN for T = 0."""
    return correct.double().mean().item()


def depth_score(retrained: Tensor, unlearned: Tensor, least: float = 0.05) -> Tensor:
    """Unlearning Depth Score of each row (arXiv 2605.24614): `(N,)` float64, 0 to 1; NaN where no layer counts.

    What another model's hidden states take off an answer's log-prob in the start model, layer by layer. The layers that
    count are those where the retrained model's take off more than `least`: UDS = sum of clip(unlearned, 0, retrained)
    over these layers / sum of retrained over them.

    Args:
        retrained: `(N, L)` drops by the retrained model's states, nats per token.
        unlearned: `(N, L)` drops by the unlearned model's.
        least: Of a drop that counts.

    Example:
        >>> depth_score(torch.tensor([[0.01, 1.0, 3.0], [0, 0, 0]]), torch.tensor([[2.0, -1.0, 2.0], [1, 1, 1]]))
        tensor([0.5000,    nan], dtype=torch.float64)
    """
    retrained, unlearned = retrained.double(), unlearned.double()
    counts = retrained > least
    gone = torch.minimum(unlearned.clamp(min=0), retrained)
    return torch.where(counts, gone, 0).sum(dim=1) / torch.where(counts, retrained, 0).sum(dim=1)


def lowest_share(values: Tensor, share: float) -> float:
    """Minus the mean of the lowest values: the score of Min-K% and Min-K%++ for one answer.

    Args:
        values: `(T,)` log-probs of the answer's tokens without the EOS, for Min-K%++ standardized over the vocabulary.
        share: Which share of them is averaged, above 0 and at most 1.

    Returns:
        The mean of the max(1, int(share * T)) lowest values, times -1; NaN for T = 0.

    Example:
        >>> lowest_share(torch.tensor([-1.0, -4.0, -2.0, -3.0, -5.0]), 0.4)
        4.5
    """
    if not values.numel():
        return math.nan
    count = max(1, int(share * values.numel()))
    return -values.double().topk(count, largest=False).values.mean().item()


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, because it takes a second to load

    return RougeScorer(["rouge1", "rougeL"], tokenizer=_Words(stem))


class _Words:
    """rouge-score's tokenizer for words of any script."""

    def __init__(self, stem: bool) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(stem)

    def tokenize(self, text: str) -> list[str]:
        return [part for word in words(text) for part in (self._ascii.tokenize(word) if word.isascii() else [word])]


def _check_shapes(one: Tensor, many: Tensor) -> None:
    if one.dim() != 1 or many.dim() != 2 or len(one) != len(many):
        raise UserError(f"expected losses of shapes (N,) and (N, K), got {tuple(one.shape)} and {tuple(many.shape)}")
