"""The table of a paper in LaTeX: mean and spread over seeds, the best value of a column in bold."""

import re
from collections.abc import Sequence

from simnpo_pl.metrics.titles import Title, number, title_of
from simnpo_pl.report.robustness import Spread, spread
from simnpo_pl.runs.record import Run, differing

ESCAPES = str.maketrans({c: rf"\{c}" for c in "&%$#_{}"})
ESCAPES |= str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})
ARROWS = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}
NOT_COMPARED = re.compile(r"^(seed_everything|label|run_dir| *seed| *cache_dir):.*\n", re.MULTILINE)
"""Lines of a config in which the runs of one row may differ."""


def tables(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """A table of the runs that were measured on the same data in the same way, for every such data and way."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run.measured), []).append(run)
    data = differing([group[0].measured for group in groups.values()])
    made = [table(group, columns) for group in groups.values()]
    return "\n".join(f"% {name}\n{text}" if name else text for name, text in zip(data, made, strict=True))


def table(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """A `tabular` with a row for every start model, every retrained model, and the runs that differ in seed alone."""
    heads = [title_of(name) for name in columns]
    references: dict[str, list[Spread | None]] = {}
    for model in ("start", "retrained"):
        # Runs of one model repeat its metrics.
        found: dict[str, tuple[Run, list[Spread | None]]] = {}
        for run in runs:
            if metrics := run.metrics(model):
                values = [spread([metrics.get(column)]) for column in columns]
                found.setdefault(str([_cell(value) for value in values]), (run, values))
        for run, values in found.values():
            references[model if len(found) == 1 else f"{model} of {run.name}"] = values
    groups = _groups(runs)
    rows = [[spread([run.metrics("final").get(name) for run in group]) for name in columns] for _, group in groups]
    retrained = references.get("retrained", [None] * len(columns))
    best = [_best(*column) for column in zip(heads, zip(*rows, strict=True), retrained, strict=True)]
    lines = [
        r"% \usepackage{booktabs}; mean and standard deviation over n runs; best in bold, without an arrow: the value",
        "% closest to the retrained model's",
        rf"\begin{{tabular}}{{lr{'r' * len(columns)}}}",
        r"\toprule",
        _line("model", "$n$", [head.short.translate(ESCAPES) + ARROWS[head.higher_is_better] for head in heads]),
        r"\midrule",
        *(_line(name, "", [_cell(value) for value in values]) for name, values in references.items()),
        *([r"\midrule"] if references else []),
    ]
    for place, ((name, group), row) in enumerate(zip(groups, rows, strict=True)):
        lines.append(_line(name, str(len(group)), [_cell(value, place in best[i]) for i, value in enumerate(row)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in their seed alone, with a name for them."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(f"{NOT_COMPARED.sub('', run.config)}{run.record.get('objective')}", []).append(run)
    groups: list[list[Run]] = []
    for group in found.values():
        seeds = {run.record.get("seed") for run in group}
        # A run that was made twice is no second seed.
        groups += [group] if len(seeds) == len(group) else [[run] for run in group]
    names = [_name(group) for group in groups]
    return [
        (name if names.count(name) == 1 else f"{name} ({group[0].settings})", group)
        for name, group in zip(names, groups, strict=True)
    ]


def _name(group: list[Run]) -> str:
    if len(group) == 1:
        return group[0].name
    return group[0].title if len({run.title for run in group}) == 1 else group[0].method


def _best(head: Title, values: Sequence[Spread | None], retrained: Spread | None) -> set[int]:
    """Places of the best values, those that print alike included; none where there is nothing to compare."""
    known = {place: value.mean for place, value in enumerate(values) if value is not None}
    distance = {}
    if head.higher_is_better is not None:
        distance = {place: -mean if head.higher_is_better else mean for place, mean in known.items()}
    elif retrained is not None:
        distance = {place: abs(mean - retrained.mean) for place, mean in known.items()}
    if len(distance) < 2:
        return set()
    best = number(known[min(distance, key=distance.__getitem__)])
    return {place for place, mean in known.items() if number(mean) == best}


def _cell(value: Spread | None, bold: bool = False) -> str:
    if value is None:
        return "-"
    text = _math(value.mean) + (rf" \pm {_math(value.deviation)}" if value.n > 1 else "")
    return (rf"$\mathbf{{{text}}}$" if bold else f"${text}$") + value.known


def _math(value: float) -> str:
    """A number, a power of ten written as one."""
    return re.sub(r"e([+-])0*(\d+)$", lambda found: rf" \cdot 10^{{{found[1].strip('+')}{found[2]}}}", number(value))


def _line(name: str, count: str, cells: list[str]) -> str:
    return " & ".join([" ".join(name.split()).translate(ESCAPES), count, *cells]) + r" \\"
