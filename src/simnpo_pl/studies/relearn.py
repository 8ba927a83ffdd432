"""Relearning attack (SimNPO paper, section 6): fine-tune the unlearned model on rows and see what comes back.

Rows are a share of the forget rows, or as many retain rows or blocks of a text, repeated where there are fewer, so
attacks take equally many steps. Plain cross-entropy from the run's model, all weights trained, at a learning rate that
falls linearly to 0. The forget rows are measured before and after every epoch, those relearned and the others apart.
The retrained model, if known, is attacked alike, as the control. What results.json already holds is skipped.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.data.sources import load_table, text_of
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.models.loading import find_model
from simnpo_pl.report.robustness import OTHERS, SHOWN, relearning_table
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results, among, model_of, reopen, retrained_of, runs_of

PAPER_RATE = 1e-5
Evaluated = tuple[int, int, EvalResult]
"""Epoch, optimizer step and what was measured."""


@dataclass(frozen=True)
class Attack:
    """Settings of an attack, as results keep them; see the command's options."""

    subset: str
    share: float
    epochs: int
    lr: float
    text: str | None = None

    @property
    def key(self) -> str:
        text = "" if self.text is None else f" {self.text}"
        return f"{self.subset}{text} share={self.share:g} epochs={self.epochs} lr={self.lr:g}"


def run(options: Namespace) -> None:
    runs = runs_of(options)
    subsets = [*options.subset, *(["text"] if options.text else [])]
    for one in runs:
        relearning = Relearning(one, options.retrained)
        for subset in subsets:
            text = options.text if subset == "text" else None
            draws = 1 if subset == "shortest" else options.repeats
            for lr in options.lr or [rate_of(one)]:
                attack = Attack(subset, options.share, options.epochs, lr, text)
                relearning.make(attack, range(options.seed, options.seed + draws))
    rank_zero_only(print)(relearning_table(runs))


def rate_of(run: Run) -> float:
    """The learning rate of the run itself; the paper's for a model that was only evaluated where it is `auto`."""
    rate = run.record["settings"]["model"]["lr"]
    return PAPER_RATE if rate == "auto" else float(rate)


class Relearning:
    """Attacks on the model of a finished run, and on a retrained model, by default the run's, as the control."""

    def __init__(self, run: Run, retrained: str | None = None) -> None:
        self.run = run
        self.control = retrained_of(run, retrained)
        self.models = {"epochs": model_of(run)} | ({} if self.control is None else {"control": self.control})
        self._before: dict[str, Evaluated] = {}

    def make(self, attack: Attack, seeds: Sequence[int]) -> dict[str, Any]:
        """Attack once for every seed; each finished curve is added to the run's results. Returns their entry."""
        entry = self.run.record.get("relearn", {}).get(attack.key, {})
        # Versions before 0.2 kept no steps.
        known = {one["seed"]: one for one in entry.get("repeats", []) if "step" in one["epochs"][0]}
        # All draws have the same control.
        for seed in sorted({*seeds, *known}):
            repeat = {"seed": seed, **known.get(seed, {})}
            if self.control not in (None, repeat.get("retrained")):
                repeat.pop("control", None)
            missing = [role for role in self.models if role not in repeat]
            if self.control is not None and missing:
                find_model(self.control, "--retrained")
            for role in missing:
                repeat["rows"], repeat[role] = self._attack(attack, seed, role)
                if role == "control":
                    repeat["retrained"] = self.control
                add_results(self.run, partial(_add, attack, dict(repeat)))
        return self.run.record["relearn"][attack.key]

    def _attack(self, attack: Attack, seed: int, role: str) -> tuple[list[int], list[dict[str, Any]]]:
        """Indices of the rows that were relearned, and the measurements of a model."""
        opened = reopen(
            self.run,
            *("--model.objective", "FineTune", "--model.forget_weight", "1", "--model.retain_loss", "null"),
            *("--model.lr", str(attack.lr), "--model.warmup_epochs", "0", "--model.schedule", "linear"),
            # Small updates fall below the resolution of bfloat16, which may be asked for where memory lacks.
            *(() if any(o.startswith("--model.dtype") for o in self.run.options) else ("--model.dtype", "float32")),
            *("--model.warmup_steps", "null", "--model.update", "null"),
            *("--model.reference", "null", "--model.memorizing", "null"),
            *("--model.lora", "null", "--model.trainable", "null", "--model.compile", "false"),
            *("--trainer.max_epochs", str(attack.epochs)),
            *("--eval.splits", "[forget]", "--eval.generate_rows", "0"),
        )
        module, data = opened.model, opened.datamodule
        # The control reads the run's tokens.
        module.name = model = self.models[role]
        module.option = "--retrained" if role == "control" else module.option
        evaluated: list[Evaluated] = []

        def keep(trainer: pl.Trainer, pl_module: Any) -> None:
            epoch = trainer.current_epoch + 1 if trainer.state.fn == "fit" else 0
            evaluated.append((epoch, trainer.global_step, pl_module.evaluation_result))

        trainer: Any = opened.trainer
        trainer.callbacks.append(LambdaCallback(on_validation_end=keep))
        data.prepare_data()
        pool = attacking_rows(data, attack)
        forget = data.token_rows(("forget",))["forget"]
        count = max(1, round(attack.share * len(forget)))
        rows = choose_rows([row.length for row in pool], attack.subset, count, seed)
        chosen = [pool[row] for row in rows]
        data.train_on(chosen)
        what = f"{len(rows)} {attack.subset} rows, lr {attack.lr:g}, draw {seed}"
        rank_zero_only(print)(f"{self.run.name}: relearning {what}; {model}", flush=True)
        if role not in self._before:
            trainer.validate(module, datamodule=data, verbose=False)
            self._before[role] = evaluated.pop()
        trainer.fit(module, datamodule=data)
        (split,) = data.evaluation().splits
        shown = among(split, chosen)
        # A run may have unlearned some of the rows alone.
        parts = {SHOWN: shown, OTHERS: (among(split, forget) or set(range(len(split.texts)))) - shown}
        measured = [_measured(one, parts) for one in (self._before[role], *evaluated)]
        origin = data.forget_rows if attack.subset in ("shortest", "random") else None
        return [origin[row] for row in rows] if origin else rows, measured


