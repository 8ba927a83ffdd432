"""Collects the scores of an evaluation on every process and turns them into numbers and per-row logs."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from simnpo_pl.evaluation.fluency import FLUENCY
from simnpo_pl.evaluation.plan import EvalSet
from simnpo_pl.evaluation.scoring import ON_DEMAND, score_rows
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.functional import ROUGE
from simnpo_pl.models.logprobs import AnswerStates
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class EvalResult:
    """What one evaluation of one model found.

    Args:
        values: Metric name to number; NaN where it could not be computed.
        counts: Metric name to the rows it rests on.
        unavailable: Metric name to the reason it was not measured or is not a number.
        rows: One object per row and split: question, answer, scores, generated text.
    """

    values: dict[str, float]
    counts: dict[str, int]
    unavailable: dict[str, str]
    rows: list[dict[str, Any]] = field(repr=False)


class _RawScores(RowMetric):
    """Keeps every cell of a split's scores, for the logs."""

    cells: Tensor
    seen: Tensor

    def complete(self, seen: Tensor) -> Tensor:
        return seen.any(dim=1)

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        self.cells, self.seen = values.masked_fill(~seen, math.nan), seen
        return values[:, 0]


class Evaluation:
    """Metrics of several splits, filled batch by batch, each row exactly once on any number of processes.

    Args:
        sets: The splits with their metrics.
        summary: Metrics over several splits, computed last; their parts are updated through the sets.
        unavailable: Metrics that cannot be measured, with the reason.
        decode: Turns generated token ids into text.

    Attributes:
        min_k: Part of the tokens that Min-K% and Min-K%++ average.
    """

    def __init__(
        self,
        sets: list[EvalSet],
        summary: Mapping[str, Metric],
        unavailable: Mapping[str, str],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.sets = sets
        self.summary = dict(summary)
        self.unavailable = dict(unavailable)
        self.min_k = 0.4
        self._decode = decode
        self._raw = [_RawScores(len(part.texts), part.kinds) for part in sets]
        self._texts: dict[tuple[int, int], str] = {}
        silent = [metric for part in sets if not part.generate for metric in part.metrics.values()]
        lost = [metric for metric in silent if metric.feature in (*ROUGE, FLUENCY)]
        self._withhold(lost, "no answers are generated, see --eval.generate_rows")

    def only(self, splits: Collection[str]) -> "Evaluation":
        """The same over some of its splits; what rests on another one is unavailable.

        Args:
            splits: Names of the splits to keep.

        Raises:
            UserError: There is no such split.
        """
        known = [part.name for part in self.sets]
        for name in splits:
            if name not in known:
                raise UserError(f"--eval.splits {name}: no such split; this benchmark measures {', '.join(known)}")
        kept, left = ([part for part in self.sets if (part.name in splits) is keep] for keep in (True, False))
        dropped = [metric for part in left for metric in (*part.metrics.values(), *part.scores.values())]
        if any(part.scores for part in left):
            # Scores of one split alone are of no use, and some of them cost a backward pass a row.
            kept = [replace(part, scores={}) for part in kept]
        result = type(self)(kept, self.summary, self.unavailable, self._decode)
        result.min_k = self.min_k
        result._withhold(dropped, "it rests on splits that --eval.splits leaves out")
        return result

    def _withhold(self, lost: list[RowMetric], reason: str) -> None:
        """Mark metrics that rest on lost ones as unavailable."""
        # By identity: metrics overload comparison.
        gone = {id(metric) for metric in lost}
        for name, metric in self._named():
            if any(id(part) in gone for part in metric.modules()):
                self.unavailable.setdefault(name, reason)

    def _named(self) -> list[tuple[str, Metric]]:
        return [*(item for part in self.sets for item in part.metrics.items()), *self.summary.items()]

    def names(self) -> list[str]:
        """Metrics that are measured."""
        return sorted({name for name, _ in self._named()} - set(self.unavailable))

    def to(self, device: torch.device) -> "Evaluation":
        """Say on which device processes gather the metrics' states, and where fluency is computed."""
        for metric in self._all_metrics():
            metric.to(device)
        for part in self.sets:
            if part.generation is not None and part.generation.fluency is not None:
                part.generation.fluency.device = device
        return self

    def reset(self) -> None:
        """Forget all scores."""
        self._texts.clear()
        for metric in self._all_metrics():
            metric.reset()

    def score(self, states: AnswerStates, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores `(B,)` of a scoring batch's answers by name; a benchmark with scores of its own overrides this.

        Args:
            states: Scored positions of the answers.
            batch: As `scoring_batches` makes it.
        """
        return score_rows(states, batch["end"], self.min_k, self._wanted(batch))

    def _wanted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows `(B,)` of a batch that have a reader of a score made on demand; scores without any are left out."""
        masks = {}
        for feature in ON_DEMAND:
            kinds = [max((m.kinds for m in part.readers(feature)), default=0) for part in self.sets]
            if any(kinds):
                mask = batch["kind"] < torch.tensor(kinds, device=batch["set"].device)[batch["set"]]
                if mask.any():
                    masks[feature] = mask
        return masks

    def add_scores(self, batch: Mapping[str, Tensor], scores: dict[str, Tensor]) -> None:
        """Take the scores `(B,)` of a scoring batch's answers, as `on_host` gives them."""
        sets, index, kind = torch.stack([batch["set"], batch["index"], batch["kind"]]).cpu()
        for number, part in enumerate(self.sets):
            inside = sets == number
            if inside.any():
                self._update(number, part, index[inside], kind[inside], scores, inside)

    def add_generations(self, batch: Mapping[str, Any], tokens: list[list[int]]) -> None:
        """Take the generated answers of a generation batch and score them as their splits say."""
        sets, indices = batch["set"].tolist(), batch["index"].tolist()
        for number, index, ids in zip(sets, indices, tokens, strict=True):
            part = self.sets[number]
            assert part.generation is not None
            text = self._texts[number, index] = part.generation.finish(self._decode(ids))
            found = part.generation.score(text, part.texts[index]["answer"])
            row = torch.tensor([index]), torch.tensor([0])
            scores = {name: torch.tensor([value], dtype=torch.float32) for name, value in found.items()}
            self._update(number, part, *row, scores, torch.tensor([True]))
        self._rate(sets, indices)

    def _rate(self, sets: list[int], indices: list[int]) -> None:
        """Score the fluency of generated texts, those of a split together."""
        for number, part in enumerate(self.sets):
            rows = [index for n, index in zip(sets, indices, strict=True) if n == number]
            if rows and part.generation is not None and part.generation.fluency is not None:
                found = part.generation.fluency([self._texts[number, index] for index in rows])
                rated = torch.tensor(found, dtype=torch.float32)
                kind = torch.zeros(len(rows), dtype=torch.long)
                self._update(number, part, torch.tensor(rows), kind, {FLUENCY: rated}, torch.ones_like(rated).bool())

    def compute(self) -> EvalResult:
        """Numbers and rows over all processes; every process gets the same.

        Raises:
            UserError: From a metric whose input makes no sense.
        """
        values: dict[str, float] = {}
        counts: dict[str, int] = {}
        unavailable = dict(self.unavailable)
        for name, metric in self._named():
            if name not in self.unavailable:
                result = metric.compute()
                values[name], counts[name] = result["value"], int(result["n"])
                if math.isnan(values[name]):
                    unavailable[name] = "one of its scores is not a number" if counts[name] else "no row was scored"
                keys = getattr(metric, "result_keys", ())
                values |= {f"{name}/{key}": result[key] for key in keys if key != "value"}
        rows = self._rows()
        for row in rows:
            if not math.isfinite(row.get("answer_nll", 0.0)) and self._scored(row):
                rank_zero_warn(
                    f"the model's loss on {row['split']} row {row['index']} is not finite, nor are the metrics it "
                    "enters: look for weights that are not numbers"
                )
                break
        return EvalResult(values, counts, unavailable, rows)

    def _scored(self, row: Mapping[str, Any]) -> bool:
        """Whether a row's answer was scored; an evaluation may be limited to some batches."""
        number = next(n for n, part in enumerate(self.sets) if part.name == row["split"])
        return bool(self._raw[number].seen[row["index"], 0])

    def texts_only(self) -> EvalResult:
        """The generated answers over all processes, without metrics."""
        kept = {"split", "index", "generation"}.union(*(part.texts[0] for part in self.sets))
        return EvalResult({}, {}, {}, [{key: row[key] for key in row if key in kept} for row in self._rows()])

    def _update(
        self,
        number: int,
        part: EvalSet,
        index: Tensor,
        kind: Tensor,
        scores: dict[str, Tensor],
        inside: Tensor,
    ) -> None:
        own = {name: value[inside] for name, value in scores.items()}
        for metric in (self._raw[number], *part.metrics.values(), *part.scores.values()):
            if metric.feature in own:
                metric.update(index, kind, own)

    def _rows(self) -> list[dict[str, Any]]:
        texts = gather_texts(self._texts)
        rows = []
        for number, (part, raw) in enumerate(zip(self.sets, self._raw, strict=True)):
            raw.compute()
            for score in part.scores.values():
                score.compute()
            features = {m.feature: m.rows for m in part.metrics.values() if m.feature != "nll"}
            truth = {name.rsplit("/", 1)[-1]: m.rows for name, m in part.metrics.items() if m.feature == "nll"}
            scores = {name: m.rows for name, m in part.scores.items()}
            first = 2 if part.has_paraphrase else 1
            generated = {index for n, index in texts if n == number}
            tokens = part.tokens
            for index in sorted(raw.rows.keys() | generated):
                row: dict[str, Any] = {"split": part.name, "index": index, **part.texts[index]}
                if tokens:
                    row["tokens"] = tokens[index]
                if index in raw.rows:
                    nll = raw.cells[index].tolist()
                    row["answer_nll"] = nll[0]
                    if part.has_paraphrase:
                        row["paraphrase_nll"] = nll[1]
                    if len(nll) > first:
                        row["perturbed_nll"] = nll[first:]
                for name, per_row in [*features.items(), *truth.items(), *scores.items()]:
                    if index in per_row:
                        row[name] = per_row[index]
                if (number, index) in texts:
                    row["generation"] = texts[number, index]
                rows.append(row)
        return rows

    def _all_metrics(self) -> Iterable[Metric]:
        yield from self._raw
        for part in self.sets:
            yield from part.metrics.values()
            yield from part.scores.values()
        yield from self.summary.values()


def on_host(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores `(B,)` by name, on the CPU: one copy, so that metrics do not wait for a GPU one by one."""
    return dict(zip(scores, torch.stack(list(scores.values())).cpu(), strict=True))


def gather_texts(texts: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """Texts of all processes; strings cannot be tensor states, so they are gathered once, as objects."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return texts
    gathered: list[dict[tuple[int, int], str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, texts)
    return {key: text for part in reversed(gathered) for key, text in part.items()}
