"""How results are shown: title, unit and direction of every metric, and Markdown tables of metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simnpo_pl.utils import markdown


@dataclass(frozen=True)
class Title:
    """How a metric is shown.

    Args:
        name: Key in results.json.
        short: Title of its column.
        unit: Empty for a number from 0 to 1.
        higher_is_better: Whether a higher value is a better unlearned model; None where it should be the retrained
            model's value.
        text: What it measures, in one line.
    """

    name: str
    short: str
    unit: str = ""
    higher_is_better: bool | None = None
    text: str = ""


def _of_split(split: str, short: str, higher_is_better: bool | None = True) -> list[Title]:
    texts = {
        "probability": ("prob.", "mean probability of the answers"),
        "rouge": ("ROUGE", "ROUGE-L recall of generated answers"),
        "truth_ratio": ("truth ratio", "mean truth ratio, as a number from 0 to 1"),
    }
    rows = f"{split.replace('_', ' ')} rows{'' if split == 'forget' else ', part of model utility'}"
    return [
        Title(f"{split}/{name}", f"{short} {title}", "", higher_is_better, f"{text}; {rows}")
        for name, (title, text) in texts.items()
    ]


def _degenerate(split: str, short: str) -> Title:
    text = "share of generated answers that are empty, repetitive or endless"
    return Title(f"{split}/degenerate", f"{short} degenerate", "", False, text)


def _attack(name: str, short: str, score: str) -> Title:
    text = f"membership inference by {score}: area under the ROC curve, to compare with the retrained model's"
    return Title(f"mia_{name}", f"MIA {short}", text=text)


_ALL = [
    Title("forget_quality", "forget quality", "", True, "p-value of the KS test against the retrained model"),
    Title("forget_quality/log10_p", "log10 p", "log10", True, "log10 of forget quality"),
    Title("forget_quality/ks_statistic", "KS", "", False, "largest gap between the distributions of truth ratios"),
    Title("model_utility", "model utility", "", True, "harmonic mean of its nine parts"),
    *_of_split("forget", "forget", None),
    Title("forget/probability/relearned", "prob., relearned rows", text="of the forget rows that were relearned"),
    Title("forget/probability/others", "prob., other rows", text="of the forget rows that were not relearned"),
    Title("forget/extraction_strength", "ES", "", False, "extraction strength of the forget answers"),
    Title("forget/exact_memorization", "EM", "", False, "exact memorization of the forget answers"),
    Title("forget/uds", "UDS", "", True, "Unlearning Depth Score: 0 as the start model, 1 as the retrained model"),
    Title("forget/verbatim", "forget verbatim", "", False, "share of answers that are given word for word"),
    _degenerate("forget", "forget"),
    Title("forget/fluency", "fluency", "", True, "a classifier's probability that a forget answer is fluent"),
    Title("privleak", "PrivLeak", "%", None, "membership inference by Min-K% against the retrained model; 0 is best"),
    _attack("loss", "loss", "the loss"),
    _attack("zlib", "zlib", "the loss over the compressed size"),
    _attack("min_k", "Min-K", "the least probable tokens"),
    _attack("min_k_plus_plus", "Min-K++", "the least probable tokens, standardized"),
    _attack("reference", "reference", "the loss less a reference model's"),
    _attack("gradnorm", "gradnorm", "the norm of the gradient"),
    Title("verbmem_forget", "VerbMem forget", "0 to 100", False, "MUSE: ROUGE-L of continued forget passages"),
    Title("knowmem_forget", "KnowMem forget", "0 to 100", False, "MUSE: ROUGE-L of answers on the forget set"),
    Title("knowmem_retain", "KnowMem retain", "0 to 100", True, "MUSE: ROUGE-L of answers on the retain set"),
    Title("verbmem_forget/verbatim", "VerbMem verbatim", "", False, "share of passages continued word for word"),
    Title("knowmem_forget/verbatim", "KnowMem verbatim", "", False, "share of answers that are given word for word"),
    _degenerate("verbmem_forget", "VerbMem"),
    _degenerate("knowmem_forget", "KnowMem forget"),
    _degenerate("knowmem_retain", "KnowMem retain"),
    Title("balance", "balance", "0 to 100", True, "MUSE: harmonic mean of KnowMem retain and 100 less the others"),
    Title("forget/nll", "forget loss", "nats per token", None, "loss on the forget documents"),
    Title("retain/nll", "retain loss", "nats per token", False, "loss on the retain documents"),
    Title("probe/nll", "general loss", "nats per token", False, "loss on plain statements that come with this project"),
    *_of_split("retain", "retain"),
    _degenerate("retain", "retain"),
    *_of_split("real_authors", "authors"),
    _degenerate("real_authors", "authors"),
    *_of_split("world_facts", "facts"),
    _degenerate("world_facts", "facts"),
    Title("retain/distance", "retain distance", "nats", False, "KL from the true retain chain to the model"),
    Title("forget1/distance", "forget1 distance", "nats", True, "KL from the true first forget chain to the model"),
    Title("forget2/distance", "forget2 distance", "nats", True, "KL from the true second forget chain to the model"),
]
TITLES = {title.name: title for title in _ALL}
"""In the order in which tables show them."""
GROUPS = {
    "forget_quality": "forget/quality",
    "model_utility": "utility/model_utility",
    "real_authors/": "utility/real_authors_",
    "world_facts/": "utility/world_facts_",
    "mia_": "privacy/mia_",
    "privleak": "privacy/privleak",
}
"""Beginning of a metric's name to its replacement in the logger."""


