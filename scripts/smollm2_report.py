"""Tables, findings and figure of the study of SmolLM2, from its results.json.gz; see smollm2_study.py --report."""

import gzip
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_choice import DEGENERATE, choose
from smollm2_compare import CLAIMS, HOLDS, MEASURES, MISSING, OPPOSITE, UNKNOWN, Difference, Model, compare

from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.report.drawing import panels
from simnpo_pl.report.figures import GREY, PALETTE
from simnpo_pl.report.robustness import Spread, spread
from simnpo_pl.utils.files import write_text
from simnpo_pl.utils.markdown import table

FIGURE = "![Forget quality against model utility; forget probability while relearning](figures/smollm2.png)"
PARTS = [
    f"{split}/{part}"
    for split in ("retain", "real_authors", "world_facts")
    for part in ("probability", "rouge", "truth_ratio")
]


class Report:
    """Blocks of the page, by name."""

    def __init__(self, plan: dict[str, Any], results: dict[str, Any]) -> None:
        self.plan, self.results = plan, results
        seeds = plan["models"]
        self.reference = results[f"models/retrained-{seeds['retrained'][0]}"]
        self.groups = {
            "start": self._models(f"models/start-{seed}" for seed in seeds["start"]),
            "retrained, the reference": self._models([f"models/retrained-{seeds['retrained'][0]}"]),
            "retrained, other seeds": self._models(f"models/retrained-{seed}" for seed in seeds["retrained"][1:]),
        }
        pairs = [f"start{first}-seed{seed}" for first in seeds["start"] for seed in plan["seeds"]]
        self.methods = {
            method: {pair: model for pair in pairs for model in self._models([f"runs/{method}-{pair}"])}
            for method in plan["trials"]
        }
        self.groups |= {method: list(models.values()) for method, models in self.methods.items() if models}

    def _models(self, names: Iterable[str]) -> list[Model]:
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
            (entry,) = leak["found"].values()
            last = entry["settings"]["k"]
            sampled = [entry["metrics"][name] for name in ("leak@1", f"leak@{last}", f"best_rouge@{last}")]
            best = np.array(leak["best"])
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
        counts = ", ".join(f"{made.count(part)} {part}" for part in dict.fromkeys(made))
        devices = ", ".join(sorted({one["device"] for one in self.results.values()}))
        versions = {
            f"{name} {version}"
            for one in self.results.values()
            for name, version in one.get("results", {}).get("versions", {}).items()
        }
        fits = [one for name, one in self.results.items() if name.startswith(("trials/", "runs/"))]
        peaks = [one["results"]["peak_memory_gib"] for one in fits]
        memory = max((peak.get("device", peak["process"]) for peak in peaks), default=None)
        minutes = sum(one["wall_seconds"] for one in self.results.values()) / 60
        return (
            f"Finished tasks: {counts}. Device: {devices}; versions of the runs: {', '.join(sorted(versions))}. "
            "A run of unlearning with its evaluation took "
            f"{cell(spread([one['wall_seconds'] for one in fits]))} seconds beside other runs, and at most "
            f"{number(memory)} GiB; all tasks together took {minutes:.0f} minutes, several at a time."
        )

    def trials(self) -> str:
        """All trials, and which was chosen."""
        chosen = choose(self.plan, self.results)
        names = ("forget/probability", "forget_quality", "model_utility", DEGENERATE)
        rows = []
        for method, settings in self.plan["trials"].items():
            for place, words in enumerate(settings):
                for model in self._models([f"trials/{method}-{place}"]):
                    mark = "chosen" if chosen[method].number == place else ""
                    values = [number(model.metrics.get(name)) for name in names]
                    rows.append([method, settings_of(words), *values, number(chosen[method].scores[place]), mark])
        return table(["method", "settings", *(title_of(name).short for name in names), "score", ""], rows)

    def models(self) -> str:
        before = ("forget/probability", "forget/rouge", "forget/extraction_strength", "forget/exact_memorization")
        after = ("forget_quality/ks_statistic", "privleak", DEGENERATE, "model_utility")
        heads = ["model", "n", *(title_of(name).short for name in before), "forget quality", "above 0.05"]
        rows = []
        for name, models in self.groups.items():
            metrics = [model.metrics for model in models]
            quality = [m["forget_quality"] for m in metrics if m.get("forget_quality") is not None]
            shown = {key: cell(spread([m.get(key) for m in metrics])) for key in (*before, *after)}
            middle = ["-", "-"]
            if quality:
                middle = [number(statistics.median(quality)), f"{sum(q > 0.05 for q in quality)} of {len(quality)}"]
            rows.append([name, str(len(models)), *(shown[k] for k in before), *middle, *(shown[k] for k in after)])
        return table([*heads, *(title_of(name).short for name in after)], rows)

    def utility(self) -> str:
        rows = [
            [name, *(cell(spread([model.metrics.get(part) for model in models])) for part in PARTS)]
            for name, models in self.groups.items()
        ]
        return table(["model", *(title_of(part).short for part in PARTS)], rows)

    def attacks(self) -> str:
        """Before and after relearning, rounding and sampling."""
        heads = ["model", "forget prob.", "relearned, peak", "relearned, end", "KS before", "KS relearned"]
        heads += ["forget prob., 4 bits", "utility, 4 bits", "ROUGE, greedy", "leak@1", "leak@16", "best ROUGE of 16"]
        rows = []
        for name, models in self.groups.items():
            if not any(m.relearned or m.rounded or m.sampled for m in models):
                continue
            probability, ks = "forget/probability", "forget_quality/ks_statistic"
            curves = [m.relearned for m in models if m.relearned]
            rounded = [m.rounded for m in models if m.rounded]
            sampled = [m.sampled for m in models if m.sampled]
            values: list[list[float | None]] = [
                [m.metrics.get(probability) for m in models],
                [max(epoch[probability] for epoch in curve) for curve in curves],
                [curve[-1][probability] for curve in curves],
                [curve[0].get(ks) for curve in curves],
                [curve[-1].get(ks) for curve in curves],
                [m[probability] for m in rounded],
                [m.get("model_utility") for m in rounded],
                [m.metrics.get("forget/rouge") for m in models],
                *([m[place] for m in sampled] for place in range(3)),
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
        if difference is None:
            return MISSING
        return difference.verdict(MEASURES[measure].better)

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
        untold = verdicts.count(UNKNOWN)
        runs = self.groups.get("SimNPO", [])
        if not runs:
            return MISSING
        retrained = "retrained, the reference"
        passed = sum((run.metrics.get("forget_quality") or 0.0) > 0.05 for run in runs)
        return (
            f"On SmolLM2-135M and TOFU forget05, {len(runs)} runs of SimNPO left a forget probability of "
            f"{of('SimNPO', 'forget/probability')} (retrained model {of(retrained, 'forget/probability')}, start model "
            f"{of('start', 'forget/probability')}) at a model utility of {of('SimNPO', 'model_utility')} "
            f"({of(retrained, 'model_utility')}, {of('start', 'model_utility')}), and forget quality was above 0.05 in "
            f"{passed} of them. Of {len(CLAIMS)} claims of the paper {verdicts.count(HOLDS)} held, of "
            f"{verdicts.count(OPPOSITE)} the opposite was measured, {verdicts.count(MISSING)} were not measured, and "
            f"{untold} could not be told ([docs/results.md](docs/results.md))."
        )

    def draw(self, file: Path) -> None:
        """Forget quality against utility, and forget probability while relearning."""
        with panels(file, 1, 2, (3.6, 2.8)) as (_, ((left, right),)):
            for place, (name, models) in enumerate(self.groups.items()):
                method = name in self.methods
                color = PALETTE[place % len(PALETTE)] if method else GREY
                marker = "o" if method else {"start": "s", "retrained, other seeds": "*"}.get(name)
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
            right.xaxis.get_major_locator().set_params(integer=True)
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

    def filled(found: re.Match[str]) -> str:
        return f"{found[1]}{blocks[found[2]]}\n{found[3]}"

    return re.sub(r"(<!-- smollm2 (\w+) -->\n).*?(<!-- /smollm2 \2 -->)", filled, text, flags=re.DOTALL)


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
