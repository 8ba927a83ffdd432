"""Evaluations of models that do not change, start and retrained, are made once and kept."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simnpo_pl.errors import UserError
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalSet, plan_digest
from simnpo_pl.files import read_json, read_json_lines, write_json, write_json_lines


class EvaluationCache:
    """Results by everything they depend on: weights, tokens, metrics' settings, precision, versions.

    Args:
        options: Where to keep results and what is measured.
        precision: Precision, device and type of the weights the evaluation runs with.
    """

    def __init__(self, options: EvalOptions, precision: str) -> None:
        self.options = options
        self.precision = precision

    def folder(self, model: str, sets: list[EvalSet], against: str) -> Path | None:
        """Where the results of a model are kept, whether there already or not; None where nothing is kept.

        Args:
            model: Hub id or folder.
            sets: The splits to measure.
            against: All numbers of other models that the metrics compare with; empty for none.
        """
        if self.options.cache_dir is None:
            return None
        digest = hashlib.sha256(f"{model_fingerprint(model)} {plan_digest(sets)}".encode())
        versions = [version(name) for name in ("simnpo_pl", "torch", "transformers", "rouge-score")]
        settings = (self.options.truth_ratio, self.options.min_k, against, self.precision, versions)
        if self.options.fluency_classifier is not None:
            digest.update(f"{model_fingerprint(self.options.fluency_classifier)} {self.options.fluency_label}".encode())
        digest.update(repr(settings).encode())
        return Path(self.options.cache_dir).expanduser() / "evaluations" / digest.hexdigest()[:24]


def evaluate_once(trainer: Any, model: Any, data: Any) -> tuple[EvalResult, bool]:
    """Evaluate a model that does not change, or take the result that an earlier run kept.

    Args:
        trainer: Lightning Trainer; its `validate` runs the evaluation.
        model: `PolicyModule` of the model.
        data: `UnlearningData` or `AnswerLosses`, which says what is measured and where results are kept.

    Returns:
        The result, and whether it was kept from an earlier run.

    Raises:
        UserError: The Trainer is told to evaluate nothing.
    """
    data.setup("validate")
    run_in = (trainer.precision, trainer.strategy.root_device.type, model.dtype_name)
    kept = EvaluationCache(data.eval, " ".join(run_in))
    limit = trainer.limit_val_batches
    all_rows = isinstance(limit, float) and limit == 1.0 and not getattr(trainer, "fast_dev_run", 0)
    whole = all_rows and trainer.num_nodes == 1
    folder = kept.folder(model.name, data.evaluation().sets, data.compared_with()) if whole else None
    result = load(folder)
    if result is not None:
        return result, True
    trainer.validate(model, datamodule=data, verbose=False)
    result = model.evaluation_result
    if result is None:
        raise UserError(f"{model.name} was not evaluated: leave --trainer.limit_val_batches above 0")
    if folder is not None and trainer.is_global_zero:
        store(folder, result)
    trainer.strategy.barrier()
    return result, False


def load(folder: Path | None) -> EvalResult | None:
    """A kept result, if it is there and whole."""
    if folder is None or not (folder / "result.json").is_file():
        return None
    try:
        content, rows = read_json(folder / "result.json"), read_json_lines(folder / "rows.jsonl")
    except (UserError, FileNotFoundError):
        return None
    values = {name: float("nan") if value is None else value for name, value in content["values"].items()}
    return EvalResult(values, content["counts"], content["unavailable"], rows)


def store(folder: Path, result: EvalResult) -> None:
    """Keep a result; the file that marks it whole is written last."""
    write_json_lines(folder / "rows.jsonl", result.rows)
    content: dict[str, Any] = {
        "values": result.values,
        "counts": result.counts,
        "unavailable": result.unavailable,
    }
    write_json(folder / "result.json", content)


def model_fingerprint(name: str) -> str:
    """Identity of a model: of its files' bytes for a folder, the name itself for a hub id."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
