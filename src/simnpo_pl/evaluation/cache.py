"""Evaluations of models that do not change, start and retrained, kept for the other runs of a study."""

import hashlib
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torchmetrics import Metric

from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.plan import plan_digest
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

PACKAGE = Path(__file__).parents[1]


def evaluate_once(trainer: Any, model: Any, data: Any) -> tuple[EvalResult, bool]:
    """Evaluate a model that does not change, or take the result that an earlier run kept.

    Args:
        trainer: Lightning Trainer; its `validate` runs the evaluation.
        model: `PolicyModule` of the model.
        data: `PairedData` or `AnswerLosses`, which says what is measured and where results are kept.

    Returns:
        The result, and whether it was kept from an earlier run.

    Raises:
        UserError: The Trainer is told to evaluate nothing.
    """
    data.setup("validate")
    limit = trainer.limit_val_batches
    all_rows = isinstance(limit, float) and limit == 1.0 and not getattr(trainer, "fast_dev_run", 0)
    file = None
    if data.eval.cache_dir is not None and all_rows and trainer.num_nodes == 1:
        file = Path(data.eval.cache_dir).expanduser() / f"{_key(trainer, model, data)}.json"
        if (kept := load(file)) is not None:
            return kept, True
    trainer.validate(model, datamodule=data, verbose=False)
    result = model.evaluation_result
    if result is None:
        raise UserError(f"{model.name} was not evaluated: leave --trainer.limit_val_batches above 0")
    if file is not None and trainer.is_global_zero:
        write_json(file, vars(result))
    trainer.strategy.barrier()
    return result, False


def load(file: Path) -> EvalResult | None:
    """A kept result, if it is there and whole."""
    try:
        content = read_json(file)
    except (UserError, FileNotFoundError):
        return None
    values = {name: float("nan") if value is None else value for name, value in content["values"].items()}
    return EvalResult(**{**content, "values": values})


def _key(trainer: Any, model: Any, data: Any) -> str:
    """Identity of everything a result depends on: weights, tokens, metrics with their settings, code, precision."""
    evaluation: Evaluation = data.evaluation()
    plans = [part.generation for part in evaluation.sets if part.generation is not None]
    metrics: list[Metric] = [m for part in evaluation.sets for m in (*part.metrics.values(), *part.scores.values())]
    metrics += evaluation.summary.values()
    tokenizer = getattr(getattr(data, "tokenizer", None), "name_or_path", model.name)
    content = (
        [fingerprint(name) for name in dict.fromkeys((model.name, tokenizer, data.eval.fluency_classifier)) if name],
        (data.eval.fluency_label, evaluation.min_k, sorted(data.end_ids), plan_digest(evaluation.sets)),
        [_settings(metric) for metric in metrics],
        _code(data, evaluation, *metrics, *(function for plan in plans for function in (plan.score, plan.finish))),
        (trainer.precision, trainer.strategy.root_device.type, model.dtype_name, model.attn_implementation),
        [version(name) for name in ("torch", "transformers", "rouge-score")],
    )
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


def fingerprint(name: str) -> str:
    """Identity of a model or tokenizer: of a folder's files, an adapter's base included; of a hub id and its commit."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            return f"{name} {try_to_load_from_cache(name, 'config.json')}"
        except ValueError:
            # Neither folder nor hub id: loading it gives the reason.
            return name
    found = _files(file for file in folder.iterdir() if file.is_file())
    adapter = folder / "adapter_config.json"
    return found + fingerprint(read_json(adapter)["base_model_name_or_path"]) if adapter.is_file() else found


def _settings(metric: Metric) -> list[Any]:
    """Class and plain attributes of a metric and its parts; not their states, which an evaluation changes."""
    kinds = (Tensor, str, int, float, tuple, list)
    return [
        (
            type(part).__qualname__,
            [
                (name, value.tolist() if isinstance(value, Tensor) else value)
                for name, value in sorted(vars(part).items())
                if isinstance(value, kinds) and not name.startswith("_") and name not in getattr(part, "_defaults", ())
            ],
        )
        for part in metric.modules()
    ]


def _code(*things: Any) -> str:
    """Identity of this package's source and of the files that define objects, classes of others among them."""
    modules = {getattr(kind, "__module__", "") for thing in things for kind in (*type(thing).__mro__, thing)}
    named = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    return _files({*PACKAGE.rglob("*.py"), *(Path(file) for file in named if file)})


def _files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
