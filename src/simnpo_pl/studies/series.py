"""Runs over a series of forget sets, one after the other, and what comes of them as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.cli.summary import COLUMNS, number
from simnpo_pl.studies.launch import fit_once
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import Writing, write_json, write_text

OWN_OPTIONS = ("--run_dir", "--ckpt_path", "--data.forget_split")


def run_series(out: Path, splits: Sequence[str], fit: Sequence[str], successive: bool) -> list[dict[str, Any]]:
    """Fit once for every forget set, each run in a process of its own; finished runs are skipped, others resumed.

    Args:
        out: Holds the run folders `1`, `2` and so on.
        splits: Forget sets, as `--data.forget_split` takes them.
        fit: Options of `fit` that all runs share.
        successive: Whether each run starts from the model of the one before, instead of the same start model.

    Returns:
        The content of every run's results.

    Raises:
        UserError: A run fails, its folder holds another one, or an option is this function's to give.
    """
    for option in OWN_OPTIONS:
        if any(word.partition("=")[0] == option for word in fit):
            raise UserError(f"{option} is given by this command to each of its runs; leave it out")
    records = []
    for count, split in enumerate(splits, start=1):
        folder = out / str(count)
        options = [*fit, "--data.forget_split", split]
        if count > 1:
            options += ["--eval.start", "false"]
            if successive:
                options += ["--model.name", str(out / str(count - 1) / "model")]
        print(f"run {count} of {len(splits)}: {split}", flush=True)
        records.append(fit_once(folder, options, out))
    return records


def write_series(out: Path, title: str, splits: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Write table.md, table.json and figure.png into a folder.

    Args:
        out: The folder.
        title: What the series is, in a few words.
        splits: Forget set of each run.
        records: Results of each run.

    Returns:
        The table.

    Raises:
        UserError: The package that draws is not installed.
    """
    rows = [("0", "-", records[0].get("start"))]
    rows += [(str(i), split, r.get("final")) for i, (split, r) in enumerate(zip(splits, records, strict=True), 1)]
    rows.append(("retrained", "-", records[0].get("retrained")))
    found = [(label, split, entry["metrics"]) for label, split, entry in rows if entry]
    names = [name for name in COLUMNS if any(name in metrics for *_, metrics in found)]
    cells = [[label, split, *(number(metrics.get(name)) for name in names)] for label, split, metrics in found]
    table = markdown.table(["run", "forget set", *(COLUMNS[name] for name in names)], cells)
    write_text(out / "table.md", f"# {title}\n\n{table}\n")
    entries = [{"run": label, "forget_split": split, "metrics": metrics} for label, split, metrics in found]
    write_json(out / "table.json", {"title": title, "settings": records[0]["settings"], "runs": entries})
    steps = [(int(label), metrics) for label, _, metrics in found if label.isdigit()]
    _draw(out / "figure.png", title, steps, names)
    return table


def _draw(file: Path, title: str, steps: Sequence[tuple[int, dict[str, Any]]], names: Sequence[str]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"a figure needs {error.name}: pip install 'simnpo_pl[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), dpi=200, layout="constrained")
    for name in names:
        points = [(step, metrics[name]) for step, metrics in steps if metrics.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), ".-", linewidth=1, label=COLUMNS[name])
    axes.set_xticks([step for step, _ in steps])
    axes.set_xlabel("run, 0 is the start model")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=7)
    with Writing(file) as handle:
        figure.savefig(handle, format="png")
    plt.close(figure)
