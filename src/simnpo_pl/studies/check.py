"""Does it come back? Attacks on finished runs, or on any model with a config, at settings that can tell.

Relearning of a fifth of the forget rows, and of as many retain rows: from the run's own learning rate upwards until
the relearned rows are learned. Weights rounded to 8 and 4 bits and to NF4, where the packages are installed. Sampled
answers, to the questions, their paraphrases, and after examples. Hidden states, by the Unlearning Depth Score. The
retrained model, if it is known, is attacked in the same way, as the control. Each attack is one sentence, kept in the
run's results.json with its verdict; relearn, quantize and leak make them one by one, with all settings.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.models.loading import load_config
from simnpo_pl.module.depth import measure_depth
from simnpo_pl.report.robustness import is_learned, sentences
from simnpo_pl.runs.folder import add_depth
from simnpo_pl.runs.record import Run
from simnpo_pl.studies import parse
from simnpo_pl.studies.leak import measure as measure_leak
from simnpo_pl.studies.quantize import NAMES
from simnpo_pl.studies.quantize import measure as measure_rounded
from simnpo_pl.studies.relearn import Attack, Relearning, rate_of
from simnpo_pl.studies.reopen import add_results, model_of, reopen, retrained_of, runs_of
from simnpo_pl.utils.errors import UserError

FACTORS = (1, 3, 10)
"""Learning rates that are tried, as multiples of the run's own."""
SHARE = 0.2
"""Of the forget rows, to relearn."""
GROUP = 32
"""Weights that share a scale at 4 bits."""


def run(options: Namespace) -> None:
    for name in ("retrained", "start"):
        if given := getattr(options, name):
            load_config(given, f"--{name}")
    for one in runs_of(options):
        # What all attacks need is missed before the first.
        reopen(one).read_data()
        for name, attack in ATTACKS.items():
            if options.attacks is None or name in options.attacks:
                attack(one, options)
        said = [f"verdict: {one.headline}"] if one.headline else []
        said += [f"advice: {line}" for line in one.verdict.get("advice", [])]
        rank_zero_only(print)(f"{one.name}:", *(f"* {line}" for line in (*sentences(one), *said)), sep="\n")


@contextmanager
def untested(what: str) -> Iterator[None]:
    """Say in a line that an attack is not possible here."""
    try:
        yield
    except UserError as error:
        rank_zero_only(print)(f"not tested: {what} ({error})", flush=True)


@untested("relearning")
def relearn(run: Run, options: Namespace) -> None:
    """At growing rates until the forget rows are learned; with other rows at the same rates."""
    relearning, seeds = Relearning(run, options.retrained), [options.seed]
    for factor in FACTORS:
        lr = factor * rate_of(run)
        found = relearning.make(Attack("random", SHARE, options.epochs, lr), seeds)
        with untested("relearning with retain rows"):
            relearning.make(Attack("retain", SHARE, options.epochs, lr), seeds)
        if options.text:
            with untested(f"relearning with {options.text}"):
                relearning.make(Attack("text", SHARE, options.epochs, lr, options.text), seeds)
        if is_learned([found], run.metrics("start").get("forget/probability")):
            break


def rounding(run: Run, options: Namespace) -> None:
    """To all formats for which there is a package and which fit the model."""
    for bits, words in NAMES.items():
        with untested(f"weights rounded to {words}"):
            measure_rounded(run, bits, GROUP if bits == 4 else None)


def sampling(run: Run, options: Namespace) -> None:
    given = ["--k", str(options.k), "--seed", str(options.seed)]
    given += ["--retrained", options.retrained] if options.retrained else []
    with untested("sampled answers"):
        measure_leak(run, parse("leak", [str(run.folder), *given]))


def depth(run: Run, options: Namespace) -> None:
    """How much of what the retrained model lacks in its hidden states the unlearned one lacks, too."""
    start: Any = options.start or (run.start_model if run.unlearned else None)
    retrained: Any = retrained_of(run, options.retrained)
    made = run.record.get("depth", {}).get("settings")
    if made and start in (None, made["start"]) and retrained in (None, made["retrained"]):
        return
    with untested("hidden states"):
        needs = {"the start model, --start MODEL": start, "a retrained model, --retrained MODEL": retrained}
        for what, given in (needs | {"a run of fit with --eval.final true": run.metrics("final")}).items():
            if not given:
                raise UserError(f"the Unlearning Depth Score needs {what}")
        opened = reopen(run)
        found = measure_depth(opened.trainer, opened.model, opened.read_data(), start, retrained, model_of(run))
        add_results(run, lambda results: add_depth(run, results, *found))


ATTACKS = {"relearn": relearn, "quantize": rounding, "leak": sampling, "depth": depth}
