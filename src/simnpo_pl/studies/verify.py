"""Score published checkpoints, and compare every metric with its published value.

    python -m simnpo_pl verify configs/verify/tofu_1b_forget10.yaml
    python -m simnpo_pl verify configs/verify/tofu_1b_forget10.yaml --checkpoints retrained SimNPO_lr5e-05_b3.5_g0.125

Files after the first change it. Each checkpoint is evaluated by `test`; finished evaluations are skipped. All other
options are options of each `test`, after those of the file. The exit code is 1 if a value is missing or differs by more
than its tolerance.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field

from simnpo_pl.metrics.titles import number
from simnpo_pl.studies.launch import Job, read_record
from simnpo_pl.studies.plans import Plan, Words, read_plan, words_of, write_tables
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model whose scores are published.

    Args:
        model: Hub id or folder; a relative folder starts at the current one.
        values: Published value of each metric, by its name in results.json.
        test: Options of its evaluation, after those of all.
    """

    model: str
    values: dict[str, float]
    test: Words = ""


@dataclass(frozen=True, kw_only=True)
class Verification(Plan):
    """Content of a file of `verify`.

    Args:
        source: Where the values were published, and when they were read.
        needs: What the evaluations need: network, memory, time.
        checkpoints: Name to model and published values.
        tolerance: Largest difference between a value here and its published value.
        tolerances: Metric to its own tolerance.
    """

    EXAMPLE = "configs/verify/tofu_1b_forget10.yaml"

    source: str
    needs: str
    checkpoints: dict[str, Checkpoint]
    tolerance: float
    tolerances: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(checkpoint.values for checkpoint in self.checkpoints.values()):
            raise UserError("the file has no published values: name at least one checkpoint with values")
        if unused := self.tolerances.keys() - {n for one in self.checkpoints.values() for n in one.values}:
            raise UserError(f"tolerances of {', '.join(sorted(unused))}, of which no checkpoint has a published value")


def run(options: Namespace) -> None:
    plan = read_plan(options.files, Verification, options.folder)
    names = options.checkpoints or list(plan.checkpoints)
    if unknown := [name for name in names if name not in plan.checkpoints]:
        raise UserError(f"--checkpoints {unknown[0]}: {options.files[0]} has {', '.join(plan.checkpoints)}")
    print(f"{plan.title}\nvalues: {plan.source}\nneeds: {plan.needs}", flush=True)
    rows = []
    for name in names:
        checkpoint = plan.checkpoints[name]
        words = [*words_of(plan.fit), *words_of(checkpoint.test), "--model.name", checkpoint.model, *options.fit]
        job = Job(plan.path / name, plan.filled(words), plan.path, "test")
        if options.table and job.is_finished:
            job.check_options()
        elif not options.table:
            print(f"{name}: {'evaluated before' if job.is_finished else 'evaluating'}", flush=True)
            job.make(plan.path / "logs" / f"{name}.txt")
        found = (read_record(job.folder).get("final") or {}).get("metrics", {})
        rows += compare(plan, name, found)
    within = sum(row[-1] == "yes" for row in rows)
    heads = ["checkpoint", "metric", "here", "published", "difference", "tolerance", "within"]
    summary = f"{within} of {len(rows)} values are within their tolerance."
    table = markdown.table(heads, rows)
    write_tables(f"# {plan.title}\n\nPublished values: {plan.source}\n\n{table}\n\n{summary}\n", options.out)
    if within < len(rows):
        sys.exit(1)


def compare(plan: Verification, name: str, found: Mapping[str, float | None]) -> list[list[str]]:
    """A line of the table for every published value of a checkpoint; "yes" at its end if it is within its tolerance."""
    lines = []
    for metric, published in plan.checkpoints[name].values.items():
        here, tolerance = found.get(metric), plan.tolerances.get(metric, plan.tolerance)
        measured, difference, good = "not measured", "-", False
        if here is not None:
            measured, difference = number(here), f"{here - published:+.4f}"
            # Published values are rounded: a difference of exactly the tolerance is within it.
            good = abs(here - published) <= tolerance * (1 + 1e-9)
        limit, within = number(tolerance), "yes" if good else "no"
        lines.append([name, metric, measured, number(published), difference, limit, within])
    return lines
