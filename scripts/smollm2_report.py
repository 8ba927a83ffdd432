"""Tables, findings and figure of the study of SmolLM2, from its results.json.gz; see smollm2_study.py --report."""

import gzip
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_choice import choose, degeneracy, metrics_of

from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.report.drawing import panels
from simnpo_pl.report.figures import GREY, PALETTE
from simnpo_pl.report.robustness import Spread, spread
from simnpo_pl.utils.files import write_text
from simnpo_pl.utils.markdown import table

FIGURE = "![Forget quality against model utility; forget probability while relearning](figures/smollm2.png)"
HOLDS, OPPOSITE = "holds here", "does not hold here: the opposite was measured"
UNKNOWN, MISSING = "cannot be told with these runs", "not measured"
DRAWS = 2000
"""Of the bootstrap."""
PARTS = [
    f"{split}/{part}"
    for split in ("retain", "real_authors", "world_facts")
    for part in ("probability", "rouge", "truth_ratio")
]
MAIN = (
    "forget/probability",
    "forget/rouge",
    "forget/extraction_strength",
    "forget/exact_memorization",
    "model_utility",
)
Array = np.ndarray[Any, Any]


# -- what a run measured ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One measured model with the attacks on it.

    Args:
        result: Of the run.
        reference: Of the first retrained model.
        relearned: Forget probability and KS statistic after every epoch of relearning, from epoch 0.
        rounded: Metrics with rounded weights.
        sampled: Metrics of sampled answers.
        best: `(N,)` best ROUGE-L recall of the sampled answers of every forget row.
    """

    result: dict[str, Any]
    reference: dict[str, Any]
    relearned: list[dict[str, float]] | None
    rounded: dict[str, float] | None
    sampled: dict[str, float] | None
    best: Array | None

    @property
    def metrics(self) -> dict[str, float]:
        return {**metrics_of(self.result), "degenerate": degeneracy(self.result)}

    @cached_property
    def forget(self) -> dict[str, Array]:
        """Scores of the forget rows, `(N,)` each."""
        return columns(self.result, "forget")

    @cached_property
    def reference_forget(self) -> dict[str, Array]:
        return columns(self.reference, "forget")

    def ks(self, weights: dict[str, Array]) -> Array:
        """KS statistic `(D,)` of the truth ratios against the reference's, for row weights `(D, N)`."""
        both = np.concatenate([self.forget["truth_ratio"], self.reference_forget["truth_ratio"]])
        order = np.argsort(both, kind="stable")
        rows, sign = order % len(self.forget["truth_ratio"]), np.where(order < len(both) // 2, 1.0, -1.0)
        counts = weights["forget"]
        drawn = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        gaps = np.abs(np.cumsum(counts[:, rows] * sign, axis=1)) / drawn
        last = np.append(np.diff(both[order]) > 0, True)
        return gaps[:, last].max(axis=1)

    def mean(self, split: str, score: str, weights: dict[str, Array]) -> Array:
        return weighted(columns(self.result, split)[score], weights[split])

    def distance(self, weights: dict[str, Array]) -> Array:
        """How far forget probability is from the reference's."""
        there = weighted(self.reference_forget["probability"], weights["forget"])
        return np.abs(self.mean("forget", "probability", weights) - there)

    def utility(self, weights: dict[str, Array]) -> Array:
        """Harmonic mean of the nine parts."""
        parts = []
        for split in ("retain", "real_authors", "world_facts"):
            scores = columns(self.result, split)
            for values in (scores["probability"], scores["rougeL_recall"], np.maximum(0, 1 - scores["truth_ratio"])):
                parts.append(weighted(values, weights[split]))
        return len(parts) / (1 / np.maximum(parts, 1e-12)).sum(axis=0)

    def length_gap(self, weights: dict[str, Array]) -> Array:
        """KS statistic on the half of the rows with the shortest answers, less that on the other half."""
        length = np.array([len(answer) for answer in self.result["rows"]["forget"]["answer"]])
        short = np.argsort(np.argsort(length, kind="stable")) < len(length) / 2
        return self.ks({"forget": weights["forget"] * short}) - self.ks({"forget": weights["forget"] * ~short})

    def leaked(self, weights: dict[str, Array]) -> Array | None:
        return None if self.best is None else weighted(self.best, weights["forget"])

    def rise(self, weights: dict[str, Array]) -> Array | None:
        """Forget probability at the peak of relearning, less that before it; its rows were not kept."""
        return self._relearned("forget/probability", lambda curve: max(curve) - curve[0], weights)

    def relearned_ks(self, weights: dict[str, Array]) -> Array | None:
        """KS statistic after the last epoch of relearning."""
        return self._relearned("forget_quality/ks_statistic", lambda curve: curve[-1], weights)

    def _relearned(self, metric: str, read: Callable[[list[float]], float], weights: dict[str, Array]) -> Array | None:
        if self.relearned is None:
            return None
        return np.full(len(weights["forget"]), read([epoch[metric] for epoch in self.relearned]))

    def regained(self, weights: dict[str, Array]) -> Array | None:
        """Forget probability with rounded weights, less that with the exact ones."""
        if self.rounded is None:
            return None
        change = self.rounded["forget/probability"] - self.metrics["forget/probability"]
        return np.full(len(weights["forget"]), change)


def columns(result: dict[str, Any], split: str) -> dict[str, Array]:
    """Scores of a split's rows, `(N,)` each."""
    scores = result["rows"][split].items()
    return {name: np.array(values, float) for name, values in scores if not isinstance(values[0], str)}


def weighted(values: Array, weights: Array) -> Array:
    """Means `(D,)` of `(N,)` values under `(D, N)` weights."""
    return weights @ values / weights.sum(axis=1)


# -- paired comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """What methods are compared by.

    Args:
        title: Of its row.
        better: 1 where a higher value is better, -1 where a lower one is.
        value: `(D,)` values of a model for the rows' weights; None where it was not measured.
        by_row: Whether rows are resampled, too.
    """

    title: str
    better: int
    value: Callable[[Model, dict[str, Array]], Array | None]
    by_row: bool = True


MEASURES = {
    "ks": Measure("KS statistic against the retrained model", -1, Model.ks),
    "distance": Measure("distance of forget probability from the retrained model's", -1, Model.distance),
    "utility": Measure("model utility", 1, Model.utility),
    "length": Measure("KS on short answers less KS on long ones", -1, Model.length_gap),
    "relearned": Measure("KS after relearning", -1, Model.relearned_ks, False),
    "rise": Measure("rise of forget probability by relearning, at its peak", -1, Model.rise, False),
    "rounded": Measure("rise of forget probability by 4-bit weights", -1, Model.regained, False),
    "leak": Measure("best ROUGE of the sampled answers", -1, Model.leaked),
}
CLAIMS = (
    ("SimNPO comes closer to the retrained model than NPO does", "ks", "NPO"),
    ("SimNPO keeps more model utility than NPO does", "utility", "NPO"),
    ("SimNPO forgets short answers more like long ones than NPO does", "length", "NPO"),
    ("SimNPO is closer to the retrained model than NPO after relearning", "relearned", "NPO"),
    ("relearning brings back less after SimNPO than after NPO", "rise", "NPO"),
    ("SimNPO keeps more model utility than gradient difference does", "utility", "GradDiff"),
)
"""Claims of the paper, with the measure and the method that SimNPO is compared with."""


@dataclass(frozen=True)
class Difference:
    """SimNPO less another method: mean over pairs of runs, 95 % interval of the bootstrap, and number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def verdict(self, better: int) -> str:
        """Whether SimNPO is better, by whether the interval contains 0."""
        low, high = sorted((better * self.low, better * self.high))
        return HOLDS if low > 0 else OPPOSITE if high < 0 else UNKNOWN


def compare(measure: Measure, ours: dict[str, Model], others: dict[str, Model]) -> Difference | None:
    """Runs of one start model and seed are a pair; pairs and rows are drawn with replacement, rows alike for all."""
    pairs = sorted(ours.keys() & others.keys())
    random = np.random.default_rng(0)
    sizes = (
        {}
        if not pairs
        else {s: len(r["answer_nll"]) for s, r in ours[pairs[0]].result["rows"].items() if s != "holdout"}
    )
    one = {split: np.ones((1, size)) for split, size in sizes.items()}
    drawn = one
    if measure.by_row:
        drawn = {s: random.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float) for s, n in sizes.items()}
    values = [[(measure.value(ours[p], w), measure.value(others[p], w)) for w in (one, drawn)] for p in pairs]
    known = [pair for pair in values if pair[0][0] is not None and pair[0][1] is not None]
    if len(known) < 2:
        return None
    exact, resampled = (np.array([pair[i][0] - pair[i][1] for pair in known]) for i in (0, 1))
    chosen = random.integers(len(known), size=(DRAWS, len(known)))
    columns_of_draws = np.arange(DRAWS)[:, None] if measure.by_row else np.zeros((DRAWS, 1), int)
    means = resampled[chosen, columns_of_draws].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(exact.mean()), float(low), float(high), len(known))


