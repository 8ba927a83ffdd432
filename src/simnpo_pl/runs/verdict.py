"""Did it work? One verdict on a run, computed from its results.json alone.

`results.json` holds it under `verdict`: a `category`, and sentences on its `reasons`, what is `untested`, and `advice`.
Whoever adds results to a run computes it again. Attacks, the entries of `relearn`, `quantized` and `leak`, join it by
their `outcome` (`comes back`, `holds` or `inconclusive`) and `sentence`. docs/metrics.md explains the thresholds.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from simnpo_pl.metrics.titles import answers_at, number, title_of
from simnpo_pl.utils.files import finite

CATEGORIES = ("forgotten", "partly forgotten", "not forgotten", "over-forgotten", "model damaged", "inconclusive")

LEFT, VERBATIM_LEFT = 0.25, 0.05
"""Forgotten: at most this share of the start model's lead over the retrained one remains."""
UNMOVED = 0.9
"""Not forgotten: at least this share is left by every metric."""
VERBATIM_UNMOVED = 0.5
"""Not forgotten: more than this share is left of the answers that are given word for word."""
KNOWN = 0.1
"""A metric counts only if the start model knows more than the retrained one by this."""
BELOW = 0.2
"""Over-forgotten: less than this share of the retrained model's value."""
DEGENERATE = 0.2
"""Over-forgotten, or damaged where it is about kept rows: more degenerate answers than this share of all."""
KEPT = 0.75
"""Damaged: less than this share is left of what the start and the retrained model both know."""
FORGET = ("forget/verbatim", "forget/probability", "forget/extraction_strength", "verbmem_forget", "knowmem_forget")
COMPARED = ("forget/rouge", "forget/truth_ratio", "forget/exact_memorization", "forget/nll")
"""Metrics that tell something only beside a retrained model."""
MAIN = ("forget/probability", "verbmem_forget", "knowmem_forget", "forget/nll")
ALSO = ("forget/extraction_strength", *COMPARED[:-1])
"""Metrics of forget rows. MAIN: always reported; ALSO: only if more than `LEFT` is left."""
KEEP = ("model_utility", "retain/probability", "knowmem_retain", "retain/nll", "probe/nll")
WORDS = {
    "forget/probability": "forget probability",
    "forget/extraction_strength": "extraction strength",
    "retain/probability": "kept answers",
    "probe/nll": "loss on general text",
}
ATTACKS = {"relearn": "relearning", "quantized": "rounded weights", "leak": "sampled answers"}
"""Entry of results.json to what it tests."""
FORMATS = {"8-bit": "8 bits", "4-bit": "4 bits", "nf4": "NF4"}
"""Beginning of a name in `quantized` to what the weights were rounded to."""


class Change(NamedTuple):
    """A metric of the three models, higher for more knowledge, a loss as the probability of a token; None: unknown."""

    name: str
    start: float | None
    final: float | None
    retrained: float | None

    @property
    def left(self) -> float | None:
        """Share of what the start model knew more than the retrained one, or than nothing; None if that is little."""
        if self.start is None or self.final is None:
            return None
        known = self.start - (self.retrained or 0.0)
        return (self.final - (self.retrained or 0.0)) / known if known >= KNOWN else None

    @property
    def kept(self) -> float | None:
        """Share of what start and retrained model both know; None if that is little."""
        if self.start is None or self.final is None:
            return None
        known = min(self.start, self.start if self.retrained is None else self.retrained)
        return self.final / known if known >= KNOWN or (self.name.endswith("nll") and known > 0) else None


