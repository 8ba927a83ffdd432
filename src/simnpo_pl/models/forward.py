"""How rows go through a model: packed where that is exact, else padded, else one by one."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simnpo_pl.models.head import Head
from simnpo_pl.models.layers import body_of
from simnpo_pl.models.packing import MISFITS, Layout, layout_of, packed_hidden, raise_if_machine, why_not_packed
from simnpo_pl.models.sharding import is_sharded
from simnpo_pl.utils.errors import UserError

_log = logging.getLogger(__name__)
_CHECKED_CALLS = (1, 100, 10_000)


class Forward:
    """Hidden states of rows under one causal language model from transformers.

    The way is chosen from what the model consists of. It is checked on rows of the run, against each row alone: at the
    first call, twice later, since weights change, and when rows are far longer than those checked.

    Attributes:
        head: From the states to logits: the model's own head, or an identity where the states are the logits.
        way: `packed`, `padded` or `alone`, one by one.
        reads_logits: Whether the states are the logits.

    Raises:
        UserError: The model's output for a token depends on later tokens.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # Added by `shard`: a forward pass in which a sharded model gathers its weights.
        self.body = getattr(model, "run_body", body_of(model))
        self.head, self.way = head_of(model), "packed"
        # Their rotary frequencies depend on the longest row of a batch.
        kinds = ("dynamic", "longrope")
        self._ropes = [m for m in model.modules() if any(kind in str(getattr(m, "rope_type", "")) for kind in kinds)]
        self._rope_limit = min((_rope_limit(m) for m in self._ropes), default=None)
        self._calls = self._checked_width = 0
        self.reads_logits = False
        if self._ropes:
            message = "%s: with a row of more than %d tokens, on which its positions depend, rows are run one by one"
            _log.warning(message, type(model).__name__, self._rope_limit)
        with self._plainly():
            if self._knows_head():
                reason = why_not_packed(model, self.body)
            else:
                self.reads_logits, self.head = True, Head(nn.Identity(), self.head.vocabulary)
                reason = "the map from its hidden states to its logits is unknown"
            if reason is None:
                return
            names = [type(module).__name__ for module in model.modules()]
            if selecting := [name for name in names if name.endswith("Indexer")]:
                # Padding decides between equal keys.
                self._set("alone", f"{selecting[0]} selects the best keys of every token")
            elif self._reads_ahead():
                raise UserError(
                    f"{type(model).__name__} is no causal language model: its output for a token depends on later "
                    "tokens, and so on the label; give a model that reads from left to right"
                )
            else:
                self._set("padded", reason)

    def __call__(self, rows: Mapping[str, Tensor], layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states `(N, D)` of right-padded rows, and the index of each cell's state; with their layout if known.

        The indices are `(B, T)`; those of padded cells have no meaning.
        """
        way = self.way_of(rows)
        if way == "alone" and is_sharded(self.model):
            # Processes wait for each other at every pass, and have different numbers of rows.
            raise UserError(
                f"{type(self.model).__name__} runs these rows one by one, which a sharded model cannot; "
                "give another --trainer.strategy"
            )
        return self._run(way, rows, layout)

    def way_of(self, rows: Mapping[str, Tensor]) -> str:
        """How these rows are run: one by one where the longest would change the positions of the others."""
        long = self._rope_limit is not None and rows["input_ids"].shape[1] > self._rope_limit
        return "alone" if long else self.way

    def check(self, rows: Mapping[str, Tensor]) -> None:
        """Compare with rows alone from time to time; take the next way where they differ."""
        self._calls += 1
        width = rows["input_ids"].shape[1]
        wider = width > 2 * self._checked_width and not is_sharded(self.model)
        if self.way_of(rows) == "alone" or not (wider or self._calls in _CHECKED_CALLS):
            return
        self._checked_width = max(width, self._checked_width)
        lengths = rows["attention_mask"].sum(dim=1)
        longest = int(lengths.argmax())
        chosen = torch.tensor([longest, (longest + 1) % len(lengths)], device=lengths.device)
        few = {k: rows[k][chosen, : max(2, int(lengths.max()))] for k in ("input_ids", "attention_mask")}
        with self._plainly():
            expected, dtype = self._logps("alone", few)
            # Differences up to this are rounding, nats a token for each nat; a GPU may multiply float32 in TF32.
            full, gpu = dtype == torch.float32, expected.device.type != "cpu"
            limit = (5e-5 if full and not gpu else 2e-3 if full else 5e-2) * max(1.0, expected.abs().mean().item())
            while self.way != "alone":
                difference = (self._logps(self.way, few)[0] - expected).abs().mean().item()
                if not difference > limit:
                    break
                reason = f"{self.way} they differ from rows alone by {difference:.2g} nats a token"
                if is_sharded(self.model):
                    # Another process may find no difference, and all have to make the same passes.
                    raise UserError(
                        f"{type(self.model).__name__}: {reason}; give --model.attn_implementation eager, or a "
                        "strategy that does not shard"
                    )
                self._set("padded" if self.way == "packed" else "alone", reason)

    def _set(self, way: str, reason: str) -> None:
        self.way = way
        how = "padded, not packed" if way == "padded" else "run one by one"
        _log.warning("%s: rows are %s (%s)", type(self.model).__name__, how, reason)

    def _run(self, way: str, rows: Mapping[str, Tensor], layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        ids, mask = rows["input_ids"], rows["attention_mask"]
        if way == "packed":
            layout = layout_of(ids, mask) if layout is None else layout
            self._reset_ropes()
            return packed_hidden(self.body, ids, layout), layout.tokens.view(layout.rows, layout.width)
        if way == "padded":
            return self._unpacked(ids, mask), torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        lengths = mask.sum(dim=1).clamp(min=1).tolist()
        alone = [row[None, :n] for row, n in zip(ids, lengths, strict=True)]
        states = [self._unpacked(row, torch.ones_like(row)) for row in alone]
        starts = torch.tensor([0, *lengths[:-1]], device=ids.device).cumsum(0)
        inside = torch.arange(ids.shape[1], device=ids.device)
        return torch.cat(states), (starts[:, None] + inside).masked_fill(mask == 0, 0)

    def _unpacked(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._reset_ropes()
        run = self.model if self.reads_logits else self.body
        output = run(input_ids=ids, attention_mask=mask, use_cache=False)
        return (output.logits if self.reads_logits else output.last_hidden_state).flatten(0, 1)

    def _reset_ropes(self) -> None:
        """Forget the longest row so far: the frequencies are then those of the next pass alone."""
        for module in self._ropes:
            for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
                setattr(module, name, 0)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Eval mode, no gradient, no autocast."""
        training, device = self.model.training, next(self.model.parameters()).device.type
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                yield
        finally:
            self.model.train(training)

    def _ids(self, count: int) -> Tensor:
        numbers = torch.arange(count, device=next(self.model.parameters()).device)
        return ((numbers * 7 + 3) % self.head.vocabulary).unsqueeze(0)

    def _knows_head(self) -> bool:
        """Whether the head gives the model's logits, even of hidden states so large that any cap shows."""
        inputs: dict[str, Any] = {"input_ids": self._ids(8), "use_cache": False}
        # First the whole model: this gathers the weights of a sharded one.
        try:
            self.model(**inputs)
            hidden = self.body(**inputs).last_hidden_state[0]
            scale = 100 / self.head(hidden).abs().max().clamp(min=1e-6)
            handle = self.head.module.register_forward_pre_hook(lambda module, given: (given[0] * scale, *given[1:]))
            try:
                logits = self.model(**inputs).logits[0].float()
                return bool((self.head(hidden) - logits).abs().max() <= 1e-2 * logits.abs().max())
            finally:
                handle.remove()
        except MISFITS as error:
            raise_if_machine(error)
            return False

    def _reads_ahead(self) -> bool:
        """Whether the first tokens of a row change with later tokens."""
        ids = self._ids(12)
        other = (ids + 1) % self.head.vocabulary
        other[:, :6] = ids[:, :6]
        before, after = (self._unpacked(row, torch.ones_like(row)) for row in (ids, other))
        change = (after.float() - before.float()).abs().amax(dim=-1)
        # In the middle: rounding may send single tokens to another expert.
        rounding = max(1e-3, 8 * torch.finfo(before.dtype).eps)
        return bool(change[:6].median() > rounding * change[6:].median())

    def _logps(self, way: str, rows: Mapping[str, Tensor]) -> tuple[Tensor, torch.dtype]:
        """Log-probs of all tokens but the first of each row, nats, and the dtype of the hidden states."""
        hidden, places = self._run(way, rows)
        scored = rows["attention_mask"][:, 1:] != 0
        logps = self.head.logps(hidden, places[:, :-1][scored], rows["input_ids"][:, 1:][scored])
        return logps, hidden.dtype


def head_of(model: Any) -> Head:
    """The head of a causal language model, with the scale and cap that its config names."""
    config = model.config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = float(scale) if isinstance(scale, float | int) else 1.0
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Head(model.get_output_embeddings(), int(config.vocab_size), scale / (divisor or 1.0), cap)


def _rope_limit(module: Any) -> int:
    """Longest row, tokens, for which a rotary module uses the frequencies of short rows."""
    parameters = module.config.rope_parameters
    kinds = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
    made_for = [p["original_max_position_embeddings"] for p in kinds if p.get("original_max_position_embeddings")]
    return int(min([module.original_max_seq_len, *made_for]))
