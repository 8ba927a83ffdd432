"""A causal language model that Lightning can evaluate: loading, scoring and generating.

What is measured comes from the data module; how the model is trained is defined by a subclass.
"""

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from simnpo_pl.evaluation.data import EvalData
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation, on_host
from simnpo_pl.evaluation.finished import FinishedBatches, identity
from simnpo_pl.evaluation.memory import Halves
from simnpo_pl.evaluation.plan import PLACES
from simnpo_pl.evaluation.scoring import GRADIENT_NORM, gradient_norms
from simnpo_pl.metrics.titles import tag
from simnpo_pl.models.generation import generate
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.logprobs import Scorer, with_plan
from simnpo_pl.models.sharding import is_sharded, shard
from simnpo_pl.utils.errors import UserError


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse precisions in which Lightning casts the whole model, and strategies whose processes lose the results.

    Such a cast rounds buffers that have to stay in float32, such as the frequencies of rotary position embeddings.
    """
    if trainer.precision in ("64-true", "16-true", "bf16-true"):
        raise UserError(
            f"--trainer.precision {trainer.precision} is not supported: give 32-true, bf16-mixed or 16-mixed; for "
            "weights in bfloat16 give --model.dtype bfloat16 with 32-true"
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "--trainer.strategy: ddp_spawn, ddp_fork and ddp_notebook train in processes that end with their results: "
            "give ddp or fsdp2"
        )


class PolicyModule(pl.LightningModule):
    """Holds the policy and runs its evaluation.

    Args:
        name: Hub id or folder with safetensors weights.
        dtype: Type of the loaded weights.
        attn_implementation: Attention of transformers; None lets it choose.
        gradient_checkpointing: Whether activations are computed again in the backward pass.

    Attributes:
        option: Setting that names the model, for messages.
        policy: The model; None before `configure_model`.
        evaluation_result: Of the newest evaluation.
        logs_metrics: Whether its metrics go to the logger.
        finished_batches: Keeps finished batches of an evaluation until it is complete; None keeps none.
    """

    def __init__(
        self,
        name: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.option = "--model.name"
        self.policy: Any = None
        self.evaluation: Evaluation | None = None
        self.evaluation_result: EvalResult | None = None
        self.logs_metrics = True
        self.finished_batches: FinishedBatches | None = None
        self._policy_scorer: Scorer | None = None
        self._in_halves = Halves(self._run)

    def like(self, name: str, option: str = "--model.name") -> "PolicyModule":
        """Another model in the same precision, only to be evaluated; its metrics are not logged as this run's."""
        other = PolicyModule(name, self.dtype_name, self.attn_implementation)
        other.option = option
        other.logs_metrics = False
        return other

    def setup(self, stage: str) -> None:
        # The data modules leave this to the module.
        warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device` in `LightningModule`")
        check_trainer(self.trainer)

    def configure_model(self) -> None:
        """Load the policy; every stage calls this, the model is loaded once."""
        if self.policy is None:
            self.policy = self.load_policy()
            if self._device_mesh is not None:
                shard(self.policy, self._device_mesh["data_parallel"])

    def load_policy(self) -> Any:
        """The model before it is sharded."""
        sharded = self._device_mesh is not None
        policy = load_causal_lm(self.name, self.dtype_name, self.attn_implementation, self.option, sharded)
        if self.gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return policy

    def _scorer(self) -> Scorer:
        assert self.policy is not None, "configure_model() comes first"
        if self._policy_scorer is None:
            self._policy_scorer = Scorer(self.policy)
        return self._policy_scorer

    def check_vocabulary(self, data: EvalData) -> None:
        """Refuse data with a token that the model has no embedding for."""
        size, largest = self.policy.get_input_embeddings().weight.shape[0], data.largest_id()
        if largest >= size:
            raise UserError(
                f"{self.option}: {self.name} has a vocabulary of {size} tokens, the data has the token {largest}: "
                "give the model's own tokenizer with --data.tokenizer, or the model that the tokenizer belongs to"
            )

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device with the plans of its rows; keys in `PLACES` stay on the CPU."""
        parts = {name: part for name, part in batch.items() if name not in PLACES}
        if "input_ids" in parts:
            parts = with_plan(parts)
        else:
            parts = {n: with_plan(p) if isinstance(p, dict) and "input_ids" in p else p for n, p in parts.items()}
        if device.type == "cuda":
            # From pinned memory the host does not wait for the copy.
            parts = apply_to_collection(parts, Tensor, Tensor.pin_memory)
        return {**batch, **move_data_to_device(parts, device)}

    # -- evaluation --------------------------------------------------------------------------------------

    @property
    def _data(self) -> EvalData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, EvalData):
            raise UserError("evaluation needs a data module of simnpo_pl.benchmarks, which says what to measure")
        return data

    def on_validation_epoch_start(self) -> None:
        """Start an evaluation, or resume one of which batches are finished."""
        data = self._data
        self.check_vocabulary(data)
        self.evaluation = data.evaluation().to(self.device)
        self.evaluation.reset()
        if self.finished_batches is not None:
            # `predict` has other batches, with the numbers of those to score.
            batches = (*data.eval.batch_sizes(self.trainer), self._end_ids(), self.trainer.predicting)
            run_in = (self.trainer.precision, self.device.type, self.dtype_name, self.attn_implementation)
            of = identity(self.policy, self.evaluation, batches, run_in)
            self.finished_batches.open(of, self.global_rank)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score or generate one batch."""
        self._evaluate(batch)

    test_step = predict_step = validation_step

    def _evaluate(self, batch: dict[str, Any]) -> None:
        assert self.evaluation is not None
        outcome: Any = None if self.finished_batches is None else self.finished_batches.found(batch)
        if outcome is None:
            # Processes of a sharded model wait for each other: none may run more batches than another.
            outcome = (self._run if is_sharded(self.policy) else self._in_halves)(batch)
            if self.finished_batches is not None:
                self.finished_batches.keep(batch, outcome)
        (self.evaluation.add_generations if "prompts" in batch else self.evaluation.add_scores)(batch, outcome)

    def _run(self, batch: dict[str, Any]) -> Any:
        """Generated tokens of a batch of prompts, or scores by name."""
        assert self.evaluation is not None
        if "prompts" in batch:
            choose = self.evaluation.choice(batch)
            return generate(self.policy, batch["prompts"], batch["max_new_tokens"], self._end_ids(), choose)
        if "gradients" in batch:
            return on_host({GRADIENT_NORM: gradient_norms(self.policy, self._scorer(), batch)})
        return on_host(self.evaluation.score(self._scorer()({"rows": batch})["rows"], batch))

    def _end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        own = getattr(self.policy.generation_config, "eos_token_id", None)
        known = [*self._data.end_ids, *(own if isinstance(own, list) else [own])]
        return sorted({token for token in known if token is not None})

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics; `evaluation_result` holds them."""
        assert self.evaluation is not None
        self.evaluation_result = self.evaluation.compute()
        if self.finished_batches is not None:
            self.finished_batches.close()
        if self.logs_metrics:
            prefix = "test/" if self.trainer.testing else ""
            for name, value in self.evaluation_result.values.items():
                self.log(f"{prefix}{tag(name)}", value, rank_zero_only=True)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self) -> None:
        """Gather the generated answers; `evaluation_result` holds them."""
        assert self.evaluation is not None
        self.evaluation_result = self.evaluation.texts_only()
