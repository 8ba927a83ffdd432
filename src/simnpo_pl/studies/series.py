"""MUSE, criteria 5 and 6: a run for every forget set, from the start model (scalability) or the run before it.

The latter is sustainability: requests to forget that come one after the other.

All other options are those of `fit`, such as --config configs/muse_news.yaml. Finished runs are skipped and interrupted
ones resumed. Written are OUT/1, OUT/2 and so on, table.md, table.json, figure.png.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from simnpo_pl.cli.summary import SHOWN
from simnpo_pl.metrics import titles
from simnpo_pl.report.drawing import check_installed, panels
from simnpo_pl.studies.launch import fit_once
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json, write_text

OWN_OPTIONS = ("--run_dir", "--ckpt_path", "--data.forget_split")
TITLES = {
    "scalability": "Scalability: forget sets of growing size",
    "sustainability": "Sustainability: successive requests to forget",
}
Row = tuple[list[str], dict[str, Any]]
"""Run and forget set, and metrics."""


def run(options: Namespace) -> None:
    for option in OWN_OPTIONS:
        if any(word.partition("=")[0] == option for word in options.fit):
            raise UserError(f"{option} is given by this command to each of its runs; leave it out")
    check_installed()
    out, records = options.out, []
    for count, split in enumerate(options.forget, start=1):
        words = [*options.fit, "--data.forget_split", split]
        if count > 1:
            words += ["--eval.start", "false"]
            if options.command == "sustainability":
                words += ["--model.name", str(out / str(count - 1) / "model")]
        print(f"run {count} of {len(options.forget)}: {split}", flush=True)
        records.append(fit_once(out / str(count), words, out))
    measured = [(["0", "-"], records[0].get("start"))]
    measured += [
        ([str(i), split], r.get("final")) for i, (split, r) in enumerate(zip(options.forget, records, strict=True), 1)
    ]
    measured += [(["retrained", "-"], records[0].get("retrained"))]
    rows: list[Row] = [(labels, entry["metrics"]) for labels, entry in measured if entry]
    title, names = TITLES[options.command], titles.measured([metrics for _, metrics in rows], SHOWN)
    table = titles.table(["run", "forget set"], rows, names)
    write_text(out / "table.md", f"# {title}\n\n{table}\n")
    entries = [{"run": name, "forget_split": split, "metrics": metrics} for (name, split), metrics in rows]
    write_json(out / "table.json", {"title": title, "settings": records[0]["settings"], "runs": entries})
    draw(out / "figure.png", title, [row for row in rows if row[0][0].isdigit()], names)
    print(f"{table}\nwritten: {out / 'table.md'}, table.json, figure.png")


def draw(file: Path, title: str, rows: list[Row], names: list[str]) -> None:
    with panels(file, 1, 1, (5.2, 3.6)) as (_, axes):
        axis = axes[0][0]
        for name in names:
            points = [(int(labels[0]), metrics[name]) for labels, metrics in rows if metrics.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", linewidth=1, label=titles.title_of(name).short)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("run, 0 is the start model")
        axis.set_title(title)
        if axis.lines:
            axis.legend(fontsize=7)
