"""A run folder as `fit` and `test` leave it; all that reads one does so through `Run`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, read_json_lines

Row = dict[str, Any]


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
    def finished(self) -> bool:
        return bool(self.record.get("finished"))

    @property
    def unlearned(self) -> bool:
        """Whether the run trained; if not, it only evaluated."""
        return "objective" in self.record

    @property
    def method(self) -> str:
        """Name of the objective; "evaluation" if the run did not train."""
        return self.record["objective"]["name"] if self.unlearned else "evaluation"

    @property
    def start_model(self) -> str:
        return self.record["settings"]["model"]["name"]

    @property
    def forget_split(self) -> str:
        return str(self.record["settings"].get("data", {}).get("init_args", {}).get("forget_split") or "forget")

    @property
    def forget_rows(self) -> int | None:
        """Number of rows behind forget quality, or else behind the forget probability."""
        counts = self.record.get("counts", {})
        return counts.get("forget_quality", counts.get("forget/probability"))

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each phase, and `total`."""
        return self.record.get("seconds", {})

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
    def config(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text() if file.is_file() else ""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs in these folders, or the newest run in runs/ if there are none.

    Raises:
        UserError: A folder holds no results, or no run was found.
    """
    if not folders:
        found = sorted(Path("runs").glob("*/results.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError("no run to report on: name run folders, or call this from the folder that holds runs/")
        folders = [found[-1].parent]
    paths = list(dict.fromkeys(folder.expanduser().resolve() for folder in folders))
    names = [path.name for path in paths]
    runs = []
    for path in paths:
        file = path / "results.json"
        if not file.is_file():
            raise UserError(f"{path} holds no results.json; give folders that fit or test wrote")
        record = read_json(file)
        if not isinstance(record, dict) or "versions" not in record:
            raise UserError(f"{file} is not a results file of a run; give folders that fit or test wrote")
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        runs.append(Run(name, path, record))
    return runs