class Verdict:
    """Reads the results of a run; see `verdict`."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        # As the file has it, where what is not finite is null.
        self.record = record = finite(record)
        self.models = {name: (record.get(name) or {}).get("metrics", {}) for name in ("start", "final", "retrained")}
        self.attacks = [(group, entry) for group in ATTACKS for entry in record.get(group, {}).values()]

    def change(self, name: str) -> Change:
        levels = [_level(name, metrics.get(name)) for metrics in self.models.values()]
        options = self.record.get("settings", {}).get("eval", {})
        if name == "forget/truth_ratio" and options.get("truth_ratio") != "prob_mean":
            # Right and wrong answers are equally likely at 1.
            levels = [None if level is None else 1 - level for level in levels]
        return Change(name, *levels)

    def splits(self, ending: str, kept: bool) -> list[str]:
        """Metrics with this ending of rows to keep, or to forget."""
        names = [name for name in self.models["final"] if name.endswith(f"/{ending}")]
        return [name for name in names if ("forget" not in name) == kept]

    def left(self) -> dict[str, float]:
        """What is left of the forget rows, by the metrics that tell it."""
        changes = [self.change(name) for name in FORGET]
        changes += [change for change in map(self.change, COMPARED) if change.retrained is not None]
        return {change.name: change.left for change in changes if change.left is not None}

    def category(self) -> str:
        if not self.models["start"] or not self.models["final"]:
            return "inconclusive"
        if self.broken() or self.damaged():
            return "model damaged"
        left = self.left()
        if not left:
            # A loss that does not move shows that nothing was forgotten; one that moves shows little.
            _, start, final, retrained = self.change("forget/nll")
            unmoved = start and final is not None and start > (retrained or 0.0) and final / start >= UNMOVED
            return "not forgotten" if unmoved else "inconclusive"
        if min(left.values()) >= UNMOVED or left.get("forget/verbatim", 0.0) > VERBATIM_UNMOVED:
            return "not forgotten"
        if self.over():
            return "over-forgotten"
        return "forgotten" if self.gone() and not self.back() else "partly forgotten"

    def gone(self) -> bool:
        limits = {"forget/verbatim": VERBATIM_LEFT}
        return all(value <= limits.get(name, LEFT) for name, value in self.left().items())

    def back(self) -> list[str]:
        """Attacks that brought rows back."""
        return list(dict.fromkeys(group for group, entry in self.attacks if entry.get("outcome") == "comes back"))

    def broken(self) -> bool:
        """Whether a score that the start model has is not a number any more."""
        start, final = self.models["start"], self.models["final"]
        names = [name for name in (*FORGET, *KEEP) if name in final]
        return any(_level(name, final[name]) is None and _level(name, start.get(name)) is not None for name in names)

    def damaged(self) -> list[str]:
        """Metrics by which the model lost what it should keep."""
        low = [name for name in KEEP if (kept := self.change(name).kept) is not None and kept < KEPT]
        return low + self._degenerates(kept=True)

    def over(self) -> list[str]:
        """Metrics by which it lacks more than a model that never saw the rows, or says nothing sensible of them."""
        changes = map(self.change, ("forget/probability", "verbmem_forget", "knowmem_forget"))
        low = [
            one.name
            for one in changes
            if one.final is not None and one.retrained is not None and one.final < BELOW * one.retrained
        ]
        return low + self._degenerates(kept=False)

    def _degenerates(self, kept: bool) -> list[str]:
        return [name for name in self.splits("degenerate", kept) if self._rises(name, DEGENERATE)]

    def _rises(self, name: str, by: float = 0.0) -> bool:
        """Whether a metric is higher than the retrained model's, or than the start model's without one or if kept."""
        _, start, final, retrained = self.change(name)
        usual = max(start or 0.0, retrained or 0.0) if retrained is None or "forget" not in name else retrained
        return final is not None and final - usual > by

    # -- in words --------------------------------------------------------------------------------------------------

    def reasons(self, category: str) -> list[str]:
        """The numbers it rests on; first those that decided that the model is damaged or over-forgotten."""
        if not self.models["final"]:
            return ["the final model was not evaluated"]
        if not self.models["start"]:
            return ["there is no start model to compare with"]
        found = ["a score of the final model is not a number"] if self.broken() else []
        kept = self.change("retain/probability").start
        if kept is not None and kept < KNOWN:
            found.append(f"the start model did not know the rows to keep (retain probability {number(kept)})")
        if rows := self.record.get("settings", {}).get("data", {}).get("init_args", {}).get("forget_rows"):
            found.append(f"all forget rows were measured; rows to be forgotten: {len(rows)}")
        left = self.left()
        if not left:
            found.append("no measured metric shows that the start model knew the forget rows")
        also = [name for name in ALSO if left.get(name, 0.0) > LEFT]
        names = [*self.splits("verbatim", kept=False), *MAIN, *also, *KEEP, *self.splits("degenerate", kept=False)]
        names += [name for name in self.splits("degenerate", kept=True) if self._rises(name)]
        decided = {"model damaged": self.damaged, "over-forgotten": self.over}.get(category, list)()
        found += [self._said(name) for name in dict.fromkeys([*decided, *names])]
        if temperature := self.record.get("settings", {}).get("eval", {}).get("temperature"):
            found.append(f"measured on {answers_at(temperature)}")
        quality = self.models["final"].get("forget_quality")
        if quality is not None:
            differs = "no difference from" if quality > 0.05 else "a difference to"
            finds = f"the test finds {differs} the retrained model"
            if quality > 0.05 and (chance := self.record.get("forget_quality_chance")):
                times = f"{round(100 * chance['power'])} times in 100"
                finds += f"; at {chance['n']} rows it would tell a half-unlearned model apart {times}"
            found.append(f"forget quality {number(quality)}: {finds}")
        found.append(self.record.get("depth", {}).get("sentence", ""))
        found += [entry.get("sentence", "") for _, entry in self.attacks]
        return [sentence for sentence in found if sentence]

    def _said(self, name: str) -> str:
        if name.endswith("/verbatim"):
            return self._count(name, "still given word for word")
        if name.endswith("/degenerate"):
            return self._count(name, "degenerate", "repetitive or empty; ")
        start, final, unseen = (metrics.get(name) for metrics in self.models.values())
        if start is None or final is None:
            return ""
        beside = "" if unseen is None else f" (retrained model {number(unseen)})"
        words = neutral_prompts(self.record, name) or WORDS.get(name) or title_of(name).short
        return f"{words} {number(start)} -> {number(final)}{beside}"

    def _count(self, name: str, what: str, meaning: str = "") -> str:
        """A share of rows as a count of them."""
        n = self.record.get("counts", {}).get(name)
        final = self.models["final"][name]
        if n is None or final is None:
            return ""
        others = {model: self.models[model].get(name) for model in ("start", "retrained")}
        beside = ", ".join(f"{model} model {round(v * n)}" for model, v in others.items() if v is not None)
        split = name.rsplit("/", 1)[0].replace("_", " ")
        return f"{round(final * n)} of {n} {split} answers are {what}{f' ({meaning}{beside})' if beside else ''}"

    def untested(self) -> list[str]:
        """What could still change the verdict."""
        held = {group for group, entry in self.attacks if entry.get("outcome") in ("comes back", "holds")}
        found = [words for group, words in ATTACKS.items() if group not in held]
        if "quantized" in held:
            others = [key for key in FORMATS if not any(name.startswith(key) for name in self.record["quantized"])]
            found += [f"weights rounded to {FORMATS[key]}" for key in others]
        found += [] if "depth" in self.record else ["hidden states"]
        if not self.models["retrained"] and not any(attacked_control(entry) for _, entry in self.attacks):
            found.append("what a model that never saw the rows would answer (no retrained model)")
        if not any(self.change(name).final is not None for name in KEEP):
            found.append("what the model still knows of everything else")
        if not self.splits("verbatim", kept=False):
            found.append("generated answers")
        if not any(name.startswith(("mia_", "privleak")) for name in self.models["final"]):
            found.append("membership inference (no holdout rows)")
        return found

    def advice(self, category: str) -> list[str]:
        """What to try next."""
        objective, model = self.record.get("objective", {}), self.record.get("settings", {}).get("model", {})
        lr, weight = model.get("lr"), objective.get("forget_weight")
        beta = objective.get("settings", {}).get("beta")

        def change(option: str, value: Any, factor: float) -> list[str]:
            if not isinstance(value, int | float):
                return []
            word = "raise" if factor > 1 else "lower"
            # Another setting would change the rate that is found, too.
            found = "lr_auto" in self.record and option != "--model.lr"
            alone = f" and give --model.lr {lr:g}, so that only this changes" if found else ""
            return [f"{word} {option} from {value:g} to {value * factor:.2g}{alone}"]

        relearned, update = "relearn" in self.back(), (objective.get("update") or {}).get("name")
        # No rate is found for an update rule.
        found = f"--model.lr {lr:g} --model.update SAM" if "lr_auto" in self.record else "--model.update SAM"
        resist = [f"{found}, made against relearning"] if relearned and update != "SAM" else []
        if relearned and self.gone() and category == "partly forgotten":
            return resist
        if category in ("not forgotten", "partly forgotten"):
            factor = 3 if category == "not forgotten" else 2
            return [
                *resist,
                *change("--model.lr", lr, factor),
                *change("--model.forget_weight", weight, 2),
                *change("--model.objective.beta", beta, 0.5),
            ]
        if category == "over-forgotten":
            # A lower weight hides the rows even less deep.
            gentler = [] if relearned else change("--model.forget_weight", weight, 0.5)
            return [*resist, *gentler, *change("--model.objective.beta", beta, 1.5)]
        if category == "model damaged":
            kept = objective.get("retain_loss") is not None and objective.get("retain_weight")
            rows = [] if kept else ["train with rows to keep: --data.retain FILE and a --model.retain_weight above 0"]
            if (known := self.change("retain/probability").start) is not None and known < KNOWN:
                rows.append("give rows that the start model knows: --data.retain auto, or another FILE")
            return [*rows, *change("--model.lr", lr, 1 / 3), *change("--model.forget_weight", weight, 0.5)]
        if category == "inconclusive" and not self.models["start"]:
            return ["leave --eval.start true, so that the model is measured before and after"]
        if category == "inconclusive" and not self.models["retrained"]:
            return ["measure a retrained model beside it: --eval.retrained MODEL"]
        return []


def verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a results.json: `category` of `CATEGORIES`, `reasons`, `untested` and `advice`."""
    found = Verdict(record)
    category = found.category()
    return {
        "category": category,
        "reasons": found.reasons(category),
        "untested": found.untested(),
        "advice": found.advice(category),
    }


