"""The LightningModule: one policy, one forget objective, one retain loss, a reference only where one is needed.

It names no objective and no benchmark: the objective says what it reads, the data module brings batches and evaluation.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from simnpo_pl.data.pairing import draw_step_seed
from simnpo_pl.models.layers import compile_layers, layers_of, train_only
from simnpo_pl.models.loading import find_model, load_causal_lm, model_shapes
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.models.lora import BaseScorer, LoraOptions, add_adapter, check_adapter, inject_adapter, require_merged
from simnpo_pl.models.reference import REFERENCE_KEY, FrozenModel, Reference
from simnpo_pl.models.sharding import is_sharded
from simnpo_pl.module.checks import check_settings
from simnpo_pl.module.optimization import Shape, adamw, not_finite, schedule
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.module.ramp import use_found_rate
from simnpo_pl.module.updates import UpdateRule
from simnpo_pl.objectives import Objective, SimNPO
from simnpo_pl.objectives.base import Batch, Loss, Models, RetainLoss, batch_losses
from simnpo_pl.objectives.retain import NLL
from simnpo_pl.utils.errors import UserError

DEFAULT_RETAIN_LOSS = lazy_instance(NLL)


class UnlearningModule(PolicyModule):
    """A causal language model that forgets one set of rows and retains another.

    Total loss: `forget_weight * forget loss + retain_weight * retain loss`.

    Args:
        name: Start model: hub id or folder with safetensors weights.
        objective: Forget objective; a class of `simnpo_pl.objectives` by name, or any subclass of `Objective`; null
            takes SimNPO.
        retain_loss: Loss on the retain rows (`NLL`, `KL`, `JSD`, `EmbedDiff`), or null for none.
        forget_weight: Coefficient of the forget loss; null takes the objective's own default.
        retain_weight: Coefficient of the retain loss; null takes the objective's own default, with GRU 0.
        update: How the forget and the retain gradient make a step: `SAM`, `GRU`, or any subclass of `UpdateRule`; null
            takes the gradient of the total loss.
        reference: Frozen reference: hub id or folder; null means the start model. Loaded only where the objective
            or the retain loss needs one.
        memorizing: For objectives that read one: the start model fine-tuned further on the forget rows, hub id or
            folder; `configs/finetune.yaml` with `--data.train_split forget10` makes one.
        trainable: Regular expressions; a parameter is trained if one of them matches its whole name, all others are
            frozen. Null takes the objective's own default, which is all of them for most.
        lora: Low-rank adapter to train in place of all weights; null trains all. The base with the adapter off is
            then the reference, unless `reference` names another model.
        optimizer: `adamw`, or `adamw_8bit` for moments in 8 bits, which needs bitsandbytes.
        lr: Learning rate of AdamW at its peak; `auto` finds it by a short ramp before the first step.
        weight_decay: Weight decay of AdamW.
        warmup_epochs: Length of the linear warm-up, epochs.
        warmup_steps: The same in optimizer steps; null takes `warmup_epochs`.
        schedule: What follows the warm-up: `linear` decay to 0, or a `constant` learning rate.
        betas: Decay rates of AdamW's first and second moment.
        gradient_checkpointing: Whether activations are computed again in the backward pass: less memory, more time.
        compile: Whether `torch.compile` fuses the small operations of each layer in training, for speed on a GPU.
        dtype: Type of the loaded weights. Train in float32 with `--trainer.precision bf16-mixed`; bfloat16 is for
            evaluation, since small updates fall below its resolution.
        attn_implementation: Attention of transformers, such as `sdpa` or `eager`; null lets it choose.
    """

    def __init__(
        self,
        name: str,
        objective: Objective | None = None,
        retain_loss: RetainLoss | None = DEFAULT_RETAIN_LOSS,
        forget_weight: float | None = None,
        retain_weight: float | None = None,
        update: UpdateRule | None = None,
        reference: str | None = None,
        memorizing: str | None = None,
        trainable: list[str] | None = None,
        lora: LoraOptions | None = None,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        lr: float | Literal["auto"] = 1e-5,
        weight_decay: float = 0.01,
        warmup_epochs: float = 1.0,
        warmup_steps: int | None = None,
        schedule: Shape = "linear",
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__(name, dtype, attn_implementation, gradient_checkpointing)
        self.objective = objective or SimNPO()
        self.retain_loss = retain_loss
        self.forget_weight = self.objective.default_forget_weight if forget_weight is None else forget_weight
        self.update = update
        default = 0.0 if update is not None and update.reads_retain else self.objective.default_retain_weight
        self.retain_weight = default if retain_weight is None else retain_weight
        self.trainable = self.objective.default_trainable if trainable is None else trainable
        self.lora, self.eight_bit, self.compiles = lora, optimizer == "adamw_8bit", compile
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup_epochs, self.warmup_steps, self.schedule = warmup_epochs, warmup_steps, schedule
        self.forget_scores: dict[str, Tensor] = {}
        self._adapter: dict[str, Any] | None = None
        # The frozen base is in no checkpoint, see `on_save_checkpoint`.
        self.strict_loading = lora is None
        load = partial(load_causal_lm, dtype=dtype, attn_implementation=attn_implementation)
        reference_option = "--model.name" if reference in (None, name) else "--model.reference"
        self._reference = Reference(reference or name, reference_option, load)
        self._memorizing = FrozenModel(memorizing, "--model.memorizing", load) if memorizing else None
        self._micro_batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.found_rate: dict[str, Any] | None = None
        if lora is not None and trainable is not None:
            raise UserError("--model.trainable and --model.lora both say what is trained: give one of them")
        check_settings(self)

    @property
    def _active_retain_loss(self) -> RetainLoss | None:
        reads = self.update is not None and self.update.reads_retain
        retains = self.retain_weight != 0 or self.objective.needs_retain or reads
        return self.retain_loss if retains else None

    @property
    def _losses(self) -> list[Loss]:
        retain = self._active_retain_loss
        return [self.objective, *([] if retain is None else [retain])]

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a training batch, such as forget and retain; what a data module asks of the module."""
        return tuple(part for loss in self._losses for part in loss.parts)

    def configure_model(self) -> None:
        """Load the policy, and freeze what is not to be trained unless it is only evaluated."""
        reads_reference = self._runs_reference or self.objective.caches_reference
        for model in filter(None, (self._reference if reads_reference else None, self._memorizing)):
            find_model(model.name, model.option)
        super().configure_model()
        for loss, option in zip(self._losses, ("objective", "retain_loss"), strict=False):
            count = 0 if loss.layer is None else len(layers_of(self.policy))
            if loss.layer is not None and not 0 <= loss.layer < count:
                raise UserError(
                    f"--model.{option}.layer {loss.layer}: the model has layers 0 to {count - 1}; give one of these"
                )
        if self.lora is None and (self._trainer is None or self.trainer.state.fn == "fit"):
            require_merged(self.policy, "--model.name")
            if self.trainable:
                if is_sharded(self.policy):
                    # An evaluation leaves parts of it gathered, and FSDP reads the flags of the shards.
                    self.policy.reshard()
                train_only(self.policy, self.trainable)

    def load_policy(self) -> Any:
        policy = super().load_policy()
        if self.lora is not None:
            self._adapter = add_adapter(policy, self.lora)
        if self.compiles:
            compile_layers(policy)
        return policy

    @property
    def _runs_reference(self) -> bool:
        return any(loss.runs("reference") for loss in self._losses)

    @property
    def _base_is_reference(self) -> bool:
        return self.lora is not None and self._reference.name == self.name

    @property
    def reference_use(self) -> str:
        """Where the reference log-probs come from, in a few words."""
        if not (self._runs_reference or self.objective.caches_reference):
            return "none"
        if self._base_is_reference:
            return "the policy with its adapter off"
        how = "a frozen model, run in every step" if self._runs_reference else "its log-probs, made once and kept"
        return f"{self._reference.name}, {how}"

    def shapes(self) -> tuple[Any, dict[str, Any]]:
        """The policy without its weights, as it is trained, and the fields of a `memory.Step` that follow from it."""
        model = model_shapes(self.name, self.dtype_name)
        if self.lora is not None:
            with torch.device("meta"):
                inject_adapter(model, self.lora)
        elif self.trainable:
            train_only(model, self.trainable)
        return model, {
            "checkpointing": self.gradient_checkpointing,
            "eight_bit": self.eight_bit,
            "frozen": (self._runs_reference and not self._base_is_reference) + self.objective.runs("memorizing"),
            "reads_logits": any(loss.reads_logits for loss in self._losses),
            "copies": 0 if self.update is None else self.update.copies,
        }

    def _reference_scorer(self, resident: bool = True) -> Scorer:
        """Scorer of the reference; one that is not resident is dropped after its use."""
        if self._base_is_reference:
            return BaseScorer(self._scorer())
        keep = resident or self._runs_reference
        fresh = self._trainer is not None and self.trainer.ckpt_path is None and self.trainer.global_step == 0
        if fresh and self._reference.name == self.name and not keep:
            # The policy has the reference's weights, and no second copy is read.
            self.policy.eval()
            return self._scorer()
        return self._reference.scorer(self._scorer(), self.device, keep)

    def _memorizing_scorer(self) -> Scorer:
        assert self._memorizing is not None
        return self._memorizing.scorer(self._scorer(), self.device)

    def _models(self, batch: Batch) -> Models:
        """Models that the losses of a batch read; the reference only where the batch lacks its log-probs."""
        known = all(REFERENCE_KEY in batch[part] for part in self.objective.scored_parts)
        reads_reference = self._runs_reference or (self.objective.caches_reference and not known)
        return Models(
            self._scorer(),
            self._reference_scorer() if reads_reference else None,
            self._memorizing_scorer() if self.objective.runs("memorizing") else None,
        )

    @property
    def _training_data(self) -> Any:
        """The data module; None for a plain loader."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Prepare policy and frozen models; transformers loads models in eval mode, so train mode is set here."""
        data = self._training_data
        if self.dtype_name == "bfloat16" and self.lora is None:
            rank_zero_warn(
                "--model.dtype bfloat16: updates smaller than 1/256 of a weight are lost; train in float32 with "
                "--trainer.precision bf16-mixed, or train an adapter (--model.lora.rank 16)"
            )
        if data is not None:
            self.check_vocabulary(data)
            if self.objective.caches_reference:
                batches = data.reference_batches(self.objective.scored_parts)
                if self._reference.identity != self._reference.identity_of(batches):
                    scorer, strategy = self._reference_scorer(resident=False), self.trainer.strategy
                    with self.trainer.precision_plugin.forward_context():
                        self._reference.fill(batches, scorer, self.device, strategy)
        if self._runs_reference:
            self._reference_scorer()
        if self.objective.runs("memorizing"):
            self._memorizing_scorer()
        self._micro_batches.clear()
        self.policy.train()
        if self.lr == "auto" and self.trainer.ckpt_path is None:
            self.found_rate = use_found_rate(self)
        if self.update is not None:
            self.update.start(self)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: Parts `forget`, `retain` and, where the objective reads it, `alternate` or `sampled`; each with
                `input_ids`, `labels` (-100 where not scored) and `attention_mask`, `(B, T)`. A part may bring
                `reference_logps` `(B,)`, nats; without them the reference model is run. It may bring the
                weights of its rows in a larger batch, see `TrainingSet`.

        Returns:
            `loss`, `forget_loss` and `retain_loss`, scalars; the latter two before their weights.
        """
        found = batch_losses(self.objective, self._active_retain_loss, batch, self._models(batch))
        self.forget_scores = found.scores
        return self._with_total(found.forget, found.retain)

    def _with_total(self, forget: Tensor, retain: Tensor) -> dict[str, Tensor]:
        total = self.objective.total(forget, retain, self.forget_weight, self.retain_weight)
        return {"loss": total, "forget_loss": forget, "retain_loss": retain}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        data = self._training_data
        seed = draw_step_seed(0 if data is None else data.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(seed)
        self._reference.add_to(batch)
        losses = self.losses(batch)
        rows = {name: part["row"] for name, part in batch.items() if "row" in part}
        self._micro_batches.append((torch.stack((losses["forget_loss"], losses["retain_loss"])).detach(), rows))
        if self.update is not None:
            self.update.take(self, batch, seed, losses["forget_loss"], losses["retain_loss"])
        # Lightning averages over micro-batches and processes; losses must be summed, so multiply.
        return losses["loss"] * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.update is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.update.backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the losses of the whole effective batch, and pass them to the objective."""
        own = torch.stack([losses for losses, _ in self._micro_batches])
        whole = self.trainer.strategy.reduce(own.sum(0), reduce_op="sum")
        # The step's one wait for a GPU.
        *each, whole = torch.cat([own, whole.unsqueeze(0)]).cpu()
        values: dict[str, Any] = self._with_total(*whole)
        if not values["loss"].isfinite():
            number = next((n for n, losses in enumerate(each) if not losses.isfinite().all()), 0)
            raise not_finite(self.trainer.global_step, self._with_total(*each[number]), self._micro_batches[number][1])
        self._micro_batches.clear()
        if self.update is not None:
            self.update.finish(self)
        values |= self.objective.after_step(whole[1], self.retain_weight, self.current_epoch)
        for name, value in values.items():
            self.log(f"train/{name}", torch.as_tensor(value), prog_bar=True)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        # With steps in place of epochs the loader is not set up yet.
        self.trainer.fit_loop.setup_data()
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        lr = 1.0 if self.lr == "auto" else self.lr
        optimizer = adamw(self.policy, lr, self.betas, self.weight_decay, self.eight_bit)
        warmup = round(self.warmup_epochs * per_epoch) if self.warmup_steps is None else self.warmup_steps
        factor = schedule(self.schedule, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_fit_end(self) -> None:
        """Free the memory of frozen models; unfreeze parameters, since gradient norms cover all weights."""
        for model in filter(None, (self._reference, self._memorizing)):
            model.free()
        if self.lora is None:
            self.policy.requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the objective's attributes, and the reference's log-probs, which the trained policy no longer gives."""
        checkpoint["objective"] = {name: getattr(self.objective, name) for name in self.objective.checkpointed}
        checkpoint["reference_logps"] = self._reference.state_dict()
        checkpoint["adapter"], checkpoint["found_rate"] = self._adapter, self.found_rate
        checkpoint["update"] = self.update and self.update.state_dict()
        if self._adapter is not None:
            weights = checkpoint["state_dict"].items()
            own = {name: weight for name, weight in weights if ".lora_" in name or not name.startswith("policy.")}
            checkpoint["state_dict"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them; a checkpoint of another kind of policy is refused."""
        check_adapter(checkpoint.get("adapter"), self._adapter)
        for name in self.objective.checkpointed:
            setattr(self.objective, name, checkpoint["objective"].get(name, getattr(self.objective, name)))
        self._reference.load_state_dict(checkpoint["reference_logps"])
        self.found_rate = checkpoint.get("found_rate")
        if self.update is not None and checkpoint.get("update"):
            self.update.load_state_dict(checkpoint["update"])
