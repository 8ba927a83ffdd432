"""A run in plain words, and as a row of a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from simnpo_pl.runs.record import Run


class Column(NamedTuple):
    """A column of the table of runs."""

    key: str
    title: str
    hint: str


PARTS = [
    Column(f"{split}/{metric}", f"{title} {short}", f"part of model utility: {metric.replace('_', ' ')} on {title}")
    for split, title in (("retain", "retain"), ("real_authors", "authors"), ("world_facts", "facts"))
    for metric, short in (("rouge", "R"), ("probability", "P"), ("truth_ratio", "T"))
]
ATTACKS = [
    Column(
        f"mia_{name}",
        f"MIA {title}",
        f"membership inference by {what}: area under the curve, beside the retrained model's",
    )
    for name, title, what in (
        ("loss", "loss", "the loss"),
        ("zlib", "zlib", "the loss over the size when compressed"),
        ("min_k", "Min-K", "the least probable tokens"),
        ("min_k_plus_plus", "Min-K++", "the least probable tokens, standardised"),
        ("reference", "reference", "the loss against a reference model's"),
        ("gradnorm", "gradnorm", "the norm of the gradient"),
    )
]
COLUMNS = [
    Column("forget_quality", "forget quality", "p-value against the retrained model; above 0.05 not told apart"),
    Column("forget_quality/log10_p", "log10 p", "log10 of forget quality"),
    Column("forget_quality/ks_statistic", "KS", "largest gap between the two distributions of truth ratios, 0 to 1"),
    Column("model_utility", "model utility", "harmonic mean of the nine parts, 0 to 1"),
    Column("forget/probability", "forget P", "probability of the forgotten answers, per token"),
    Column("forget/rouge", "forget R", "ROUGE-L recall of greedy answers on the forget rows"),
    Column("forget/truth_ratio", "forget T", "mean of min(R, 1/R) of the truth ratio R on the forget rows"),
    Column("forget/extraction_strength", "ES", "extraction strength, 0 to 1"),
    Column("forget/exact_memorization", "EM", "exact memorization, 0 to 1"),
    Column("privleak", "PrivLeak", "membership inference against the retrained model; 0 is best"),
    *ATTACKS,
    Column("verbmem_forget", "VerbMem", "MUSE: ROUGE-L of continued forget passages, 0 to 100"),
    Column("knowmem_forget", "KnowMem forget", "MUSE: ROUGE-L of answers on the forget set, 0 to 100"),
    Column("knowmem_retain", "KnowMem retain", "MUSE: ROUGE-L of answers on the retain set, 0 to 100"),
    Column("forget/nll", "forget loss", "loss on forget documents, nats per token"),
    Column("retain/nll", "retain loss", "loss on retain documents, nats per token"),
    *PARTS,
]


def number(value: Any) -> str:
    """A value for people: three digits, or a power of ten where it is small."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def measured(runs: Sequence[Run]) -> list[Column]:
    """Columns that a model of one of the runs has a value for."""
    models = ("final", "start", "retrained")
    known = {key for run in runs for model in models for key, value in run.metrics(model).items() if value is not None}
    return [column for column in COLUMNS if column.key in known]


def method(run: Run) -> str:
    """Name of the objective, or what was done instead."""
    return run.record["objective"]["name"] if run.unlearned else "evaluation"


def settings(run: Run) -> str:
    """The objective's settings and the weights."""
    if not run.unlearned:
        return ""
    objective = run.record["objective"]
    named = ", ".join(f"{name} {number(value)}" for name, value in objective["settings"].items() if value is not None)
    retain = objective["retain_loss"] or "no retain loss"
    weights = f"weights {number(objective['forget_weight'])} / {number(objective['retain_weight'])} ({retain})"
    return f"{named}; {weights}" if named else weights


def split(run: Run) -> str:
    """The forget split."""
    return str(run.record["settings"].get("data", {}).get("init_args", {}).get("forget_split") or "forget")


def forget_rows(run: Run) -> int | None:
    """Rows that forget quality, or else the forget probability, rests on."""
    counts = run.record.get("counts", {})
    return counts.get("forget_quality", counts.get("forget/probability"))


def seconds(run: Run) -> float | None:
    """Wall time of the run."""
    return run.record.get("seconds", {}).get("total")


def memory(run: Run) -> float | None:
    """Peak memory, GiB: the device's where there is one, else the process's."""
    peaks = run.record.get("peak_memory_gib", {})
    return peaks.get("device", peaks.get("process"))


def summary(run: Run) -> str:
    """What happened, in a few sentences."""
    final, start, retrained = (run.metrics(model) for model in ("final", "start", "retrained"))
    n = forget_rows(run)
    said = [f"{method(run)} ({settings(run)}) on {n} rows of {split(run)}." if run.unlearned else "A model, evaluated."]
    if not run.record.get("finished"):
        said.append("The run is not finished.")
    now, before = final.get("forget/probability"), start.get("forget/probability")
    if now is not None:
        change = f"went from {number(before)} to {number(now)}" if before is not None else f"is {number(now)}"
        aside = retrained.get("forget/probability")
        beside = f"; a model that never saw them gives {number(aside)}" if aside is not None else ""
        said.append(f"The probability of the answers to forget {change}{beside}.")
    p = final.get("forget_quality")
    if p is not None:
        verdict = "the test does not tell the two apart" if p > 0.05 else "the test tells the two apart"
        said.append(f"Forget quality, the p-value of a test against the retrained model, is {number(p)}: {verdict}.")
    utility, had = final.get("model_utility"), start.get("model_utility")
    if utility is not None:
        lost = f", {100 * (utility / had - 1):+.0f} % against the start model" if had else ""
        said.append(f"Model utility is {number(utility)}{lost}.")
    missing = run.record.get("unavailable", {})
    said += [f"Not measured: {name} ({reason})." for name, reason in missing.items()]
    return " ".join(said)
