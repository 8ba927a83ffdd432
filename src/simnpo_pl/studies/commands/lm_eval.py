"""Accuracy of finished runs' models on tasks of lm-evaluation-harness, such as wmdp_bio, wmdp_cyber and mmlu.

The harness does the measuring; results join the run's results.json under lm_eval, by task. Tasks that are there already
are measured again.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--tasks", required=True, metavar="NAMES", help="the harness's tasks or groups, joined by commas: wmdp_bio,mmlu"
    )
    parser.add_argument("--include_path", type=Path, metavar="FOLDER", help="tasks of your own, as the harness's YAML")
    parser.add_argument("--start", action="store_true", help="measure each run's start model, too")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before a question; default: the task's")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, to try it out")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="questions at a time (default: 8)")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:0 or cpu; default: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: that of the saved model)")


def run(options: Namespace) -> None:
    """Measure every run, add to its results, print the table.

    Raises:
        UserError: An option is out of range, a task is unknown, the harness is missing, or a run is not finished.
    """
    for name in ("num_fewshot", "limit", "batch_size"):
        value, least = getattr(options, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if options.include_path is not None and not options.include_path.expanduser().is_dir():
        raise UserError(f"--include_path {options.include_path} is no folder")

    from simnpo_pl.studies.harness import Settings, measure, table
    from simnpo_pl.studies.reopen import finished_runs

    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    include = options.include_path
    settings = Settings(
        tasks=tasks,
        include_path=None if include is None else str(include.expanduser()),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    runs = finished_runs(options.runs)
    for one in runs:
        measure(one, settings, start=options.start)
    print(table(runs, tasks))
