"""Tables and figure of what was measured."""

import json
import operator
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu
from simnpo_pl.utils import markdown

BEGIN, END = "<!-- measured: written by python -m bench -->", "<!-- end of what python -m bench wrote -->"
FIGURE = (
    "![Time and memory of a step by answer length, vocabulary and batch; of scoring by number "
    "of answers](figures/performance.png)"
)
SIDES = {"public": "public recipe", "own": "package"}
STEP = 200.0
"""Milliseconds of the step that the Trainer's own time is set against."""
WAYS = {
    "public": "public recipe",
    "lean": "public recipe without needless work",
    "packed": "packed (default)",
    "chunked": "packed, logits made again in the backward pass",
    "padded": "padded, head on scored positions",
    "whole": "padded, all logits, reference cached",
    "checkpointed": "packed, activations made again",
    "bf16": "packed, bf16 autocast",
    "lora": "packed, LoRA of rank 16",
    "body": "bare body on the same tokens",
}


def write(record: dict[str, Any], folder: Path, page: Path | None = None) -> None:
    """Write results.json, tables and figure to a folder, and where a page is given into that, too.

    Args:
        record: What was measured.
        folder: Where to write.
        page: Markdown page with a part between two marks; its figure is in the folder `figures` next to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = tables(record)
    (folder / "tables.md").write_text(text)
    drawn = "growth" in record and "rows" in record
    if drawn:
        figure(record, folder / "performance.png")
    print(text)
    if page is not None:
        before, _, rest = page.read_text().partition(BEGIN)
        shown = f"{FIGURE}\n\n" if drawn else ""
        page.write_text(f"{before}{BEGIN}\n\n{text}\n{shown}{END}{rest.partition(END)[2]}")
        if drawn:
            (page.parent / "figures").mkdir(exist_ok=True)
            shutil.copyfile(folder / "performance.png", page.parent / "figures" / "performance.png")


def tables(record: dict[str, Any]) -> str:
    """All parts that were measured, as Markdown."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    lines = [
        f"`{record['command']}`, {record['minutes']} minutes on {machine['cpu']} ({machine['instructions']}, "
        f"{machine['cores']} cores, {threads}, {machine['system']}), load average at the end "
        f"{', '.join(map(str, machine['load_average']))}; {versions}. Rows: {record['texts']}.",
        "",
    ]
    for part, (command, load) in record.get("again", {}).items():
        lines += [f"Part `{part}` was measured again by `{command}`, load average {', '.join(map(str, load))}.", ""]
    for part, reason in record.get("failed", {}).items():
        lines += [f"**Part `{part}` failed:** {reason}", ""]
    if met := targets(record):
        lines += [*_table(["target", "at most", "measured", "met"], met), ""]
    for name, part in PARTS.items():
        if name in record:
            lines += [*part(record[name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def targets(record: dict[str, Any]) -> list[list[str]]:
    """Each target with what was measured, for the parts that were."""
    found: list[tuple[str, float, float | None]] = []
    if "real" in record:
        for method, most in (("SimNPO", 0.50), ("NPO", 0.45)):
            entry, mib = record["real"]["methods"][method], record["real"]["methods"][method]["mib"]
            name = f"{method}, optimizer step of a real model's shape"
            found.append((f"{name}, processor time as a part of the public recipe's", most, entry["time"]["cpu"]))
            found.append((f"{name}, peak memory of the process likewise", 0.75, mib["own"] / mib["public"]))
    if "evaluation" in record:
        found.append(
            ("its evaluation, processor time likewise", 0.50, record["evaluation"]["phases"]["whole"]["time"]["cpu"])
        )
    if "job" in record:
        found.append(("its whole job, processor time likewise", 0.50, record["job"]["time"]["cpu"]))
    if "step" in record:
        for method, most in (("NPO", 0.43), ("SimNPO", 0.50)):
            entry = record["step"]["variants"][f"{method} packed"]
            name = f"{method} step of a wide model"
            found.append((f"{name}, time as a part of the public recipe's", most, entry["time"]["wall"]))
            found.append((f"{name}, working memory likewise", 0.50, entry.get("memory")))
    if "lightning" in record:
        times = record["lightning"]
        added = (times["Trainer, logging, bar"] - times["plain loop"]) / STEP
        found.append((f"what Trainer and logging add to a step of {STEP:.0f} ms, as a part of it", 0.05, added))
    if "rows" in record:
        points = record["rows"]["points"]
        few, many = points[0], points[-1]
        span = f"{few['answers']} to {many['answers']} answers"
        times = [point["microseconds_per_token"] for point in points]
        found.append((f"time per scored token from {span}, longest by shortest", 1.10, max(times) / min(times)))
        memory = many["mib"] / few["mib"] if few["mib"] and many["mib"] else None
        found.append((f"memory of {many['answers']} answers by that of {few['answers']}", 1.10, memory))
    if "start-up" in record:
        for name, most in (("--help", 1), ("report", 1), ("fit, to its first step", 10)):
            found.append((f"{name}, processor seconds", most, record["start-up"][name]["cpu"]))
    return [[n, _number(m), _measured(v, m), "-" if v is None else "yes" if v <= m else "no"] for n, m, v in found]


def _step(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in found["variants"].items():
        method, way = name.split(" ")
        rows.append(
            [
                method if way != "body" else "-",
                WAYS[way],
                _number(entry["seconds"]),
                _number(entry["time"]["wall"]),
                _number(entry["time"]["cpu"]),
                _number(entry.get("mib"), 0),
                _number(entry.get("memory")),
            ]
        )
    head = ["method", "way", "seconds", "time", "processor time", "MiB", "memory"]
    title = (
        f"Step of a wide, shallow model, forward and backward, 8 + 8 rows: {found['tokens']} tokens, "
        f"{found['scored_tokens']} of them scored, "
        f"{100 * (1 - found['tokens'] / found['cells']):.0f} % of the padded rows padding."
    )
    without = [] if found["bf16"] else ["", "No bf16: this processor has no instructions for it and emulates them."]
    parts = " and ".join(f"{_number(part)} for {method}" for method, part in found["multiplications"].items())
    floor = ["", f"Counting multiplications alone, the packed step needs {parts} of the public recipe's."]
    return [title, "", *_table(head, rows), *floor, *without]


def _real(found: dict[str, Any]) -> list[str]:
    rows = [
        [method, SIDES[side], *_clocks(entry, side), _number(entry["mib"][side], 0), _number(_part(entry["mib"], side))]
        for method, entry in found["methods"].items()
        for side in SIDES
    ]
    head = ["method", "side", *CLOCKS, "peak MiB of the process", "memory"]
    title = (
        f"Optimizer step on SmolLM2-135M's shape (576 wide, {found['layers']} layers), 8 + 8 rows: forward and "
        "backward pass, clipping, AdamW."
    )
    return [title, "", *_table(head, rows), "", *_profile(found["profile"])]


def _profile(found: dict[str, Any]) -> list[str]:
    operators = found["operators"]
    whole = sum(one["seconds"] for one in operators)
    shown = [one for one in operators if one["seconds"] > 0.01 * whole]
    rest = whole - sum(one["seconds"] for one in shown)
    rows = [[f"`{o['name']}`", o["kind"], str(o["calls"]), *_share(o["seconds"], whole)] for o in shown]
    rows.append(["others", "", "", *_share(rest, whole)])
    kinds: dict[str, float] = {}
    for one in operators:
        kinds[one["kind"]] = kinds.get(one["kind"], 0.0) + one["seconds"]
    by_kind = [[kind, *_share(value, whole)] for kind, value in sorted(kinds.items(), key=lambda item: -item[1])]
    floor = found["body_seconds"] + found["head_seconds"]
    by_kind.append(["floor: the multiplications by themselves", *_share(floor, whole)])
    text = (
        f"Where the time of the package's SimNPO step goes, by torch's profiler: {_number(found['seconds'])} s. "
        f"The same multiplications by themselves, forward and backward, take "
        f"{_number(found['body_seconds'])} s in the body "
        f"and {_number(found['head_seconds'])} s in the head, at {found['gflops']:.0f} GFLOP/s: no step can be faster."
    )
    head = ["seconds", "part"]
    return [text, "", *_table(["kind", *head], by_kind), "", *_table(["operator", "kind", "calls", *head], rows)]


def _share(seconds: float, whole: float) -> list[str]:
    return [_number(seconds), f"{100 * seconds / whole:.1f} %"]


def _evaluation(found: dict[str, Any]) -> list[str]:
    rows = [[phase, SIDES[side], *_clocks(entry, side)] for phase, entry in found["phases"].items() for side in SIDES]
    forget, retain, authors, facts = found["rows"]
    mib = found["mib"]
    note = (
        f"Evaluation on the same shape: {forget} forget and {retain} retain questions of seven answers, {authors} on "
        f"authors and {facts} on facts of four; {found['tokens']} generated tokens. Peak memory of the process "
        f"{mib['public']:.0f} MiB by the public recipe, {mib['own']:.0f} MiB by the package."
    )
    return [note, "", *_table(["phase", "side", *CLOCKS], rows)]


def _job(found: dict[str, Any]) -> list[str]:
    sides = {"seconds": found["sides"], "time": found["time"]}
    mib = {side: entry["mib"] for side, entry in found["sides"].items()}
    rows = [[SIDES[s], *_clocks(sides, s), _number(mib[s], 0), _number(_part(mib, s))] for s in SIDES]
    note = (
        f"A whole job on the same shape, from start to end of its process: evaluation of "
        f"{sum(found['counts'].values())} questions, {found['epochs']} epochs of SimNPO "
        f"on {found['rows']} + {found['rows']} rows, evaluation."
    )
    return [note, "", *_table(["side", *CLOCKS, "peak MiB of the process", "memory"], rows)]


CLOCKS = ("wall s", "processor s", "of them system", "wall time", "processor time")


def _clocks(entry: dict[str, Any], side: str) -> list[str]:
    seconds = entry["seconds"][side]
    parts = [entry["time"][clock] if side == "own" else 1.0 for clock in ("wall", "cpu")]
    return [_number(value) for value in (seconds["wall"], seconds["cpu"], seconds["system"], *parts)]


def _part(values: dict[str, float], side: str) -> float:
    return values[side] / values["public"]


def _growth(found: dict[str, Any]) -> list[str]:
    names = {
        "answer": "answer tokens, 1 + 1 rows",
        "vocabulary": "vocabulary, 4 + 4 rows",
        "batch": "batch, forget + as many retain rows",
    }
    rows = []
    for name, points in found.items():
        for point in points:
            cells = [_number(point["seconds"][way]) for way in ("public", "packed")]
            cells += [_number(point["time"]["packed"]["wall"])]
            cells += [_number(point["mib"][way], 0) for way in ("public", "packed")]
            rows.append([names[name], str(point["size"]), *cells])
    return _table(["NPO step by", "size", "public, s", "packed, s", "time", "public, MiB", "packed, MiB"], rows)


def _rows(found: dict[str, Any]) -> list[str]:
    points = found["points"]
    keys = ("microseconds_per_token", "cpu_microseconds_per_token")
    rows = [[str(p["answers"]), *(_number(p[k]) for k in keys), _number(p["mib"], 0)] for p in points]
    return _table(["answers scored", "µs a scored token", "processor µs", "MiB"], rows)


def _processes(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, *map(_number, times.values()), _number(operator.truediv(*times.values()))]
        for name, times in (("NPO step", found["step_seconds"]), ("scoring", found["scoring_seconds"]))
    ]
    return _table(["on all cores", "1 process, s", "2 processes, s", "speed-up"], rows)


def _lightning(found: dict[str, float]) -> list[str]:
    plain = found["plain loop"]
    rows = [[n, _number(v), _number(v - plain), f"{100 * (v - plain) / STEP:.1f} %"] for n, v in found.items()]
    return _table(["step of a small model", "processor ms", "added", f"of a step of {STEP:.0f} ms"], rows)


def _start_up(found: dict[str, dict[str, float]]) -> list[str]:
    rows = [[name, _number(times["wall"]), _number(times["cpu"])] for name, times in found.items()]
    return _table(["start-up", "wall s", "processor s"], rows)


PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "real": _real,
    "evaluation": _evaluation,
    "job": _job,
    "step": _step,
    "growth": _growth,
    "rows": _rows,
    "processes": _processes,
    "lightning": _lightning,
    "start-up": _start_up,
    "gpu": gpu.tables,
}
"""How each part of the record is shown, in the order of the page."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown.table(head, rows).split("\n")


def _measured(value: float | None, most: float) -> str:
    """With a third digit where two would hide on which side of the most it is."""
    return _number(value, 3 if value is not None and _number(value) == _number(most) else 2)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figure(record: dict[str, Any], file: Path) -> None:
    """Time and memory of a step by answer length, vocabulary and batch; time of scoring by number of answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    shown = [("answer", "answer length, tokens"), ("vocabulary", "vocabulary, tokens"), ("batch", "batch, forget rows")]
    plots, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")

    def curves(axis: Any, points: list[dict[str, Any]], value: Callable[[dict[str, Any], str], float | None]) -> None:
        for way in ("public", "packed"):
            values = [value(point, way) for point in points]
            if None not in values:
                axis.plot([p["size"] for p in points], values, "o-", label=WAYS[way].replace(" (default)", ""))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")

    for column, (name, label) in enumerate(shown):
        curves(axes[0, column], record["growth"][name], lambda point, way: point["seconds"][way])
        curves(axes[1, column], record["growth"][name], lambda point, way: point["mib"][way])
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("NPO step, seconds")
    axes[1, 0].set_ylabel("working memory, MiB")
    axes[0, 0].legend(fontsize="small")
    points = record["rows"]["points"]
    for row, (key, label) in enumerate(
        (("microseconds_per_token", "scoring, µs a token"), ("mib", "working memory, MiB"))
    ):
        axes[row, 3].plot([p["answers"] for p in points], [p[key] or 0 for p in points], "o-")
        axes[row, 3].set_ylabel(label)
        axes[row, 3].set_ylim(0, 1.1 * axes[row, 3].get_ylim()[1])
    axes[1, 3].set_xlabel("answers scored")
    plots.savefig(file, dpi=110)
    plt.close(plots)