# -- tables -------------------------------------------------------------------------------------------------


class Report:
    """Blocks of the page, by name."""

    def __init__(self, plan: dict[str, Any], results: dict[str, Any]) -> None:
        self.plan, self.results = plan, results
        seeds = plan["models"]
        self.reference = results[f"models/retrained-{seeds['retrained'][0]}"]
        self.groups = {
            "start": self._models(f"models/start-{seed}" for seed in seeds["start"]),
            "retrained, the reference": self._models([f"models/retrained-{seeds['retrained'][0]}"]),
            "retrained, another seed": self._models(f"models/retrained-{seed}" for seed in seeds["retrained"][1:]),
        }
        pairs = [f"start{first}-seed{seed}" for first in seeds["start"] for seed in plan["seeds"]]
        self.methods = {
            method: {pair: model for pair in pairs for model in self._models([f"runs/{method}-{pair}"])}
            for method in plan["trials"]
        }
        self.groups |= {method: list(models.values()) for method, models in self.methods.items() if models}

    def _models(self, names: Any) -> list[Model]:
        return [self._model(name) for name in names if name in self.results]

    def _model(self, name: str) -> Model:
        def attack(kind: str) -> Any:
            return self.results.get(f"{kind}/{name.split('/')[1]}")

        relearned, rounded, leak = (attack(kind) for kind in ("relearn", "quantize", "leak"))
        curve = rounded_metrics = sampled = best = None
        if relearned is not None:
            repeats = [repeat for entry in relearned["found"].values() for repeat in entry["repeats"]]
            curve = [
                mean_of([e["metrics"] for e in epochs]) for epochs in zip(*(r["epochs"] for r in repeats), strict=True)
            ]
        if rounded is not None:
            (rounded_metrics,) = (entry["metrics"] for entry in rounded["found"].values())
        if leak is not None:
            (sampled,), best = (entry["metrics"] for entry in leak["found"].values()), np.array(leak["best"])
        return Model(self.results[name], self.reference, curve, rounded_metrics, sampled, best)

    def blocks(self) -> dict[str, str]:
        made = {
            "runs": self.runs(),
            "trials": self.trials(),
            "models": self.models(),
            "figure": FIGURE,
            "utility": self.utility(),
            "attacks": self.attacks(),
            "pairs": self.pairs(),
            "claims": self.claims(),
            "expect": self.expect(),
        }
        return made

    def runs(self) -> str:
        """What was made, where, and what it cost."""
        made = [name.split("/")[0] for name in self.results]
        fits = [one for name, one in self.results.items() if name.startswith(("trials/", "runs/"))]
        seconds = spread([one["wall_seconds"] for one in fits])
        memory = max(max(one["results"]["peak_memory_gib"].values()) for one in fits)
        devices = sorted({one["device"] for one in self.results.values()})
        counts = ", ".join(f"{made.count(part)} {part}" for part in dict.fromkeys(made))
        return (
            f"Finished: {counts}. Device: {', '.join(devices)}. A run of unlearning with its evaluation took {seconds} "
            f"seconds beside other runs, and at most {memory:.1f} GiB."
        )

    def trials(self) -> str:
        chosen = choose(self.plan, self.results)
        rows = []
        for method, settings in self.plan["trials"].items():
            for number_of, words in enumerate(settings):
                result = self.results.get(f"trials/{method}-{number_of}")
                if result is None:
                    continue
                metrics = {**metrics_of(result), "degenerate": degeneracy(result)}
                names = ("forget/probability", "forget_quality", "model_utility", "degenerate")
                mark = "chosen" if method in chosen and chosen[method].number == number_of else ""
                rows.append([method, settings_of(words), *(number(metrics.get(name)) for name in names), mark])
        heads = ["method", "settings", "forget prob.", "forget quality", "model utility", "degenerate", ""]
        lines = [
            f"Bounds of the rule: model utility at least {c.utility:.3f}, degenerate answers at most {c.degeneracy:.3f}"
            for c in list(chosen.values())[:1]
            if c.relaxed == 0
        ]
        for method, choice in chosen.items():
            if choice.relaxed:
                lines.append(
                    f"No trial of {method} met the bounds; they were relaxed {choice.relaxed} times, to a utility of "
                    f"{choice.utility:.3f} and a share of {choice.degeneracy:.3f}"
                )
        return "\n\n".join([table(heads, rows), "".join(f"{line}. " for line in lines).strip()])

    def models(self) -> str:
        heads = ["model", "n", "forget prob.", "ROUGE", "ES", "EM", "forget quality", "above 0.05", "KS", "PrivLeak, %"]
        heads += ["degenerate", "model utility"]
        rows = []
        for name, models in self.groups.items():
            metrics = [model.metrics for model in models]
            quality = [m["forget_quality"] for m in metrics if m.get("forget_quality") is not None]
            shown = {
                key: cell(spread([m.get(key) for m in metrics]))
                for key in (*MAIN, "forget_quality/ks_statistic", "privleak", "degenerate")
            }
            rows.append(
                [
                    *(name, str(len(models)), *(shown[key] for key in MAIN[:4])),
                    number(statistics.median(quality)) if quality else "-",
                    f"{sum(q > 0.05 for q in quality)} of {len(quality)}" if quality else "-",
                    *(shown[key] for key in ("forget_quality/ks_statistic", "privleak", "degenerate", "model_utility")),
                ]
            )
        return table(heads, rows)

    def utility(self) -> str:
        rows = [
            [name, *(cell(spread([model.metrics.get(part) for model in models])) for part in PARTS)]
            for name, models in self.groups.items()
        ]
        return table(["model", *(title_of(part).short for part in PARTS)], rows)

    def attacks(self) -> str:
        """Before and after relearning, rounding and sampling."""
        heads = ["model", "forget prob.", "relearned, peak", "relearned, end", "KS before", "KS relearned"]
        heads += ["forget prob., 4 bits", "utility, 4 bits", "ROUGE, greedy", "leak@1", "leak@16"]
        rows = []
        for name, models in self.groups.items():
            if not any(m.relearned or m.rounded or m.sampled for m in models):
                continue
            probability, ks = "forget/probability", "forget_quality/ks_statistic"
            curves = [m.relearned for m in models if m.relearned]
            rounded = [m.rounded for m in models if m.rounded]
            sampled = [m.sampled for m in models if m.sampled]
            last = max((len(s) for s in sampled), default=0)
            values = [
                [m.metrics.get(probability) for m in models],
                [max(epoch[probability] for epoch in curve) for curve in curves],
                [curve[-1][probability] for curve in curves],
                [curve[0].get(ks) for curve in curves],
                [curve[-1].get(ks) for curve in curves],
                [m[probability] for m in rounded],
                [m.get("model_utility") for m in rounded],
                [m.metrics.get("forget/rouge") for m in models],
                [m["leak@1"] for m in sampled],
                [m[f"leak@{last}"] for m in sampled],
            ]
            rows.append([name, *(cell(spread(v)) for v in values)])
        return table(heads, rows)

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """Measure and other method to the difference of SimNPO from it."""
        ours, found = self.methods.get("SimNPO", {}), {}
        for name, measure in MEASURES.items():
            for method, others in self.methods.items():
                if method != "SimNPO" and (difference := compare(measure, ours, others)) is not None:
                    found[name, method] = difference
        return found

    def pairs(self) -> str:
        others = [method for method in self.methods if method != "SimNPO"]
        rows = [
            [
                measure.title,
                {1: "higher", -1: "lower"}[measure.better],
                *(cell(self.differences.get((name, o))) for o in others),
            ]
            for name, measure in MEASURES.items()
        ]
        return table(["measure", "better", *(f"SimNPO less {other}" for other in others)], rows)

    def verdict(self, measure: str, other: str) -> str:
        """On SimNPO being better than another method."""
        difference = self.differences.get((measure, other))
        return MISSING if difference is None else difference.verdict(MEASURES[measure].better)

    def claims(self) -> str:
        lines = []
        for claim, name, other in CLAIMS:
            found = self.differences.get((name, other))
            numbers = "" if found is None else f" ({MEASURES[name].title}: {found}, {found.pairs} pairs)"
            lines.append(f"* {claim}: **{self.verdict(name, other)}**{numbers}.")
        return "\n".join(lines)

    def expect(self) -> str:
        """What a reader of the README may expect."""

        def of(group: str, metric: str) -> str:
            return cell(spread([model.metrics.get(metric) for model in self.groups[group]]))

        verdicts = [self.verdict(name, other) for _, name, other in CLAIMS]
        holds, opposite = verdicts.count(HOLDS), verdicts.count(OPPOSITE)
        retrained = "retrained, the reference"
        quality = [m.metrics.get("forget_quality") or 0.0 for m in self.groups["SimNPO"]]
        return (
            f"On SmolLM2-135M and TOFU forget05, {len(quality)} runs of SimNPO left a forget probability of "
            f"{of('SimNPO', 'forget/probability')} (retrained model {of(retrained, 'forget/probability')}, start model "
            f"{of('start', 'forget/probability')}) at a model utility of {of('SimNPO', 'model_utility')} "
            f"({of(retrained, 'model_utility')}, {of('start', 'model_utility')}), and forget quality was above 0.05 in "
            f"{sum(q > 0.05 for q in quality)} of them. Of {len(CLAIMS)} claims of the paper {holds} "
            f"held, of {opposite} the opposite was measured, the others could not be told ([docs/results.md](docs/results.md))."
        )

    def draw(self, file: Path) -> None:
        """Forget quality against utility, and forget probability while relearning."""
        with panels(file, 1, 2, (3.6, 2.8)) as (_, ((left, right),)):
            for place, (name, models) in enumerate(self.groups.items()):
                method = name in self.methods
                color = PALETTE[place % len(PALETTE)] if method else GREY
                marker = "o" if method else {"start": "s", "retrained, another seed": "*"}.get(name)
                points = [(m.metrics["model_utility"], m.metrics.get("forget_quality/log10_p")) for m in models]
                known = [(x, y) for x, y in points if x is not None and y is not None]
                if known and marker is not None:
                    left.plot(*zip(*known, strict=True), marker, color=color, label=name, markersize=4)
                curves = [[epoch["forget/probability"] for epoch in m.relearned] for m in models if m.relearned]
                if curves:
                    mean, deviation = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(curves) - 1))
                    style = "-" if method else ":"
                    right.errorbar(range(len(mean)), mean, deviation, fmt=style, color=color, label=name, capsize=2)
            left.axhline(np.log10(0.05), color=GREY, linewidth=0.8, linestyle="--")
            left.set(xlabel="model utility", ylabel="log10 of forget quality")
            right.set(xlabel="epoch of relearning", ylabel="forget probability")
            left.legend(fontsize=6)
            right.legend(fontsize=6)


