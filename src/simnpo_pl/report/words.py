"""A run in plain words, and the table of runs."""

from collections.abc import Sequence

from simnpo_pl.metrics import titles
from simnpo_pl.metrics.titles import number
from simnpo_pl.runs.record import Run


def measured(runs: Sequence[Run]) -> list[str]:
    """Metrics that a model of one of the runs has a value of."""
    names = [*titles.TITLES, *dict.fromkeys(name for run in runs for name in run.record.get("titles", {}))]
    return titles.measured((metrics for run in runs for metrics in run.models.values()), names)


def model_name(run: Run, model: str) -> str:
    if model == "final":
        return "unlearned" if run.unlearned else "evaluated"
    return model


def settings(run: Run) -> str:
    """The objective's settings and the weights of the losses."""
    if not run.unlearned:
        return ""
    objective = run.record["objective"]
    named = ", ".join(f"{name} {number(value)}" for name, value in objective["settings"].items() if value is not None)
    retain = objective["retain_loss"] or "no retain loss"
    weights = f"weights {number(objective['forget_weight'])} / {number(objective['retain_weight'])} ({retain})"
    return f"{named}; {weights}" if named else weights


def summary(run: Run) -> str:
    final, start, retrained = (run.metrics(model) for model in ("final", "start", "retrained"))
    sentences = ["A model, evaluated."]
    if run.unlearned:
        sentences = [f"{run.method} ({settings(run)}) on {run.forget_rows} rows of {run.forget_split}."]
    if not run.finished:
        sentences.append("The run is not finished.")
    now, before, unseen = (metrics.get("forget/probability") for metrics in (final, start, retrained))
    if now is not None:
        change = f"is {number(now)}" if before is None else f"went from {number(before)} to {number(now)}"
        compared = "" if unseen is None else f"; a model that never saw them gives {number(unseen)}"
        sentences.append(f"The probability of the answers to forget {change}{compared}.")
    p = final.get("forget_quality")
    if p is not None:
        verdict = "the test finds no difference" if p > 0.05 else "the test finds a difference"
        sentences.append(
            f"Forget quality, the p-value of a test against the retrained model, is {number(p)}: {verdict}."
        )
    utility, first = final.get("model_utility"), start.get("model_utility")
    if utility is not None:
        change = f", {100 * (utility / first - 1):+.0f} % against the start model" if first else ""
        sentences.append(f"Model utility is {number(utility)}{change}.")
    sentences += [f"Not measured: {name} ({reason})." for name, reason in run.record.get("unavailable", {}).items()]
    return " ".join(sentences)
