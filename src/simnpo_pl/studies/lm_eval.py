"""Accuracy of finished runs' models on tasks of lm-evaluation-harness, such as wmdp_bio, wmdp_cyber and mmlu.

The harness measures; results are added to the run's results.json under lm_eval, by model and task. Tasks that are
already there are measured again.
"""

from argparse import Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simnpo_pl.metrics.titles import number
from simnpo_pl.models.loading import find_model
from simnpo_pl.models.lora import ADAPTER_CONFIG, base_of
from simnpo_pl.runs.verdict import exported
from simnpo_pl.studies.reopen import add_results, finished_runs, model_of
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError


def run(options: Namespace) -> None:
    if options.include_path is not None and not options.include_path.is_dir():
        raise UserError(f"--include_path: {options.include_path} is not a folder")
    lines = []
    for one in finished_runs(options.runs):
        models = {"final": model_of(one)}
        if options.start:
            models["start"] = one.start_model
        for role, model in models.items():
            # A start model may lack a tokenizer; the run's has one.
            found = evaluate(model, models["final"], options)
            add_results(one, partial(_add, role, found))
        for role, name in (("start", "start"), ("final", exported(one.record))):
            if known := one.record["lm_eval"].get(role):
                lines.append([one.name, name, *(number(known.get(task, {}).get("acc")) for task in options.tasks)])
    print(markdown.table(["run", "model", *options.tasks], lines))


def _add(role: str, found: dict[str, Any], results: dict[str, Any]) -> None:
    results.setdefault("lm_eval", {}).setdefault(role, {}).update(found)


def evaluate(model: str, tokenizer: str, options: Namespace) -> dict[str, dict[str, Any]]:
    """Task, subtask or group to its metrics, such as `acc` and `acc_stderr`, with `n` (questions) and settings."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(f"this needs lm-evaluation-harness ({error}): pip install 'simnpo_pl[lm-eval]'") from error
    weights = {"pretrained": model}
    if (Path(model) / ADAPTER_CONFIG).is_file():
        with base_of(Path(model)) as base:
            weights = {"pretrained": find_model(base), "peft": model}
    task_manager = _task_manager(options)
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={**weights, "tokenizer": tokenizer, "dtype": options.dtype},
            tasks=options.tasks,
            task_manager=task_manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            # The harness's own default is a GPU even if there is none.
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"lm-evaluation-harness cannot measure {model} ({type(error).__name__}: {reason})") from error
    return {task: _numbers(task, results, options.limit) for task in results["results"]}


def _task_manager(options: Namespace) -> Any:
    from lm_eval.tasks import TaskManager

    include = options.include_path and str(options.include_path)
    # The harness takes ten seconds to index its tasks, which are not needed if the folder has all that are asked for.
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        unknown = [task for task in options.tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise UserError(
        f"--tasks: lm-evaluation-harness {version('lm_eval')} knows no task {', '.join(unknown)}; "
        "python -m lm_eval ls tasks lists them, --include_path FOLDER adds your own"
    )


def _numbers(task: str, results: Any, limit: int | None) -> dict[str, Any]:
    """The harness's entry of a task, with keys such as `acc,none`, as plain names."""
    found = {}
    for key, value in results["results"][task].items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float):
            found[metric if filtered == "none" else f"{metric}/{filtered}"] = value
    settings = {
        "n": results["n-samples"].get(task, {}).get("effective"),
        "num_fewshot": results["n-shot"].get(task),
        "limit": limit,
        "version": f"lm_eval {version('lm_eval')}, task {results['versions'].get(task)}",
    }
    # A group has no questions.
    return {**found, **{name: value for name, value in settings.items() if value is not None}}
