"""Collects the scores of an evaluation on every process and turns them into numbers and per-row logs."""

import hashlib
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from simnpo_pl.evaluation.finished import gather
from simnpo_pl.evaluation.fluency import FLUENCY
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import OF_GENERATED, Split, add_metrics
from simnpo_pl.evaluation.scoring import ON_DEMAND, score_rows
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.generated import DEGENERATE, VERBATIM, text_scores
from simnpo_pl.metrics.titles import TITLES, Title, title_of
from simnpo_pl.models.generation import Choose, Sampler, draws_of, most_probable
from simnpo_pl.models.logprobs import AnswerStates
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class EvalResult:
    """What one evaluation of one model found.

    Args:
        values: Metric name to number; NaN if it could not be computed.
        counts: Metric name to the number of rows behind it.
        unavailable: Metric name to the reason why it was not measured or is not a number.
        rows: One object per row and split: question, answer, scores, generated text.
        titles: Metric name to its title, unit and direction, of metrics that `metrics.titles` does not know.
        intervals: Mean over rows to its 95 % interval by bootstrap.
    """

    values: dict[str, float]
    counts: dict[str, int]
    unavailable: dict[str, str]
    rows: list[dict[str, Any]] = field(repr=False)
    titles: dict[str, dict[str, Any]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


class Evaluation:
    """Metrics of several splits, filled batch by batch, each row exactly once on any number of processes.

    Args:
        splits: The splits with their metrics.
        summary: Metrics over several splits, which read metrics of the splits.
        unavailable: Metrics that cannot be measured, with the reason.
        decode: Turns generated token ids into text.

    Attributes:
        min_k: Share of the tokens that Min-K% and Min-K%++ average.
        temperature: Of generated answers; 0 is greedy.
        seed: Of sampled answers.
    """

    def __init__(
        self,
        splits: list[Split],
        summary: Mapping[str, Metric],
        unavailable: Mapping[str, str],
        decode: Callable[[list[int]], str],
    ) -> None:
        for split in splits:
            if split.generation is not None:
                forget = (VERBATIM,) if "forget" in split.name else ()
                for score in (*forget, DEGENERATE):
                    split.metrics.setdefault(f"{split.name}/{score}", RowMean(score, len(split.texts)))
        self.splits = splits
        self.summary = dict(summary)
        self.unavailable = dict(unavailable)
        self.min_k, self.temperature, self.seed = 0.4, 0.0, 0
        self._decode = decode
        self._texts: dict[tuple[int, int], str] = {}

    def configure(self, options: EvalOptions, seed: int) -> "Evaluation":
        """Apply the user's options: sampling, further metrics, and which splits are measured.

        Raises:
            UserError: There is no such split, or a further metric cannot be built.
        """
        self.min_k, self.temperature, self.seed = options.min_k, options.temperature, seed
        add_metrics(self.splits, options.metrics or [])
        if options.splits is not None:
            self._keep(options.splits)
        silent = [metric for split in self.splits if not split.generate for metric in split.metrics.values()]
        lost = [metric for metric in silent if metric.feature in OF_GENERATED]
        self._withhold(lost, "no answers are generated, see --eval.generate_rows")
        return self

    def _keep(self, names: Collection[str]) -> None:
        """Measure these splits alone; a metric that reads another one is unavailable."""
        known = [split.name for split in self.splits]
        for name in names:
            if name not in known:
                raise UserError(f"--eval.splits {name}: no such split; this benchmark measures {', '.join(known)}")
        left = [split for split in self.splits if split.name not in names]
        self.splits = [split for split in self.splits if split.name in names]
        if any(split.scores for split in left):
            # Scores of one split alone are of no use, and some of them cost a backward pass a row.
            for split in self.splits:
                split.scores = {}
        lost = [metric for split in left for metric in split.all_metrics]
        self._withhold(lost, "it rests on splits that --eval.splits leaves out")

    def _withhold(self, lost: list[RowMetric], reason: str) -> None:
        """Mark metrics that read lost ones as unavailable."""
        # By identity: metrics overload comparison.
        gone = {id(metric) for metric in lost}
        for name, metric in self._named():
            if any(id(part) in gone for part in metric.modules()):
                self.unavailable.setdefault(name, reason)

    def _named(self) -> list[tuple[str, Metric]]:
        return [*(item for split in self.splits for item in split.metrics.items()), *self.summary.items()]

    def names(self) -> list[str]:
        """Metrics that are measured."""
        return sorted({name for name, _ in self._named()} - set(self.unavailable))

    def titles(self) -> dict[str, Title]:
        """Titles of its metrics by name, measured or not."""
        return {name: title_of(name, metric) for name, metric in self._named()}

    def _all_metrics(self) -> list[Metric]:
        return [*(m for split in self.splits for m in (split.raw, *split.all_metrics)), *self.summary.values()]

    def digest(self) -> str:
        """Identity of what is scored and generated, and how."""
        sampling = (self.temperature, self.seed) if self.temperature else None
        content = (type(self).__qualname__, [split.digest() for split in self.splits], self.min_k, sampling)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def to(self, device: torch.device) -> "Evaluation":
        """Set the device on which processes gather the metrics' states, and on which fluency is computed."""
        for metric in self._all_metrics():
            metric.to(device)
        for split in self.splits:
            if split.generation is not None and split.generation.fluency is not None:
                split.generation.fluency.device = device
        return self

    def reset(self) -> None:
        """Forget all scores."""
        self._texts.clear()
        for metric in self._all_metrics():
            metric.reset()

    def choice(self, batch: Mapping[str, Any]) -> Choose:
        """How the next tokens of a generation batch are chosen.

        Draws follow from seed, split and row, so an answer does not depend on batches and processes.
        """
        if not self.temperature:
            return most_probable
        rows = zip(batch["split"].tolist(), batch["index"].tolist(), strict=True)
        names = [(zlib.crc32(self.splits[number].name.encode()), index) for number, index in rows]
        draws = [draws_of(self.seed, index, name, batch["max_new_tokens"]) for name, index in names]
        return Sampler(torch.stack(draws), self.temperature)

    def score(self, states: AnswerStates, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores `(B,)` of a scoring batch's answers by name; a benchmark with custom scores overrides this.

        Args:
            states: Scored positions of the answers.
            batch: From `scoring_batches`.
        """
        return score_rows(states, batch["end"], self.min_k, self._wanted(batch))

    def _wanted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores that are made on demand, and the rows `(B,)` of a batch for which a metric reads them."""
        masks = {}
        for feature in ON_DEMAND:
            kinds = [max((m.kinds for m in split.readers(feature)), default=0) for split in self.splits]
            mask = batch["kind"] < torch.tensor(kinds)[batch["split"]]
            if mask.any():
                masks[feature] = mask
        return masks

    def add_scores(self, batch: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        """Take the scores `(B,)` of a scoring batch's answers, as `on_host` gives them."""
        numbers, index, kind = torch.stack([batch["split"], batch["index"], batch["kind"]]).cpu()
        for number in range(len(self.splits)):
            inside = numbers == number
            if inside.any():
                own = {name: value[inside] for name, value in scores.items()}
                self._update(number, index[inside], kind[inside], own)

    def add_generations(self, batch: Mapping[str, Any], tokens: list[list[int]]) -> None:
        """Take the generated answers of a generation batch and score them, those of a split together."""
        rows = list(zip(batch["split"].tolist(), batch["index"].tolist(), tokens, strict=True))
        for number in sorted({number for number, _, _ in rows}):
            split, made = self.splits[number], self.splits[number].generation
            assert made is not None
            texts = {index: made.finish(self._decode(ids)) for n, index, ids in rows if n == number}
            self._texts |= {(number, index): text for index, text in texts.items()}
            right = [(text, split.texts[index]["answer"]) for index, text in texts.items()]
            found = [made.score(*pair) | text_scores(*pair) for pair in right]
            scores = {name: torch.tensor([one[name] for one in found]) for name in found[0]}
            if made.fluency is not None:
                scores[FLUENCY] = torch.tensor(made.fluency(list(texts.values())))
            self._update(number, torch.tensor(list(texts)), torch.zeros(len(texts), dtype=torch.long), scores)

    def _update(self, number: int, index: Tensor, kind: Tensor, scores: Mapping[str, Tensor]) -> None:
        split = self.splits[number]
        for metric in (split.raw, *split.all_metrics):
            if metric.feature in scores:
                metric.update(index, kind, scores)

    def compute(self) -> EvalResult:
        """Numbers and rows over all processes; every process gets the same.

        Raises:
            UserError: From a metric whose input makes no sense.
        """
        values: dict[str, float] = {}
        counts: dict[str, int] = {}
        unavailable, titles, intervals = dict(self.unavailable), {}, {}
        for name, metric in self._named():
            if name in self.unavailable:
                continue
            result = metric.compute()
            values[name], counts[name] = result["value"], int(result["n"])
            if not math.isfinite(values[name]):
                unavailable[name] = "one of its scores is not a number" if counts[name] else "no row was scored"
            keys = getattr(metric, "result_keys", ())
            values |= {f"{name}/{key}": result[key] for key in keys if key != "value"}
            if isinstance(metric, RowMetric) and (bounds := metric.interval()):
                intervals[name] = bounds
            if name not in TITLES:
                titles[name] = vars(title_of(name, metric))
        rows = self._rows()
        for split in self.splits:
            raw = split.raw
            lost = [i for i in raw.rows if raw.answered[i] and not raw.cells[i, 0].isfinite()]
            if lost:
                rank_zero_warn(
                    f"the model's loss on {split.name} row {lost[0]} is not finite, nor are the metrics that read it: "
                    "look for weights that are not numbers"
                )
                break
        return EvalResult(values, counts, unavailable, rows, titles, intervals)

    def texts_only(self) -> EvalResult:
        """The generated answers over all processes, without metrics."""
        kept = {"split", "index", "generation"}.union(*(split.texts[0] for split in self.splits))
        return EvalResult({}, {}, {}, [{key: row[key] for key in row if key in kept} for row in self._rows()])

    def _rows(self) -> list[dict[str, Any]]:
        texts = gather_texts(self._texts)
        rows = []
        for number, split in enumerate(self.splits):
            raw = split.raw
            for metric in (raw, *split.scores.values()):
                metric.compute()
            named = {_column(name, metric): metric for name, metric in split.metrics.items()} | split.scores
            first, tokens = 1 + split.has_paraphrase, split.tokens
            for index in sorted(raw.rows.keys() | {index for n, index in texts if n == number}):
                row: dict[str, Any] = {"split": split.name, "index": index, **split.texts[index]}
                if tokens:
                    row["tokens"] = tokens[index]
                if index in raw.rows:
                    nll = raw.cells[index].tolist()
                    row["answer_nll"] = nll[0]
                    if split.has_paraphrase:
                        row["paraphrase_nll"] = nll[1]
                    if len(nll) > first:
                        row["perturbed_nll"] = nll[first:]
                row |= {name: metric.rows[index] for name, metric in named.items() if index in metric.rows}
                if (number, index) in texts:
                    row["generation"] = texts[number, index]
                rows.append(row)
        return rows


def _column(name: str, metric: RowMetric) -> str:
    """Name of a metric's values by row: what is averaged is called after the score."""
    averaged = isinstance(metric, RowMean) and metric.feature != "nll"
    return metric.feature if averaged else name.rsplit("/", 1)[-1]


def on_host(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores `(B,)` by name, on the CPU: one copy, so that metrics do not wait for a GPU one by one."""
    return dict(zip(scores, torch.stack(list(scores.values())).cpu(), strict=True))


def gather_texts(texts: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """Texts of all processes; strings cannot be tensor states, so they are gathered once, as objects."""
    return {key: text for found in reversed(gather(texts)) for key, text in found.items()}
