"""The verdict: every category, its thresholds at their edges, what it says and what it advises."""

import math
from typing import Any

import pytest

from simnpo_pl.runs.verdict import CATEGORIES, headline, verdict

ROWS = 200
START = {
    "forget/probability": 0.992,
    "forget/verbatim": 1.0,
    "forget/rouge": 1.0,
    "forget/degenerate": 0.0,
    "retain/probability": 0.992,
    "retain/degenerate": 0.0,
}
FORGOTTEN = {**START, "forget/probability": 0.1, "forget/verbatim": 0.0, "forget/rouge": 0.3}
RETRAINED = {**START, "forget/probability": 0.095, "forget/verbatim": 0.0, "forget/rouge": 0.25}


def record(
    final: dict[str, Any],
    start: dict[str, Any] | None = START,
    retrained: dict[str, Any] | None = None,
    **further: Any,
) -> dict[str, Any]:
    """Content of results.json of a run on 200 rows."""
    models = {"start": start, "final": final, "retrained": retrained}
    found: dict[str, Any] = {name: {"metrics": metrics} for name, metrics in models.items() if metrics is not None}
    found["objective"] = {
        "name": "SimNPO",
        "settings": {"beta": 1.0},
        "forget_weight": 0.5,
        "retain_loss": "NLL",
        "retain_weight": 1.0,
    }
    return {**found, "settings": {"model": {"lr": 5e-5}}, "counts": dict.fromkeys(final, ROWS), **further}


def category(*args: Any, **kwargs: Any) -> str:
    found = verdict(record(*args, **kwargs))["category"]
    assert found in CATEGORIES
    return found


def test_nothing_happened():
    found = verdict(record({**START, "forget/probability": 0.991}))
    assert found["category"] == "not forgotten"
    assert found["reasons"][:2] == [
        "200 of 200 forget answers are still given word for word (start model 200)",
        "forget probability 0.992 -> 0.991",
    ]
    assert found["advice"][0] == "raise --model.lr from 5e-05 to 0.00015"


def test_half_of_it():
    found = verdict(record({**START, "forget/probability": 0.714, "forget/verbatim": 47 / ROWS}))
    assert found["category"] == "partly forgotten"
    assert found["reasons"][0] == "47 of 200 forget answers are still given word for word (start model 200)"
    assert "kept answers 0.992 -> 0.992" in found["reasons"]
    assert "0 of 200 forget answers are degenerate (repetitive or empty; start model 0)" in found["reasons"]
    assert found["untested"][:3] == ["relearning", "rounded weights", "sampled answers"]
    assert "raise --model.forget_weight from 0.5 to 1" in found["advice"]


def test_sampled_answers_are_named():
    settings = {"model": {"lr": 5e-5}, "eval": {"temperature": 0.7}}
    assert "measured on answers sampled at temperature 0.7" in verdict(record(FORGOTTEN, settings=settings))["reasons"]
    assert "temperature" not in str(verdict(record(FORGOTTEN))["reasons"])


def test_advice_where_the_rate_was_found():
    """Another setting would change that rate, too."""
    found = verdict(record({**START, "forget/probability": 0.714}, lr_auto={"lr": 5e-5}))
    assert found["advice"] == [
        "raise --model.lr from 5e-05 to 0.00015",
        "raise --model.forget_weight from 0.5 to 1 and give --model.lr 5e-05, so that only this changes",
        "lower --model.objective.beta from 1 to 0.5 and give --model.lr 5e-05, so that only this changes",
    ]


def test_forgotten():
    found = verdict(record(FORGOTTEN))
    assert found["category"] == "forgotten"
    assert found["advice"] == []
    assert "what a model that never saw the rows would answer (no retrained model)" in found["untested"]
    assert category(FORGOTTEN, retrained=RETRAINED) == "forgotten"


def test_what_decided_comes_first():
    degenerate = "173 of 200 forget answers are degenerate (repetitive or empty; start model 0)"
    found = verdict(record({**FORGOTTEN, "forget/degenerate": 173 / ROWS}))
    assert found["reasons"][0] == degenerate
    assert found["reasons"].count(degenerate) == 1
    assert verdict(record({**FORGOTTEN, "retain/probability": 0.5}))["reasons"][0] == "kept answers 0.992 -> 0.5"
    low = verdict(record({**FORGOTTEN, "forget/probability": 0.01}, retrained=RETRAINED))["reasons"]
    assert low[0] == "forget probability 0.992 -> 0.01 (retrained model 0.095)"


