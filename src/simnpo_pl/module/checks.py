"""Checks of a module's settings, before anything is loaded or trained."""

from typing import Any

import torch

from simnpo_pl.module.ramp import check_ramp
from simnpo_pl.utils.errors import UserError, not_negative, one_of


def check_settings(module: Any) -> None:
    """Refuse settings that are out of range or contradict each other."""
    for option in ("forget_weight", "retain_weight", "lr", "weight_decay", "warmup_epochs", "warmup_steps"):
        value = getattr(module, option)
        if value not in (None, "auto"):
            not_negative(f"--model.{option}", value)
    name = type(module.objective).__name__
    for option in ("objective", "retain_loss"):
        loss = getattr(module, option)
        if loss is not None and (unknown := sorted(set(loss.needs).difference(loss.known_needs))):
            raise UserError(
                f"--model.{option} {type(loss).__name__}: `needs` names {', '.join(unknown)}; known are "
                f"{', '.join(loss.known_needs)}: name those that it is computed from"
            )
    if module.objective.runs("memorizing") and module._memorizing is None:
        raise UserError(
            f"--model.objective {name} reads a model that was fine-tuned further on the forget rows: name it by "
            "--model.memorizing FOLDER; fit --config configs/finetune.yaml --model.name START --data.train_split "
            "FORGET makes one"
        )
    if module.objective.needs_retain and module.retain_loss is None:
        raise UserError(f"--model.objective {name} bounds the retain loss: name one, such as --model.retain_loss NLL")
    if module.compiles and module.update is not None:
        raise UserError("--model.update uses a graph twice, which --model.compile true cannot: give one of them")
    one_of("--model.schedule", module.schedule, ("linear", "constant"))
    rule = module.update
    if rule is not None and rule.reads_retain:
        chosen = f"--model.update {type(rule).__name__}"
        if module.retain_loss is None:
            raise UserError(f"{chosen} reads the gradient of a retain loss: name one, such as --model.retain_loss NLL")
        if module.objective.needs_retain:
            raise UserError(f"{chosen} does not know how to bound the retain loss, as --model.objective {name} does")


def check_fit(module: Any, trainer: Any) -> None:
    """Refuse a Trainer that cannot train with these settings."""
    if trainer.max_epochs == trainer.max_steps == -1:
        raise UserError("--trainer.max_epochs -1: the schedule needs the number of steps; give --trainer.max_steps")
    if module.lr == "auto":
        check_ramp(trainer)
    if module.update is not None:
        module.update.check(trainer, module)
    if module.compiles:
        # Its error, such as a missing C compiler, is better known before the first evaluation.
        torch.compile(lambda x: x + 1)(torch.ones(2, device=trainer.strategy.root_device))
