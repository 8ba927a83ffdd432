"""MUSE, criteria 5 and 6: a run for every forget set, from the start model (scalability) or the one before it.

Sustainability is the latter: requests to forget that come one after the other.

All other options are those of `fit`, such as --config configs/muse_news.yaml. Finished runs are skipped and interrupted
ones resume. Written are OUT/1, OUT/2 and so on, table.md, table.json, figure.png.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.cli.summary import SHOWN
from simnpo_pl.metrics import titles
from simnpo_pl.studies.launch import fit_once
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json, write_text, writing

OWN_OPTIONS = ("--run_dir", "--ckpt_path", "--data.forget_split")
TITLES = {
    "scalability": "Scalability: forget sets of growing size",
    "sustainability": "Sustainability: successive requests to forget",
}


def run(options: Namespace) -> None:
    for option in OWN_OPTIONS:
        if any(word.partition("=")[0] == option for word in options.fit):
            raise UserError(f"{option} is given by this command to each of its runs; leave it out")
    records: list[dict[str, Any]] = []
    for count, split in enumerate(options.forget, start=1):
        words = [*options.fit, "--data.forget_split", split]
        if count > 1:
            words += ["--eval.start", "false"]
            if options.command == "sustainability":
                words += ["--model.name", str(options.out / str(count - 1) / "model")]
        print(f"run {count} of {len(options.forget)}: {split}", flush=True)
        records.append(fit_once(options.out / str(count), words, options.out))
    print(write_series(options.out, TITLES[options.command], options.forget, records))
    print(f"written: {options.out / 'table.md'}, table.json, figure.png")


def write_series(out: Path, title: str, splits: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Write table.md, table.json and figure.png into a folder; the table. `splits` and `records` are of each run."""
    rows = [("0", "-", records[0].get("start"))]
    rows += [(str(i), split, r.get("final")) for i, (split, r) in enumerate(zip(splits, records, strict=True), 1)]
    rows.append(("retrained", "-", records[0].get("retrained")))
    found = [(label, split, entry["metrics"]) for label, split, entry in rows if entry]
    names = [name for name in SHOWN if any(name in metrics for *_, metrics in found)]
    cells = [[label, split, *(titles.number(metrics.get(name)) for name in names)] for label, split, metrics in found]
    table = markdown.table(["run", "forget set", *(titles.TITLES[name].short for name in names)], cells)
    write_text(out / "table.md", f"# {title}\n\n{table}\n")
    entries = [{"run": label, "forget_split": split, "metrics": metrics} for label, split, metrics in found]
    write_json(out / "table.json", {"title": title, "settings": records[0]["settings"], "runs": entries})
    steps = [(int(label), metrics) for label, _, metrics in found if label.isdigit()]
    _draw(out / "figure.png", title, steps, names)
    return table


def _draw(file: Path, title: str, steps: Sequence[tuple[int, dict[str, Any]]], names: Sequence[str]) -> None:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError(f"a figure needs {error.name}: pip install 'simnpo_pl[report]'") from error
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.6), dpi=200, layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(step, metrics[name]) for step, metrics in steps if metrics.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), ".-", linewidth=1, label=titles.TITLES[name].short)
    axes.set_xticks([step for step, _ in steps])
    axes.set_xlabel("run, 0 is the start model")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=7)
    with writing(file) as handle:
        figure.savefig(handle, format="png")
