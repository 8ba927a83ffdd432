"""What relearning, rounding and sampling bring back from an unlearned model: as sentences, tables and curves."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simnpo_pl.metrics import titles
from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.runs.record import Run
from simnpo_pl.runs.verdict import KNOWN, LEFT, attacked_control
from simnpo_pl.utils import markdown

FORGET, SHOWN, OTHERS = "forget/probability", "forget/probability/relearned", "forget/probability/others"
RELEARNED = ("forget_quality", FORGET, SHOWN, OTHERS)
QUANTIZED = ("forget_quality", FORGET, "forget/rouge", "model_utility", "retain/probability")
LEARNED = 0.5
"""An attack is strong enough if it taught its own forget rows at least this share of what the model lacked of them."""


class Spread(NamedTuple):
    """Mean of a value over the `n` repeats, `of` all, that have one, and its sample standard deviation; 0 for one."""

    mean: float
    deviation: float
    n: int
    of: int = 0

    @property
    def known(self) -> str:
        """How many have a value, if not all do."""
        return f" ({self.n} of {self.of})" if self.n < self.of else ""

    def __str__(self) -> str:
        return number(self.mean) + (f" ± {number(self.deviation)}" if self.n > 1 else "") + self.known


class Peak(NamedTuple):
    """Where an attack brings back most: mean over its draws, rate and step, the mean before it, and all its steps."""

    value: float
    lr: float
    step: int
    before: float
    steps: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Over the repeats that have a value."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Spread(statistics.fmean(known), deviation, len(known), len(values))


def outcome(before: float, after: float, level: float | None, top: float | None, strong: bool = True) -> str:
    """What an attack did: `comes back`, `holds` or `inconclusive`, with thresholds of the verdict.

    It brings back what was forgotten if more than the share `LEFT` of what the model lacks returns, from `before` to
    the peak `after`, on the way to `top`, of a model that knows the rows. What the control reaches, too, `level`, is
    not counted. An attack is `strong` if it could have brought something back.
    """
    base = max(before, level or 0.0)
    if top is None or top - base < KNOWN:
        return "inconclusive"
    return "comes back" if (after - base) / (top - base) > LEFT else "holds" if strong else "inconclusive"


def judge(record: dict[str, Any]) -> None:
    """Give every attack of a results.json its `outcome`, and a `sentence` to one of those that belong together."""
    run = Run("", Path(), record)
    groups: dict[str, list[dict[str, Any]]] = {}
    # Versions before 0.2 did not tell relearned rows from others.
    relearning = [one for one in run.relearned if "step" in one["repeats"][0]["epochs"][0]]
    for attack in relearning:
        groups.setdefault(kind_of(attack), []).append(attack)
    taught = [attack for attack in relearning if attack["settings"]["subset"] in ("shortest", "random")]
    start, own = run.metrics("start").get(FORGET), peak(taught, SHOWN)
    # Without a start model, what the attack itself reached shows what a model that knows the rows would.
    top = start if start is not None else own and own.value
    for attacks in groups.values():
        _tell(attacks, *_relearned(attacks, top, is_learned(taught, start)))
    if rounded := record.get("quantized"):
        _tell(list(rounded.values()), *_rounded(run, rounded, top))
    for sample in run.sampled:
        _tell([sample], *_sampled(sample), attacked_control(sample))


def _tell(attacks: Sequence[dict[str, Any]], found: str, sentence: str, control: bool = True) -> None:
    """One sentence for attacks that belong together; without a `control` it says so, if rows come back."""
    for attack in attacks:
        attack["outcome"], attack["sentence"] = found, ""
    attacks[0]["sentence"] = f"{sentence}: {found}"
    if found == "comes back" and not control:
        caveat = "no control: a model that never saw the rows may reach this, too; give --retrained MODEL"
        attacks[0]["sentence"] += f"; {caveat}"


def peak(attacks: Sequence[Mapping[str, Any]], metric: str, role: str = "epochs") -> Peak | None:
    """Highest point of relearning attacks with the same rows, over all rates and epochs; None if it was not measured.

    `role` is `epochs` for the unlearned model, `control` for the retrained one.
    """
    found = []
    for attack in attacks:
        steps = [epoch["step"] for epoch in attack["repeats"][0]["epochs"]]
        curve = zip(steps, relearned(attack, metric, role).values(), strict=False)
        means = [(step, value.mean) for step, value in curve if value is not None]
        found += [Peak(mean, attack["settings"]["lr"], step, means[0][1], steps[-1]) for step, mean in means]
    return max(found, default=None)


def is_learned(attacks: Sequence[Mapping[str, Any]], top: float | None) -> bool:
    """Whether attacks with forget rows taught these rows; one that did not cannot tell.

    `top` is the probability of the answers for a model that knows them, such as the start model; None takes 1.
    """
    own = peak(attacks, SHOWN)
    return own is not None and own.value - own.before >= LEARNED * ((1.0 if top is None else top) - own.before)


def kind_of(attack: Mapping[str, Any]) -> str:
    """Number and kind of the different rows that were relearned."""
    kind = attack["settings"].get("text", attack["settings"]["subset"])
    return f"{len(set(attack['repeats'][0]['rows']))} {kind} rows"


def _relearned(attacks: Sequence[Mapping[str, Any]], top: float | None, strong: bool) -> tuple[str, str, bool]:
    """Outcome and sentence of relearning with one kind of rows, see `outcome`, and whether there was a control."""
    own, metric = peak(attacks, SHOWN), SHOWN if peak(attacks, OTHERS) is None else OTHERS
    found, text = peak(attacks, metric), f"relearning {kind_of(attacks[0])}"
    if found is None:
        return "inconclusive", f"{text}: the probability of the forget answers was not measured", True
    # Another rate, or fewer steps, would not bring the control as far.
    control = peak([one for one in attacks if peak([one], metric) == found], metric, "control")
    result = outcome(found.before, found.value, control and control.value, top, strong)
    apart = own is not None and metric == OTHERS
    highest = f", highest after {found.step}" if found.step < found.steps else ""
    text += f" (lr {found.lr:g}, {found.steps} steps{highest}): probability of the {'other ' if apart else ''}"
    text += f"forget answers {number(found.before)} -> {number(found.value)}"
    if control is not None:
        text += f", of the retrained model {number(control.before)} -> {number(control.value)}"
    if own is not None and apart:
        text += f"; of those relearned {number(own.value)}"
    if result == "inconclusive":
        text += "; too little was forgotten to come back" if strong else "; too weak, its own rows were not learned"
    return result, text, control is not None


def _rounded(run: Run, rounded: Mapping[str, Mapping[str, Any]], top: float | None) -> tuple[str, str]:
    kind = f"rounded weights ({', '.join(rounded)})"
    values = {name: entry["metrics"].get(FORGET) for name, entry in rounded.items()}
    known = {name: value for name, value in values.items() if value is not None}
    before, level = (run.metrics(model).get(FORGET) for model in ("final", "retrained"))
    if not known or before is None:
        return "inconclusive", f"{kind}: the probability of the forget answers was not measured"
    most = max(known, key=lambda name: known[name])
    text = f"{kind}: forget probability {number(before)} -> at most {number(known[most])} ({most})"
    text += "" if level is None else f", retrained model {number(level)}"
    return outcome(before, known[most], level, top), text


def _sampled(sample: Mapping[str, Any]) -> tuple[str, str]:
    settings, n = sample["settings"], sample["n"]
    most = f"leak@{settings['k']}"
    found, control = sample["prompts"]["any"][most], sample.get("control", {}).get("any", {}).get(most)
    ways = [kind for kind in sample["prompts"] if kind != "any"]
    text = f"sampled answers: one of {settings['k']} to each of {' and '.join(ways)} is right for "
    text += f"{round(found * n)} of {n} rows"
    text += "" if control is None else f", of the retrained model for {round(control * n)}"
    # A model that knows the rows answers them all.
    return outcome(0.0, found, control, 1.0), text


def relearned(attack: Mapping[str, Any], metric: str, role: str = "epochs") -> dict[int, Spread | None]:
    """Epoch of a relearning attack to a metric after it, over the draws."""
    epochs = zip(*(repeat[role] for repeat in attack["repeats"] if role in repeat), strict=True)
    return {draws[0]["epoch"]: spread([draw["metrics"].get(metric) for draw in draws]) for draws in epochs}


def relearning_table(runs: Sequence[Run]) -> str:
    """Relearning attacks as Markdown; a table for every number of epochs, learning rate and share of rows."""
    groups: dict[tuple[int, float, float], list[list[str]]] = {}
    for run in runs:
        for attack in run.relearned:
            settings, repeats = attack["settings"], attack["repeats"]
            rows = groups.setdefault((settings["epochs"], settings["lr"], settings["share"]), [])
            kind = f"{kind_of(attack)}, {len(repeats)} draws" if len(repeats) > 1 else kind_of(attack)
            for role, model in (("epochs", run.method), ("control", "retrained")):
                for name in RELEARNED:
                    values = relearned(attack, name, role).values()
                    if any(values):
                        cells = ["-" if value is None else str(value) for value in values]
                        rows.append([run.name, model, kind, title_of(name).short, *cells])
    tables = []
    for (last, lr, share), rows in sorted(groups.items()):
        heads = ["run", "model", "relearned", "measured", *(f"epoch {epoch}" for epoch in range(last + 1))]
        title = f"Relearning as many rows as {100 * share:g} % of the forget rows, lr {lr:g}, falling linearly to 0:"
        tables.append(f"{title}\n\n{markdown.table(heads, rows)}")
    return "\n\n".join(tables)


def quantized_table(runs: Sequence[Run]) -> str:
    """Metrics before and after the weights were quantized, as Markdown."""
    rows = [([run.name, run.method, name], metrics) for run in runs for name, metrics in run.quantized.items()]
    names = titles.measured((metrics for _, metrics in rows), QUANTIZED)
    return titles.table(["run", "method", "weights"], rows, names) if rows else ""


def leak_table(runs: Sequence[Run]) -> str:
    """leak@k of sampled answers by prompt, and the best ROUGE of k, as Markdown."""
    ks, rows = set(), []
    for run in runs:
        for sample in run.sampled:
            settings = sample["settings"]
            ks |= set(shown_ks(settings["k"]))
            labels = [f"{settings['temperature']:g}", str(settings["seed"]), str(sample["n"])]
            for role, model in (("prompts", run.method), ("control", "retrained")):
                for kind, leaks in sample.get(role, {}).items():
                    rows.append(([run.name, model, *labels, kind], leaks))
            best = {f"leak@{k}": sample["metrics"][f"best_rouge@{k}"] for k in shown_ks(settings["k"])}
            rows.append(([run.name, run.method, *labels, "question, best ROUGE"], best))
    heads = ["run", "model", "temperature", "seed", "rows", "prompt"]
    return titles.table(heads, rows, [f"leak@{k}" for k in sorted(ks)]) if rows else ""


def shown_ks(n: int) -> list[int]:
    """Numbers of answers of which leak@k is shown: powers of two, and all of them."""
    return sorted({*(2**i for i in range(n.bit_length())), n})


def sentences(run: Run) -> list[str]:
    """What the attacks on a run found."""
    attacks = [entry for group in ("relearn", "quantized", "leak") for entry in run.record.get(group, {}).values()]
    attacks.append(run.record.get("depth", {}))
    return [entry["sentence"] for entry in attacks if entry.get("sentence")]
