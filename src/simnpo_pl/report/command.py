"""Report over runs: a page to read offline (.html), Markdown with figures (.md), or LaTeX rows (.tex)."""

from argparse import Namespace
from pathlib import Path

from simnpo_pl.runs.record import read_runs
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_text


def run(options: Namespace) -> None:
    runs = read_runs(options.runs)
    out = options.out or [(runs[0].folder if len(runs) == 1 else Path()) / "report.html"]
    for file in out:
        if file.suffix not in (".html", ".md", ".tex"):
            raise UserError(f"--out {file}: the ending must be .html, .md or .tex")
    try:
        from simnpo_pl.report import page, paper

        for file in out:
            if file.suffix == ".html":
                content = page.html(runs)
            else:
                content = paper.latex(runs) if file.suffix == ".tex" else paper.markdown(runs, file)
            write_text(file, content)
            print(f"written: {file}")
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'simnpo_pl[report]'") from error