def attacking_rows(data: Any, attack: Attack) -> list[TokenRow]:
    """The rows from which those of an attack are chosen; those of text have the length of the longest forget row."""
    if attack.subset == "retain":
        return data.token_rows(("forget", "retain"))["retain"]
    forget: list[TokenRow] = data.token_rows(("forget",))["forget"]
    if attack.text is None:
        return forget
    rows = enumerate(load_table(attack.text, "--text"))
    documents = [text_of(row, "text", f"--text {attack.text} row {index}, counted from 0") for index, row in rows]
    longest = max(len(row.input_ids) for row in forget)
    return Texts(documents).encode(replace(data.encoder, max_length=longest), "--text")


def choose_rows(lengths: Sequence[int], subset: str, count: int, seed: int) -> list[int]:
    """Rows of an attack, in ascending order; `lengths` are the scored tokens of the rows there are.

    Drawn at random unless `subset` is `shortest`; where there are fewer than `count`, they are repeated.
    """
    if subset == "shortest":
        return sorted(sorted(range(len(lengths)), key=lambda row: (lengths[row], row))[:count])
    drawn = np.random.default_rng(seed).choice(len(lengths), min(count, len(lengths)), replace=False)
    return sorted(np.resize(drawn, count).tolist())


def _measured(evaluated: Evaluated, parts: dict[str, set[int]]) -> dict[str, Any]:
    """An entry of a curve: metrics of all forget rows, and the mean probability of parts of them."""
    epoch, step, result = evaluated
    found = {row["index"]: math.exp(-row["answer_nll"]) for row in result.rows}
    means = {name: fmean(found[index] for index in rows) for name, rows in parts.items() if rows}
    return {"epoch": epoch, "step": step, "metrics": result.values | means}


def _add(attack: Attack, repeat: dict[str, Any], results: dict[str, Any]) -> None:
    settings = {name: value for name, value in asdict(attack).items() if value is not None}
    entry = results.setdefault("relearn", {}).setdefault(attack.key, {"settings": settings, "repeats": []})
    others = [known for known in entry["repeats"] if known["seed"] != repeat["seed"]]
    entry["repeats"] = sorted([*others, repeat], key=lambda one: one["seed"])