def test_ruined():
    ruined = {"forget/probability": 0.002, "forget/verbatim": 0.0, "probe/nll": 9.0}
    found = verdict(record(ruined, {**START, "probe/nll": 3.0}))
    assert found["category"] == "model damaged"
    assert "loss on general text 3 -> 9" in found["reasons"]
    assert "lower --model.lr from 5e-05 to 1.7e-05" in found["advice"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # A quarter of 0.992 is 0.248.
        ({"forget/probability": 0.247}, "forgotten"),
        ({"forget/probability": 0.249}, "partly forgotten"),
        ({"forget/verbatim": 10 / ROWS}, "forgotten"),
        ({"forget/verbatim": 11 / ROWS}, "partly forgotten"),
        ({"retain/probability": 0.745}, "forgotten"),
        ({"retain/probability": 0.743}, "model damaged"),
        ({"retain/degenerate": 0.2}, "forgotten"),
        ({"retain/degenerate": 0.21}, "model damaged"),
        ({"forget/degenerate": 0.2}, "forgotten"),
        ({"forget/degenerate": 0.21}, "over-forgotten"),
        # Most answers are still given word for word.
        ({"forget/verbatim": 101 / ROWS}, "not forgotten"),
        ({"forget/verbatim": 100 / ROWS}, "partly forgotten"),
    ],
)
def test_edges(change: dict[str, float], expected: str):
    assert category({**FORGOTTEN, **change}) == expected


def test_nothing_moved():
    """All that is known keeps nine tenths of 0.992, which is 0.8928."""
    start = {name: value for name, value in START.items() if name != "forget/verbatim"}
    assert category({**start, "forget/probability": 0.893}, start) == "not forgotten"
    assert category({**start, "forget/probability": 0.892}, start) == "partly forgotten"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # A fifth of the retrained model's 0.095 is 0.019.
        ({"forget/probability": 0.0191}, "forgotten"),
        ({"forget/probability": 0.0189}, "over-forgotten"),
        # A quarter of the way from 0.095 to 0.992 ends at 0.31925.
        ({"forget/probability": 0.319}, "forgotten"),
        ({"forget/probability": 0.320}, "partly forgotten"),
        # And from 0.25 to 1 at 0.4375; without a retrained model ROUGE tells nothing.
        ({"forget/rouge": 0.43}, "forgotten"),
        ({"forget/rouge": 0.44}, "partly forgotten"),
    ],
)
def test_edges_beside_a_retrained_model(change: dict[str, float], expected: str):
    assert category({**FORGOTTEN, **change}, retrained=RETRAINED) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.486, 0.549, 0.554, 0.173, 0.912, 0.984, 0.257), "partly forgotten"),
        ((0.079, 0.275, 0.659, 0.041, 0.666, 0.964, 0.243), "forgotten"),
        ((6.8e-4, 0.030, 0.494, 0.002, 0.107, 0.532, 0.086), "model damaged"),
        ((0.008, 0.234, 0.688, 0.053, 0.559, 0.980, 0.261), "over-forgotten"),
    ],
    ids=["SimNPO", "NPO", "GradDiff", "SimNPO-tuned"],
)
def test_a_real_model(values: tuple[float, ...], expected: str):
    """SmolLM2 on TOFU forget01, whose retrained model lost utility as well."""
    names = [f"forget/{name}" for name in ("probability", "rouge", "truth_ratio", "extraction_strength")]
    names += ["forget/exact_memorization", "retain/probability", "model_utility"]
    start = dict(zip(names, (0.991, 0.981, 0.505, 1.0, 1.0, 0.989, 0.333), strict=True))
    retrained = dict(zip(names, (0.117, 0.337, 0.661, 0.029, 0.6, 0.988, 0.302), strict=True))
    assert category(dict(zip(names, values, strict=True)), start, retrained) == expected


def test_utility_that_the_retrained_model_lacks_too_is_no_damage():
    models = [{**metrics, "model_utility": value} for metrics, value in ((FORGOTTEN, 0.243), (START, 0.333))]
    assert category(*models) == "model damaged"
    assert category(*models, retrained={**RETRAINED, "model_utility": 0.302}) == "forgotten"


def test_a_score_that_is_not_a_number():
    found = verdict(record({**FORGOTTEN, "forget/probability": None}))
    assert found["category"] == "model damaged"
    assert found["reasons"][0] == "a score of the final model is not a number"


