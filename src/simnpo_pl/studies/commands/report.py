"""Report over runs: a page to read offline (.html), Markdown with figures (.md), or LaTeX rows (.tex)."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders; without any the newest in runs/"
    )
    parser.add_argument(
        "-o",
        "--out",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what to write, by its ending: .html, .md (its figures go to a folder beside it), .tex; "
        "default: report.html in the folder of a single run, else here",
    )


def run(options: Namespace) -> None:
    """Write the report.

    Raises:
        UserError: A folder is no run, an ending is not known, or the libraries are not installed.
    """
    from simnpo_pl.runs.record import read_runs
    from simnpo_pl.utils.files import write_text

    runs = read_runs(options.runs)
    out = options.out or [(runs[0].folder if len(runs) == 1 else Path()) / "report.html"]
    for file in out:
        if file.suffix not in (".html", ".md", ".tex"):
            raise UserError(f"--out {file}: the ending must be .html, .md or .tex")
    try:
        from simnpo_pl.report import page, paper

        for file in map(Path.expanduser, out):
            if file.suffix == ".html":
                content = page.html(runs)
            elif file.suffix == ".md":
                folder = file.with_name(f"{file.stem}_figures")
                figures = [(title, f"{folder.name}/{name}") for title, name in paper.png(runs, folder)]
                content = paper.markdown(runs, figures)
            else:
                content = paper.latex(runs)
            write_text(file, content)
            print(f"written: {file}")
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'simnpo_pl[report]'") from error
