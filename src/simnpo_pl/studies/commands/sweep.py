"""A table of the paper: the runs of a sweep file, methods x splits x seeds, and the table of what they found.

    python -m simnpo_pl sweep configs/sweep/table1.yaml -o results/table1.md
    python -m simnpo_pl sweep configs/sweep/table1.yaml --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Files after the first change it. Finished runs are skipped and interrupted ones go on; workers that share the folder
never take the same run. All options but these are options of every run, after those of the file.
"""

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError

TAKES_FIT_OPTIONS = True


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="sweep file, and files that change it")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="Markdown file for the table")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: the sweep's)")
    parser.add_argument("--shard", metavar="I/N", help="only every Nth run, from the Ith, counted from 0")
    parser.add_argument("--table", action="store_true", help="only the table of the runs that are there")
    parser.add_argument("--list", action="store_true", help="only print the command of every run")


def run(options: Namespace) -> None:
    """Make the runs and print the table.

    Raises:
        UserError: The files are no sweep, an option makes no sense, or runs failed.
    """
    from dataclasses import replace

    from simnpo_pl.studies.sweeps.plan import read_sweep
    from simnpo_pl.studies.sweeps.tables import COLUMNS, table
    from simnpo_pl.studies.sweeps.work import work
    from simnpo_pl.utils.files import write_text

    sweep = read_sweep(options.files)
    if options.folder is not None:
        sweep = replace(sweep, folder=str(options.folder))
    if sweep.table not in COLUMNS:
        raise UserError(f"the sweep's table is {sweep.table!r}; known are {', '.join(COLUMNS)}")
    runs, models = sweep.runs(options.fit), sweep.made_models(options.fit)
    share = _share(options.shard)
    if options.list:
        for planned in [*models, *runs[share]]:
            target = "--out" if planned.command == "task-vector" else "--run_dir"
            words = [planned.command, *planned.options, target, str(sweep.path / planned.name)]
            for command in (words, *planned.after):
                print(shlex.join(["python", "-m", "simnpo_pl", *command]))
        return
    failed = [] if options.table else work(sweep, runs[share], models)
    text = table(sweep, runs)
    print(text)
    if options.out is not None:
        write_text(options.out.expanduser(), text)
        print(f"written: {options.out}")
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}")


def _share(shard: str | None) -> slice:
    """Places of a worker's runs."""
    if shard is None:
        return slice(None)
    first, slash, count = shard.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise UserError(f"--shard must be I/N with I from 0 to N - 1, such as 0/8, got {shard}")
    return slice(int(first), None, int(count))
