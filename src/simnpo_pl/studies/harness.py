"""lm-evaluation-harness, called as a library on the models of finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simnpo_pl.cli.summary import number
from simnpo_pl.models.loading import find_model
from simnpo_pl.models.lora import ADAPTER_CONFIG, base_of
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError

KEY = "lm_eval"
"""Where results.json holds what was measured: model (`start`, `final`) to task to its numbers."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how; names are the harness's.

    Args:
        tasks: Tasks or groups of tasks.
        include_path: Folder with further tasks.
        num_fewshot: Examples before a question; None takes the task's own.
        limit: Questions of each task at most.
        batch_size: Questions at a time.
        device: Such as `cuda:0`; None takes a GPU where there is one.
        dtype: Type of the weights; `auto` takes that of the saved model.
    """

    tasks: Sequence[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str = "auto"


def measure(run: Run, settings: Settings, start: bool = False) -> None:
    """Measure a run's model, and where asked for its start model; each joins the run's results once it is whole.

    Args:
        run: The run.
        settings: What is measured.
        start: Whether the start model is measured, too.
    """
    models = {"final": str(run.folder / "model")}
    if start:
        models["start"] = run.record["settings"]["model"]["name"]
    for role, model in models.items():
        # Start models may have their tokenizer elsewhere; the run's has its own.
        found = evaluate(model, settings, tokenizer=models["final"])

        def change(content: dict[str, Any], role: str = role, found: dict[str, Any] = found) -> None:
            content.setdefault(KEY, {}).setdefault(role, {}).update(found)

        add_results(run, change)


def evaluate(model: str, settings: Settings, tokenizer: str | None = None) -> dict[str, dict[str, Any]]:
    """Numbers of every task, subtask and group.

    Args:
        model: Hub id or folder.
        settings: What is measured.
        tokenizer: Hub id or folder; None takes the model's own.

    Returns:
        Task to its metrics, such as `acc` and `acc_stderr`, with `n` (questions), `num_fewshot`, `limit` and `version`.

    Raises:
        UserError: The harness is not installed, does not know a task, or cannot get its questions.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(f"this needs lm-evaluation-harness ({error}): pip install 'simnpo_pl[lm-eval]'") from error
    manager = _task_manager(settings)
    weights = {"pretrained": model}
    if (Path(model) / ADAPTER_CONFIG).is_file():
        with base_of(Path(model)) as base:
            weights = {"pretrained": find_model(base), "peft": model}
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={**weights, "tokenizer": tokenizer or model, "dtype": settings.dtype},
            tasks=list(settings.tasks),
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            # Left to itself the harness asks for a GPU whether there is one or not.
            device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"lm-evaluation-harness cannot measure {model} ({type(error).__name__}: {reason})") from error
    assert results is not None
    return {task: _numbers(task, results, settings.limit) for task in results["results"]}


def _task_manager(settings: Settings) -> Any:
    """The harness's index of tasks."""
    from lm_eval.tasks import TaskManager

    folder = settings.include_path
    # Its own fourteen thousand tasks take ten seconds to index, so they are left out where they are not asked for.
    for defaults in (False, True) if folder is not None else (True,):
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [task for task in settings.tasks if task not in manager.all_tasks]
        if settings.tasks and not unknown:
            return manager
    raise UserError(
        f"--tasks: lm-evaluation-harness {version('lm_eval')} knows no task {', '.join(unknown) or 'of no name'}; "
        "python -m lm_eval ls tasks lists them, --include_path FOLDER adds your own"
    )


def _numbers(task: str, results: Any, limit: int | None) -> dict[str, Any]:
    """The harness's entry of a task, with keys such as `acc,none`, as plain names."""
    found = {}
    for key, value in results["results"][task].items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float):
            found[metric if filtered == "none" else f"{metric}/{filtered}"] = value
    told = {
        "n": results["n-samples"].get(task, {}).get("effective"),
        "num_fewshot": results["n-shot"].get(task),
        "limit": limit,
        "version": f"lm_eval {version('lm_eval')}, task {results['versions'].get(task)}",
    }
    # A group has no questions of its own.
    return {**found, **{name: value for name, value in told.items() if value is not None}}


def table(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    """Accuracy of the runs' models on some tasks, as Markdown."""
    lines = []
    for run in runs:
        for role, name in (("start", "start"), ("final", "unlearned")):
            held = run.record.get(KEY, {}).get(role)
            if held:
                cells = [number(held.get(task, {}).get("acc")) for task in tasks]
                lines.append([Path(run.name).name, name, *cells])
    return markdown.table(["run", "model", *tasks], lines)