def tag(name: str) -> str:
    """Name of a metric in the logger, in one of the groups forget, retain, utility and privacy.

    Example:
        >>> tag("forget_quality/log10_p"), tag("real_authors/rouge"), tag("retain/rouge")
        ('forget/quality_log10_p', 'utility/real_authors_rouge', 'retain/rouge')
    """
    for start, group in GROUPS.items():
        if name.startswith(start):
            return group + name.removeprefix(start).replace("/", "_")
    return name


def title_of(name: str, metric: Any = None) -> Title:
    """Title of a metric.

    Args:
        name: Its name in results.json.
        metric: The metric or its class. If `name` is not in `TITLES`, its attributes `title`, `unit` and
            `higher_is_better` are used where it has them, after the split; else the name is the title.
    """
    if name in TITLES:
        return TITLES[name]
    title, split = getattr(metric, "title", None), name.rpartition("/")[0].replace("_", " ")
    short = f"{split} {title}".strip() if title else name
    return Title(name, short, getattr(metric, "unit", ""), getattr(metric, "higher_is_better", None))


def measured(models: Iterable[Mapping[str, float | None]], names: Iterable[str] = TITLES) -> list[str]:
    """Those of `names` that at least one model has a value of."""
    known = {name for metrics in models for name, value in metrics.items() if value is not None}
    return [name for name in names if name in known]


def table(
    heads: Sequence[str], rows: Iterable[tuple[Sequence[str], Mapping[str, float | None]]], names: Sequence[str]
) -> str:
    """Markdown table of metrics: labels under `heads`, then a column for each of `names`.

    Example:
        >>> print(table(["model"], [(["start"], {"model_utility": 0.51234})], ["model_utility", "privleak"]))
        | model | model utility | PrivLeak |
        |---|---|---|
        | start | 0.512 | - |
    """
    cells = [[*labels, *(number(metrics.get(name)) for name in names)] for labels, metrics in rows]
    return markdown.table([*heads, *(title_of(name).short for name in names)], cells)


def answers_at(temperature: float) -> str:
    """How answers were generated."""
    return f"answers sampled at temperature {temperature:g}" if temperature else "greedy answers"


def number(value: float | None) -> str:
    """A value for people: three digits, a power of ten if it is small, a dash if it is missing or NaN."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
