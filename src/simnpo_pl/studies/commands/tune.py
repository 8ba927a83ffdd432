"""Tune methods with Optuna: the same number of trials for each, chosen by the rule that the file states.

    python -m simnpo_pl tune configs/tune/tofu_forget05.yaml -o results/tune_forget05.md

Files after the first change it. Call it on several machines that share the folder for several workers; the same call
goes on after an interrupt. All options but these are options of every run, after those of the file.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError

TAKES_FIT_OPTIONS = True


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="tuning file, and files that change it")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="Markdown file for the table of all trials")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: the tuning's)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods (default: all)")
    parser.add_argument("--table", action="store_true", help="only the table of the trials that are there")


def run(options: Namespace) -> None:
    """Make the trials and print the table.

    Raises:
        UserError: The files are no tuning, the rule uses what it must not, or Optuna is not installed.
    """
    from dataclasses import replace

    from simnpo_pl.studies.tuning.plan import read_tuning
    from simnpo_pl.utils.files import write_json, write_text

    tuning = read_tuning(options.files)
    if options.folder is not None:
        tuning = replace(tuning, folder=str(options.folder))
    methods = options.methods or list(tuning.methods)
    for method in methods:
        if method not in tuning.methods:
            raise UserError(f"--methods {method}: no such method; the tuning has {', '.join(tuning.methods)}")
    try:
        import optuna

        from simnpo_pl.studies.tuning.study import Search
        from simnpo_pl.studies.tuning.table import data, table
    except ModuleNotFoundError as error:
        raise UserError(f"tuning needs {error.name}: pip install 'simnpo_pl[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searches = {method: Search(tuning, method, options.fit) for method in tuning.methods}
    if not options.table:
        for method in methods:
            searches[method].work()
    found = list(searches.values())
    text = table(tuning, found)
    print(text)
    write_json(tuning.path / "trials.json", data(tuning, found))
    write_text(tuning.path / "trials.md", text)
    print(f"written: {tuning.path / 'trials.md'}, trials.json")
    if options.out is not None:
        write_text(options.out.expanduser(), text)
        print(f"written: {options.out}")