def headline(record: Mapping[str, Any]) -> str:
    """The category of a results.json's verdict, and the attacks that brought rows back."""
    back = [ATTACKS[group] for group in Verdict(record).back()]
    brings = "brings" if back == ["relearning"] else "bring"
    category: str = record["verdict"]["category"]
    return f"{category}; {' and '.join(back)} {brings} rows back" if back else category


def neutral_prompts(record: Mapping[str, Any], name: str) -> str:
    """What a metric is measured on if `--data.retain auto` made the rows, else empty."""
    data = record.get("settings", {}).get("data", {}).get("init_args", {})
    if name != "retain/probability" or data.get("retain") != "auto":
        return ""
    rows = record.get("counts", {}).get(name, "the")
    return f"answers to {rows} neutral prompts (your other data was not measured)"


def unlearned(record: Mapping[str, Any]) -> bool:
    """Whether a run trained a model to forget."""
    return record.get("objective", {}).get("name", "FineTune") != "FineTune"


def exported(record: Mapping[str, Any]) -> str:
    """What the model of a run that trained is called."""
    return "fine-tuned" if record.get("objective", {}).get("name") == "FineTune" else "unlearned"


def attacked_control(attack: Mapping[str, Any]) -> bool:
    """Whether an attack was also made on a retrained model."""
    return "control" in attack or any("control" in repeat for repeat in attack.get("repeats", []))


def _level(name: str, value: float | None) -> float | None:
    """A metric from 0 to 1, None if it is missing."""
    if value is None:
        return None
    if name.endswith("/nll"):
        return math.exp(-value)
    return value / 100 if name.startswith(("verbmem", "knowmem")) and "/" not in name else value