def test_too_little_to_tell():
    assert category(FORGOTTEN, None) == "inconclusive"
    found = verdict(record({"forget/probability": 0.001}, {"forget/probability": 0.002}))
    assert found["category"] == "inconclusive"
    assert found["reasons"][0] == "no measured metric shows that the start model knew the forget rows"
    # The loss on documents: not to have moved says enough, to have moved does not.
    before = {"forget/nll": 2.4, "retain/nll": 2.0}
    assert category({"forget/nll": 2.45, "retain/nll": 2.0}, before) == "not forgotten"
    assert category({"forget/nll": 6.0, "retain/nll": 2.1}, before) == "inconclusive"
    assert category({"forget/nll": 6.0, "retain/nll": 2.3}, before) == "model damaged"


def test_muse():
    start = {"verbmem_forget": 58.4, "knowmem_forget": 63.9, "knowmem_retain": 55.2}
    retrained = {"verbmem_forget": 20.8, "knowmem_forget": 33.1, "knowmem_retain": 55.0}
    assert category({"verbmem_forget": 22.0, "knowmem_forget": 35.0, "knowmem_retain": 50.0}, start, retrained) == (
        "forgotten"
    )
    assert category({"verbmem_forget": 0.0, "knowmem_forget": 20.0, "knowmem_retain": 50.0}, start, retrained) == (
        "over-forgotten"
    )
    assert category({"verbmem_forget": 0.0, "knowmem_forget": 0.0, "knowmem_retain": 0.0}, start, retrained) == (
        "model damaged"
    )


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [("comes back", "partly forgotten"), ("holds", "forgotten"), ("inconclusive", "forgotten")],
)
def test_attacks_join(outcome: str, expected: str):
    """By the outcome and the sentence that they left; one that could not tell counts as not tested."""
    entries = {"4-bit": {"outcome": outcome, "sentence": f"rounding to 4 bits: {outcome}"}, "8-bit": {"sentence": ""}}
    found = verdict(record(FORGOTTEN, quantized=entries))
    assert found["category"] == expected
    assert found["reasons"][-1] == f"rounding to 4 bits: {outcome}"
    assert ("rounded weights" in found["untested"]) == (outcome == "inconclusive")


def test_formats_and_hidden_states_that_nobody_tested():
    """Beside weights in other formats, of which one may bring rows back that another does not."""
    lacking = ["weights rounded to 4 bits", "weights rounded to NF4", "hidden states"]
    rounded = {name: {"outcome": "holds"} for name in ("8-bit", "4-bit group=32", "nf4")}
    assert verdict(record(FORGOTTEN, quantized=dict([*rounded.items()][:1])))["untested"][2:5] == lacking
    found = verdict(record(FORGOTTEN, quantized=rounded, depth={"sentence": ""}))["untested"]
    assert found[:2] == ["relearning", "sampled answers"]
    assert not {*lacking, "rounded weights"} & set(found)


def test_advice_where_relearning_brings_rows_back():
    """Not a lower weight, which leaves the rows less deep, nor more of what has forgotten all; nothing if SAM ran."""
    back: dict[str, Any] = {"relearn": {"a": {"outcome": "comes back"}}}
    resist, more = "--model.update SAM, made against relearning", "raise --model.objective.beta from 1 to 1.5"
    over = {**FORGOTTEN, "forget/degenerate": 0.3}
    assert verdict(record(over, **back))["advice"] == [resist, more]
    assert verdict(record(FORGOTTEN, **back))["advice"] == [resist]
    half = {**FORGOTTEN, "forget/probability": 0.5}
    assert verdict(record(half, **back))["advice"][:2] == [resist, "raise --model.lr from 5e-05 to 0.0001"]
    found = record(over, **back, lr_auto={"lr": 5e-5})
    assert verdict(found)["advice"][0] == f"--model.lr 5e-05 {resist}"
    found = record(over, **back)
    found["objective"]["update"] = {"name": "SAM", "settings": {"rho": 0.01}}
    assert verdict(found)["advice"] == [more]
    rounded = verdict(record(over, quantized={"a": {"outcome": "comes back"}}))["advice"]
    assert rounded[0] == "lower --model.forget_weight from 0.5 to 0.25"


def test_rows_to_keep_that_the_start_model_did_not_know():
    """They cannot tell what it lost, and training on them damages it."""
    unknown = {**START, "retain/probability": 7.5e-4}
    damaged = {**FORGOTTEN, "retain/probability": 0.176, "retain/degenerate": 0.39}
    found = verdict(record(damaged, unknown))
    assert found["category"] == "model damaged"
    assert "the start model did not know the rows to keep (retain probability 7.5e-04)" in found["reasons"]
    assert found["advice"][0] == "give rows that the start model knows: --data.retain auto, or another FILE"
    known = verdict(record({**damaged, "retain/probability": 0.5}))
    assert not any("did not know" in reason for reason in known["reasons"])
    assert not any("start model knows" in advice for advice in known["advice"])


