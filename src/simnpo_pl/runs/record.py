"""A run folder as `fit` and `test` leave it; all that reads one does so through `Run`."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from simnpo_pl.metrics.titles import number
from simnpo_pl.runs.verdict import ATTACKS, headline
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, read_json_lines

Row = dict[str, Any]
_STAMP = re.compile(r"\d{4}-\d\d-\d\d_[\d-]+_(?:fit_)?")
"""Beginning of the name that the command line gives to a folder."""
TRAINING = re.compile(r"model|seed|train_split|forget_rows|refusals|alternates|(effective|per_device)_batch")
"""Settings of the data that do not change what is measured on a model."""
MEASURING = ("retain_log", "retrained", "truth_ratio", "generate_rows", "max_new_tokens", "temperature", "min_k")
"""Settings of the evaluation that change values of metrics."""
TOLD = ("objective", "retain_loss", "forget_weight", "retain_weight", "update")
"""Settings of the model that `Run.settings` tells."""


def geometric_ratio(row: Row) -> float | None:
    """Truth ratio of a row of a run's files, whatever the run's convention; None if it has none, or no finite loss.

    That of `metrics.functional.truth_ratio`, without torch, whose import takes a report longer than all else.
    """
    right, wrong = row.get("paraphrase_nll", row.get("answer_nll")), row.get("perturbed_nll")
    if wrong is None:
        return row.get("truth_ratio")
    losses: list[Any] = right if isinstance(right, list) else [right]
    return None if None in (*losses, *wrong) else math.exp(min(700.0, fmean(losses) - fmean(wrong)))


def _lines(name: str) -> "cached_property[list[Row]]":
    """Rows of a file of the folder; none if it does not exist."""

    def read(run: "Run") -> list[Row]:
        file = run.folder / f"{name}.jsonl"
        return read_json_lines(file) if file.is_file() else []

    return cached_property(read)


@dataclass(frozen=True)
class Run:
    """A run folder; `name` is unique in a report, `record` is the content of results.json."""

    name: str
    folder: Path
    record: dict[str, Any]
    differs: str = ""
    """Options of a report's runs that differ, as this run has them."""
    options: tuple[str, ...] = ()
    """Options with which attacks open the run, instead of its own."""

    rows = _lines("rows")
    """Scored rows of the final model."""
    start_rows = _lines("start_rows")
    retrained_rows = _lines("retrained_rows")
    """All scores of the retrained model, or the truth ratios of its log."""
    history = _lines("history")
    """Losses of every optimizer step."""
    weights = _lines("weights")
    """Gradient weights of every forget row and epoch."""

    def metrics(self, model: str) -> dict[str, float]:
        """Metrics of the `start`, `retrained` or `final` model; empty if it was not evaluated."""
        return (self.record.get(model) or {}).get("metrics", {})

    @property
    def models(self) -> dict[str, dict[str, float]]:
        """Metrics of every evaluated model."""
        return {model: self.metrics(model) for model in ("final", "start", "retrained") if self.metrics(model)}

    @property
    def epochs(self) -> list[tuple[int, dict[str, float]]]:
        """Every evaluated epoch and its metrics."""
        return [(entry["epoch"], entry["metrics"]) for entry in self.record.get("epochs", [])]

    @property
    def unlearned(self) -> bool:
        """Whether the run trained; if not, it only evaluated."""
        return "objective" in self.record

    @property
    def method(self) -> str:
        """Name of the objective, and after a plus that of the update rule; "evaluation" if the run did not train."""
        if not self.unlearned:
            return "evaluation"
        objective = self.record["objective"]
        return f"{objective['name']}+{objective['update']['name']}" if objective.get("update") else objective["name"]

    @property
    def title(self) -> str:
        """Its label, or the name of its folder without the time."""
        return self.record.get("label") or _STAMP.sub("", self.folder.name)

    @property
    def settings(self) -> str:
        """The objective's settings and the weights of the losses, if the run trained, and `differs`, in one line."""
        if not self.unlearned:
            return self.differs
        objective = self.record["objective"]
        found = objective["settings"] | (objective["update"]["settings"] if objective.get("update") else {})
        given = {name: value for name, value in found.items() if value is not None}
        named = ", ".join(f"{k} {number(v) if isinstance(v, int | float) else v}" for k, v in given.items())
        loss, weight = objective["retain_loss"], objective["retain_weight"]
        retain = f"retain weight {number(weight)} ({loss})" if loss else "no retain loss"
        weights = f"forget weight {number(objective['forget_weight'])}, {retain}"
        return "; ".join(filter(None, [named, weights, self.differs]))

    @property
    def verdict(self) -> dict[str, Any]:
        """Whether the run worked: `category`, `reasons`, `untested`, `advice`; empty if it has none."""
        return self.record.get("verdict") or {}

    @property
    def headline(self) -> str:
        """The verdict in a few words; empty if it has none."""
        return headline(self.record) if self.verdict else ""

    @property
    def temperature(self) -> float:
        """Of generated answers; 0 is greedy."""
        return float(self.record["settings"].get("eval", {}).get("temperature") or 0)

    @property
    def start_model(self) -> str:
        return self.record["settings"]["model"]["name"]

    @property
    def measured(self) -> dict[str, Any]:
        """Options that say which data is measured, and how; runs in which they are equal can be compared."""
        settings = self.record.get("settings", {})
        data, evaluation = settings.get("data", {}).get("init_args", {}), settings.get("eval", {})
        found = {f"data.{name}": value for name, value in data.items() if not TRAINING.fullmatch(name)}
        return found | {f"eval.{name}": evaluation[name] for name in MEASURING if name in evaluation}

    @property
    def forget_split(self) -> str:
        return str(self.measured.get("data.forget_split") or "forget")

    @property
    def forget_rows(self) -> int | None:
        """Number of rows behind forget quality, or else behind the forget probability."""
        counts = self.record.get("counts", {})
        return counts.get("forget_quality", counts.get("forget/probability"))

    @property
    def trained(self) -> str:
        """The rows that were unlearned, with their number where it is known."""
        data = self.record.get("settings", {}).get("data", {}).get("init_args", {})
        other = data.get("train_split") or data.get("forget_eval_split")
        rows = len(data.get("forget_rows") or ()) or (None if other else self.forget_rows)
        rows = rows or len({row["index"] for row in self.weights})
        return f"{rows or 'the'} rows of {data.get('train_split') or self.forget_split}"

    @property
    def memory(self) -> float | None:
        """Peak memory, GiB: the device's if there is one, else the process's."""
        peaks = self.record.get("peak_memory_gib", {})
        return peaks.get("device", peaks.get("process"))

    @property
    def relearned(self) -> list[dict[str, Any]]:
        """Relearning attacks: `settings`, and `repeats` with `rows` and `epochs`."""
        return list(self.record.get("relearn", {}).values())

    @property
    def quantized(self) -> dict[str, dict[str, float]]:
        """Metrics as exported and of all quantized weights; empty if none were."""
        found = {name: entry["metrics"] for name, entry in self.record.get("quantized", {}).items()}
        return {"as exported": self.metrics("final"), **found} if found else {}

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """Evaluations of sampled answers: `settings`, `n`, `metrics`, and leak@k by `prompts` and of the `control`."""
        # Entries of versions before 0.2 hold the best ROUGE under the name of leak@k.
        return [entry for entry in self.record.get("leak", {}).values() if "prompts" in entry]

    @property
    def recovered(self) -> dict[str, float]:
        """Highest score recovered, by attack; by relearning, of the rows that were not relearned if there are some."""
        probability = "forget/probability"
        repeats = [repeat for attack in self.relearned for repeat in attack["repeats"]]
        relearned = [epoch["metrics"] for repeat in repeats for epoch in repeat["epochs"]]
        rounded = self.record.get("quantized", {}).values()
        found = {
            "relearning, forget prob.": [m.get(f"{probability}/others", m.get(probability)) for m in relearned],
            "rounded weights, forget prob.": [entry["metrics"].get(probability) for entry in rounded],
            "sampled answers, rows with a right one": [
                one["prompts"]["any"][f"leak@{one['settings']['k']}"] for one in self.sampled
            ],
        }
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        return {name: max(values) for name, values in known.items() if values}

    @property
    def untested(self) -> list[str]:
        """What could still change the verdict; of a run without one, the attacks."""
        return self.verdict.get("untested", [] if self.recovered else list(ATTACKS.values()))

    def intervals(self, model: str) -> dict[str, list[float]]:
        """95 % intervals of a model's means over rows."""
        return (self.record.get(model) or {}).get("intervals", {})

    @property
    def config(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text() if file.is_file() else ""


def read_runs(folders: Sequence[Path], labels: Sequence[str] = ()) -> list[Run]:
    """Runs in these folders, or the newest run in runs/ if there are none; `labels` replace their names."""
    if not folders:
        found = sorted(Path("runs").glob("*/results.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError("no run to report on: name run folders, or call this from the folder that holds runs/")
        folders = [found[-1].parent]
    runs = []
    for path in dict.fromkeys(folder.expanduser().resolve() for folder in folders):
        file = path / "results.json"
        if not file.is_file():
            raise UserError(f"{path} holds no results.json; give folders that fit or test wrote")
        record = read_json(file)
        if not isinstance(record, dict) or "versions" not in record:
            raise UserError(f"{file} is not a results file of a run; give folders that fit or test wrote")
        runs.append(Run(path.name, path, record))
    if labels and len(labels) != len(runs):
        raise UserError(f"--label: expected a name for each of {len(runs)} runs, got {len(labels)}")
    for run, label in zip(runs, labels, strict=False):
        run.record["label"] = label
    names = next(names for names in _names(runs) if len(set(names)) == len(names))
    models = [run.record.get("settings", {}).get("model", {}).items() for run in runs]
    options = [{f"model.{name}": value for name, value in model if name not in TOLD} for model in models]
    told = differing([found | run.measured for run, found in zip(runs, options, strict=True)])
    return [replace(run, name=name, differs=differs) for run, name, differs in zip(runs, names, told, strict=True)]


def differing(options: Sequence[dict[str, Any]]) -> list[str]:
    """The options that differ, in one line for each."""
    known = dict.fromkeys(name for one in options for name in one)
    names = [name for name in known if any(one.get(name) != options[0].get(name) for one in options)]
    return [", ".join(f"{name} {' '.join(str(one.get(name)).split())}" for name in names) for one in options]


def _names(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Names of the runs, shorter ones first; the last tell all apart."""
    yield [run.title for run in runs]
    yield [f"{run.title}, seed {run.record.get('seed')}" for run in runs]
    yield [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]
    yield [str(run.folder) for run in runs]
