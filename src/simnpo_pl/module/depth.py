"""How deep it is gone: the Unlearning Depth Score (arXiv 2605.24614), of the whole answers to the forget rows.

The hidden states of the unlearned model at the positions that predict an answer's tokens, its end left out, are put
into the start model, one layer at a time. What they take off the answer's log-prob the unlearned model lacks in this
layer; the retrained model's states say what a model lacks that never saw the rows. Outputs of the layers themselves are
put in; the published code takes the last layer's after the final norm, so that this is applied to them twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.evaluation.finished import gather
from simnpo_pl.evaluation.plan import Split, eval_loader
from simnpo_pl.metrics.chance import interval
from simnpo_pl.metrics.functional import depth_score
from simnpo_pl.metrics.titles import number
from simnpo_pl.models.layers import layer_outputs, layers_of, replaced_outputs
from simnpo_pl.models.loading import model_shapes
from simnpo_pl.models.logprobs import scored_targets
from simnpo_pl.models.packing import layout_of, stacked
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.utils.errors import UserError

UDS = "forget/uds"
LEAST = 0.05
"""Drop by the retrained model's states, nats per token, above which a layer counts."""
States = dict[int, list[Tensor]]
"""Number of a batch to each layer's outputs `(S, D)` at the S positions that predict its answers, on the CPU."""


def check_depth(retrained: str, start: str | None) -> None:
    """Raise UserError if the start model is not known, or has other layers than the retrained one."""
    if start is None:
        raise UserError(
            "--eval.depth needs the start model, which only fit knows: leave it out here, and measure this model by "
            "check MODEL --config FILE --attacks depth --start START --retrained RETRAINED"
        )
    models = {name: model_shapes(name) for name in (start, retrained)}
    sizes = {name: (len(layers_of(m)), m.config.get_text_config().hidden_size) for name, m in models.items()}
    if sizes[start] != sizes[retrained]:
        words = [f"{name} has {count} layers of {width}" for name, (count, width) in sizes.items()]
        raise UserError(
            f"the Unlearning Depth Score puts states of one model into another: {', '.join(words)}; give a retrained "
            "model of the start model's architecture"
        )


class DepthModule(PolicyModule):
    """The Trainer's `test` keeps a model's states, or puts those of others, the `sources`, into it.

    Attributes:
        states: The model's own, of this process's batches.
        drops: Row to the mean drop of its tokens' log-probs by the states of each source in each layer, nats.
    """

    def __init__(self, like: PolicyModule, name: str, data: Any, sources: Sequence[States] = ()) -> None:
        super().__init__(name, like.dtype_name, like.attn_implementation)
        self.data, self.sources = data, sources
        self.states: States = {}
        self.drops: dict[int, list[list[float]]] = {}

    def test_dataloader(self) -> DataLoader:
        split = Split("forget", [], [[row] for row in _forget_rows(self.data)], {})
        return eval_loader(self.trainer, [split], self.data.eval)

    def on_test_epoch_start(self) -> None:
        self.check_vocabulary(self.data)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        forward, count = self._scorer().forward, len(layers_of(self.policy))
        forward.check(batch)
        targets, scored = scored_targets(batch)
        # Rows that begin alike do not share tokens here: states are put into each row alone.
        single = zip(batch["input_ids"].split(1), batch["attention_mask"].split(1), strict=True)
        layout = stacked([layout_of(*row) for row in single])
        with layer_outputs(self.policy, () if self.sources else range(count)) as outputs:
            hidden, places = forward(batch, layout)
        at, rows = places[scored], scored.nonzero()[:, 0].cpu()

        def means(hidden: Tensor) -> Tensor:
            """Mean log-prob `(B,)` of each row's tokens."""
            logps = forward.head.logps(hidden, at, targets[scored]).double().cpu()
            size = len(targets)
            return logps.new_zeros(size).index_add(0, rows, logps) / rows.bincount(minlength=size)

        if not self.sources:
            self.states[batch["number"]] = [torch.cat(passes)[at].cpu() for passes in outputs.values()]
            return
        whole, drops = means(hidden), []
        for source in self.sources:
            for layer, states in enumerate(source[batch["number"]]):
                with replaced_outputs(self.policy, layer, at, states.to(at.device)):
                    drops.append(whole - means(forward(batch, layout)[0]))
        by_row = torch.stack(drops, dim=1).view(len(targets), len(self.sources), count)
        self.drops |= dict(zip(batch["index"].tolist(), by_row.tolist(), strict=True))

    def on_test_epoch_end(self) -> None:
        pass


def measure_depth(
    trainer: Any, like: PolicyModule, data: Any, start: str, retrained: str, unlearned: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry `depth` of results.json, and the rows behind it. One model is on the device at a time, as `like` is.

    Raises:
        UserError: The models differ in shape, or the benchmark has no answers of a split `forget`.
    """
    check_depth(retrained, start)
    sources = []
    for name in (retrained, unlearned):
        module = DepthModule(like, name, data)
        trainer.test(module, verbose=False)
        sources.append(module.states)
    module = DepthModule(like, start, data, sources)
    trainer.test(module, verbose=False)
    found = {row: drops for part in gather(module.drops) for row, drops in part.items()}
    names, order = ("retrained", "unlearned"), sorted(found)
    by_model = torch.tensor([found[row] for row in order], dtype=torch.float64).unbind(dim=1)
    scores = depth_score(by_model[0], by_model[1], LEAST)
    known = scores[(by_model[0] > LEAST).any(dim=1)]
    score = known.mean().item()
    entry = {
        "settings": {"start": start, "retrained": retrained, "least": LEAST},
        "n": len(known),
        "metrics": {UDS: score},
        "intervals": {UDS: interval(known)} if len(known) > 1 and score == score else {},
        "layers": {name: drops.nanmean(dim=0).tolist() for name, drops in zip(names, by_model, strict=True)},
        "sentence": f"Unlearning Depth Score {number(score)} over {len(known)} of {len(order)} rows: 0 is the start "
        "model's, 1 the retrained model's",
    }
    rows = [
        {"split": "forget", "index": row, "uds": value, **dict(zip(names, found[row], strict=True))}
        for row, value in zip(order, scores.tolist(), strict=True)
    ]
    return entry, rows


def _forget_rows(data: Any) -> list[TokenRow]:
    """The true answers without their ends."""
    rows = [answers[0] for split in data.evaluation().splits if split.name == "forget" for answers in split.answers]
    if not rows:
        raise UserError("the Unlearning Depth Score reads the answers of a split `forget`, which is not measured here")
    ends = [len(row.labels) - row.end for row in rows]
    return [TokenRow(r.input_ids, r.labels[:end] + [IGNORE_INDEX] * r.end) for r, end in zip(rows, ends, strict=True)]