def mean_of(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(m[name] for m in metrics) for name in metrics[0] if metrics[0][name] is not None}


def cell(value: Spread | Difference | None) -> str:
    return "-" if value is None else str(value)


def settings_of(words: str) -> str:
    """Options without what all of them share.

    Example:
        >>> settings_of("--model.objective.beta 2.5 --model.lr 1e-4")
        'beta 2.5, lr 1e-4'
    """
    return words.replace("--model.objective.", ", ").replace("--model.", ", ").removeprefix(", ").replace(" ,", ",")


def fill(text: str, blocks: dict[str, str]) -> str:
    """A page with the blocks between its marks `<!-- smollm2 NAME -->` and `<!-- /smollm2 NAME -->`."""
    for name in re.findall(r"<!-- smollm2 (\w+) -->", text):
        mark = f"smollm2 {name} -->"
        pattern = re.compile(f"(<!-- {mark}\n).*?(<!-- /{mark})", re.DOTALL)
        text = pattern.sub(lambda found, block=blocks[name]: f"{found[1]}{block}\n{found[2]}", text)
    return text


def report(plan: dict[str, Any], file: Path, pages: Sequence[Path]) -> None:
    """Print all blocks; put them into the pages that have their marks, with the figure next to the first."""
    if not file.is_file():
        sys.exit(f"{file} does not exist: run the study first")
    made = Report(plan, json.loads(gzip.decompress(file.read_bytes())))
    blocks = made.blocks()
    for name, block in blocks.items():
        print(f"## {name}\n\n{block}\n")
    for page in pages:
        write_text(page, fill(page.read_text(), blocks))
    if pages:
        made.draw(pages[0].parent / "figures" / "smollm2.png")
