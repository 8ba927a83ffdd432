"""What a report reads: run folders as `fit` and `test` leave them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json_lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        name: What the report calls it; unique in a report.
        folder: Where it lies.
        record: Content of `results.json`.
    """

    name: str
    folder: Path
    record: dict[str, Any]

    def metrics(self, model: str) -> dict[str, float]:
        """Metrics of the `start`, `retrained` or `final` model; empty where it was not evaluated."""
        return (self.record.get(model) or {}).get("metrics", {})

    @property
    def unlearned(self) -> bool:
        """Whether the run trained, or only evaluated."""
        return "objective" in self.record

    @cached_property
    def rows(self) -> list[Row]:
        """Scored rows of the final model."""
        return _lines(self.folder / "rows.jsonl")

    @cached_property
    def start_rows(self) -> list[Row]:
        """Scored rows of the start model."""
        return _lines(self.folder / "start_rows.jsonl")

    @cached_property
    def retrained_rows(self) -> list[Row]:
        """Rows of the retrained model: all scores, or the truth ratios its log holds."""
        return _lines(self.folder / "retrained_rows.jsonl")

    @cached_property
    def history(self) -> list[Row]:
        """Losses of every optimizer step."""
        return _lines(self.folder / "history.jsonl")

    @cached_property
    def weights(self) -> list[Row]:
        """Gradient weights of every forget row and epoch."""
        return _lines(self.folder / "weights.jsonl")

    @property
    def config(self) -> str:
        """The resolved config, YAML."""
        file = self.folder / "config.yaml"
        return file.read_text() if file.is_file() else ""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs to report on.

    Args:
        folders: Run folders; without any, the newest under `runs`.

    Raises:
        UserError: A folder holds no results, or none is found.
    """
    if not folders:
        found = sorted(Path("runs").glob("*/results.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError("no run to report on: name run folders, or start from where runs/ lies")
        folders = [found[-1].parent]
    paths = [folder.expanduser().resolve() for folder in folders]
    runs = []
    for path in dict.fromkeys(paths):
        file = path / "results.json"
        try:
            record = json.loads(file.read_text())
            assert isinstance(record["versions"], dict)
        except FileNotFoundError:
            raise UserError(f"{path} holds no results.json; give folders that fit or test wrote") from None
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{file} is no results file of a run; give folders that fit or test wrote") from error
        same = sum(other.name == path.name for other in set(paths)) > 1
        runs.append(Run(f"{path.parent.name}/{path.name}" if same else path.name, path, record))
    return runs


def _lines(file: Path) -> list[Row]:
    return read_json_lines(file) if file.is_file() else []
