"""Report over runs: a page to read offline (.html), Markdown with figures (.md), LaTeX (.tex), or figures as PDF."""

from argparse import Namespace
from pathlib import Path

from simnpo_pl.runs.record import read_runs
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_text


def run(options: Namespace) -> None:
    runs = read_runs(options.runs, options.label)
    out = options.out or [(runs[0].folder if len(runs) == 1 else Path()) / "report.html"]
    for file in out:
        if file.suffix not in (".html", ".md", ".tex", ""):
            raise UserError(
                f"--out {file}: the ending must be .html, .md or .tex; a name without an ending is a folder for figures"
            )
    try:
        from simnpo_pl.report import latex, page, paper, words

        columns = words.measured(runs, options.columns)
        for file in out:
            if file.suffix == "":
                paper.figures(runs, file)
            elif file.suffix == ".html":
                write_text(file, page.html(runs, columns))
            elif file.suffix == ".md":
                write_text(file, paper.markdown(runs, columns, file))
            else:
                write_text(file, latex.table(runs, columns))
            print(f"written: {file}")
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'simnpo_pl[report]'") from error
