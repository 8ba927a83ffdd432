"""Sets up a Trainer for the optimizer steps that a data module cuts."""

from typing import Any

from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.utils.errors import UserError


def set_accumulation(trainer: Any, sampler: PairedSampler) -> None:
    """Let the Trainer accumulate the micro-batches of an optimizer step; refuse its settings that contradict them."""
    step = sampler.accumulate
    # Lightning has no public name for this setting.
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError(
            "rows are distributed to processes by this data module: set --trainer.use_distributed_sampler false"
        )
    if trainer.accumulate_grad_batches not in (1, step):
        raise UserError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} contradicts "
            f"--data.effective_batch {sampler.effective_batch} = {trainer.world_size} device(s) x "
            f"{sampler.per_device_batch} rows x {step}: leave it out"
        )
    trainer.accumulate_grad_batches = step
    if trainer.overfit_batches:
        raise UserError(
            "--trainer.overfit_batches is not supported, since every epoch draws its batches anew: train on fewer "
            "forget rows, or set --trainer.limit_train_batches"
        )
    limit, total = trainer.limit_train_batches, len(sampler)
    batches = limit if isinstance(limit, int) else int(limit * total)
    if batches < total and batches % step and not trainer.fast_dev_run:
        raise UserError(
            f"--trainer.limit_train_batches {limit} ends an epoch inside an optimizer step of {step} "
            f"micro-batches: give a multiple of {step}"
        )