def test_the_headline_names_what_brings_rows_back():
    back, held = {"a": {"outcome": "holds"}, "b": {"outcome": "comes back"}}, {"a": {"outcome": "holds"}}

    def said(**attacks: Any) -> str:
        found = record({**FORGOTTEN, "forget/degenerate": 0.3}, **attacks)
        return headline({**found, "verdict": verdict(found)})

    assert said(relearn=held) == "over-forgotten"
    assert said(relearn=back, quantized=held) == "over-forgotten; relearning brings rows back"
    assert said(relearn=back, leak=back) == "over-forgotten; relearning and sampled answers bring rows back"


@pytest.mark.parametrize(
    "attacks", [{"relearn": {"a": {"repeats": [{"control": []}]}}}, {"leak": {"a": {"control": {}}}}]
)
def test_an_attacked_control_is_a_retrained_model(attacks: dict[str, Any]):
    lacking = "what a model that never saw the rows would answer (no retrained model)"
    assert lacking not in verdict(record(FORGOTTEN, **attacks))["untested"]
    assert lacking in verdict(record(FORGOTTEN, relearn={"a": {"repeats": [{"epochs": []}]}}))["untested"]


SECOND = {"forget/probability": 0.02, "forget/rouge": 0.2, "retain/probability": 0.8}


@pytest.mark.parametrize(
    ("metric", "start", "final", "retrained", "expected"),
    [
        # Unlearned before: it knows less than the retrained model, so that nothing can be left.
        ("forget/probability", 0.02, 0.005, 0.15, "inconclusive"),
        ("knowmem_forget", 10.0, 1.0, 35.0, "inconclusive"),
        ("forget/nll", 3.0, 3.0, 1.9, "inconclusive"),
        ("forget/nll", 3.0, 3.0, 3.1, "not forgotten"),
        # At least a tenth more.
        ("forget/probability", 0.26, 0.25, 0.15, "not forgotten"),
        ("forget/probability", 0.24, 0.23, 0.15, "inconclusive"),
        # Known rows have a low truth ratio: 0.4 lies 0.2 below the retrained model's, and three quarters are left.
        ("forget/truth_ratio", 0.4, 0.45, 0.6, "partly forgotten"),
        ("forget/truth_ratio", 0.6, 0.7, 0.4, "inconclusive"),
    ],
)
def test_only_what_the_start_model_knew_can_be_left(
    metric: str, start: float, final: float, retrained: float, expected: str
):
    models = [{**SECOND, metric: value} for value in (final, start, retrained)]
    assert category(*models) == expected


def test_left_of_the_truth_ratio_follows_its_convention():
    """prob_mean is high where the rows are known."""
    models = [{**SECOND, "forget/truth_ratio": value} for value in (0.55, 0.6, 0.4)]
    settings = {"model": {"lr": 5e-5}, "eval": {"truth_ratio": "prob_mean"}}
    assert category(*models, settings=settings) == "partly forgotten"
    assert category(*models) == "inconclusive"


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_infinite_losses(bad: float | None):
    """In memory as in the file, where they are null; e^-800 is 0."""
    assert category({**FORGOTTEN, "retain/nll": 1.0}, {**START, "retain/nll": bad}) == "forgotten"
    assert category({**FORGOTTEN, "retain/nll": 1.0}, {**START, "retain/nll": 800.0}) == "forgotten"
    assert category({**FORGOTTEN, "retain/nll": bad}, {**START, "retain/nll": 1.0}) == "model damaged"
    found, filed = (verdict(record({**FORGOTTEN, "forget/nll": v}, {**START, "forget/nll": 1})) for v in (bad, None))
    assert found == filed


@pytest.mark.parametrize(
    ("final", "start", "retrained", "expected"),
    [
        (0.5, 0.5, 0.1, "forgotten"),
        (0.7, 0.5, 0.1, "forgotten"),
        (0.71, 0.5, 0.1, "model damaged"),
        (0.5, 0.1, 0.5, "forgotten"),
    ],
)
def test_kept_rows_that_were_degenerate_before(final: float, start: float, retrained: float, expected: str):
    models = [(FORGOTTEN, final), (START, start), (RETRAINED, retrained)]
    assert category(*({**metrics, "retain/degenerate": value} for metrics, value in models)) == expected
