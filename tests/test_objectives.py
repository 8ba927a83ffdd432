"""Objectives on log-probs made by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simnpo_pl.models.head import Head
from simnpo_pl.models.logprobs import AnswerLogps, AnswerStates, LayerStates
from simnpo_pl.objectives import (
    CEU,
    DPO,
    IDK,
    IHL,
    NPO,
    PDU,
    RKLD,
    RMU,
    UNDIAL,
    WGA,
    AltPO,
    FineTune,
    ForgetInputs,
    GradAscent,
    GradDiff,
    JensUn,
    NPORawLogits,
    Objective,
    Positions,
    SatImp,
    SimNPO,
    SimNPORawLogits,
)
from simnpo_pl.objectives.base import RetainInputs
from simnpo_pl.objectives.retain import JSD, KL, EmbedDiff
from simnpo_pl.utils.errors import UserError


def logps(total: list[float], length: list[float]) -> AnswerLogps:
    return AnswerLogps(torch.tensor(total, dtype=torch.float64), torch.tensor(length, dtype=torch.float64))


FORGET = logps([-2.0, -12.0], [2, 4])
ALTERNATE = logps([-3.0, -4.0], [3, 2])
REFERENCE = torch.tensor([-1.0, -14.0], dtype=torch.float64)
REFERENCE_ALTERNATE = torch.tensor([-5.0, -4.5], dtype=torch.float64)


def test_simnpo():
    """beta 2, gamma 0.5; means are -1 and -3 nats per token.

    Row 1: -(2/2) log s(2*1 - 0.5) = log(1 + e^-1.5) = 0.2014133.
    Row 2: -(2/2) log s(2*3 - 0.5) = log(1 + e^-5.5) = 0.0040785.
    """
    loss = SimNPO(beta=2.0, gamma=0.5)(ForgetInputs(forget=FORGET))
    torch.testing.assert_close(loss, torch.tensor([0.2014133, 0.0040785], dtype=torch.float64), rtol=1e-4, atol=0)


def test_npo():
    """beta 0.5; log-ratios are -2 - -1 = -1 and -12 - -14 = 2.

    Row 1: -(2/0.5) log s(0.5) = 4 log(1 + e^-0.5) = 4 * 0.4740770 = 1.8963080.
    Row 2: -(2/0.5) log s(-1) = 4 log(1 + e) = 4 * 1.3132617 = 5.2530468.
    """
    loss = NPO(beta=0.5)(ForgetInputs(forget=FORGET, reference_forget=REFERENCE))
    torch.testing.assert_close(loss, torch.tensor([1.8963080, 5.2530468], dtype=torch.float64), rtol=1e-6, atol=0)


def test_dpo():
    """beta 0.5; forget log-ratios -1 and 2, refusal log-ratios -3 - -5 = 2 and -4 - -4.5 = 0.5.

    Row 1: -(2/0.5) log s(0.5 * (2 - -1)) = 4 log(1 + e^-1.5) = 0.8056533.
    Row 2: -(2/0.5) log s(0.5 * (0.5 - 2)) = 4 log(1 + e^0.75) = 4 * 1.1368712 = 4.5474848.
    """
    loss = DPO(beta=0.5)(
        ForgetInputs(
            forget=FORGET, alternate=ALTERNATE, reference_forget=REFERENCE, reference_alternate=REFERENCE_ALTERNATE
        )
    )
    torch.testing.assert_close(loss, torch.tensor([0.8056533, 4.5474848], dtype=torch.float64), rtol=1e-6, atol=0)


def test_cross_entropies():
    """Means per token: forget -1 and -3; refusals -1 and -2. Ascent has the log-prob, descent its negative."""
    batch = ForgetInputs(forget=FORGET, alternate=ALTERNATE)
    assert GradAscent()(batch).tolist() == GradDiff()(batch).tolist() == [-1, -3]
    assert FineTune()(batch).tolist() == [1, 3]
    assert IDK()(batch).tolist() == [1, 2]


def states(logits: list[list[float]], labels: list[int], rows: list[int]) -> AnswerStates:
    """Scored positions whose head is the identity: hidden states are the logits."""
    return AnswerStates(
        hidden=torch.tensor(logits),
        predictors=torch.arange(len(labels)),
        labels=torch.tensor(labels),
        rows=torch.tensor(rows),
        size=max(rows) + 1,
        head=Head(torch.nn.Identity(), len(logits[0])),
    )


# Two tokens of probabilities 3/4 and 1/4 in one row, one of 1/2 in another, over a vocabulary of two.
LOG3 = math.log(3)
STATES = states([[LOG3, 0.0], [LOG3, 0.0], [0.0, 0.0]], [0, 1, 0], [0, 0, 1])


def test_wga():
    """Mean of p log p: row 1 (3/4 log 3/4 + 1/4 log 1/4) / 2 = -0.2811676, row 2 1/2 log 1/2 = -0.3465736."""
    loss = WGA()(ForgetInputs(states=STATES))
    assert loss.tolist() == pytest.approx([-0.2811676, -0.3465736], rel=1e-6)


def test_satimp():
    """beta1 2, beta2 1: p^2 (1 - p) log p.

    Row 1: (9/64 log 3/4 + 3/64 log 1/4) / 2 = (-0.0404553 - 0.0649825) / 2; row 2: 1/8 log 1/2.
    """
    loss = SatImp(beta1=2.0, beta2=1.0)(ForgetInputs(states=STATES))
    assert loss.tolist() == pytest.approx([-0.0527189, -0.0866434], rel=1e-5)


def test_ceu():
    """Without the label all mass is on the other token, so the loss is minus that token's log-prob.

    Row 1 leaves out its first token; the second has label 1, so -log 3/4 = 0.2876821. Row 2 has no second token.
    """
    loss = CEU()(ForgetInputs(states=STATES))
    assert loss.tolist() == pytest.approx([0.2876821, 0.0], rel=1e-6)


def test_undial():
    """Reference logits are all 0 and beta is log 3: the target is 1/4 on the label and 3/4 on the other token.

    Token 1: -(1/4 log 3/4 + 3/4 log 1/4) = 1.1116413; token 2: -(1/4 log 1/4 + 3/4 log 3/4) = 0.5623351; their mean is
    0.8369882. Row 2: log 2.
    """
    reference = replace(STATES, hidden=torch.zeros(3, 2))
    loss = UNDIAL(beta=LOG3)(ForgetInputs(states=STATES, reference_states=reference))
    assert loss.tolist() == pytest.approx([0.8369882, 0.6931472], rel=1e-6)


# Row 1 has two tokens, row 2 none, row 3 one; two dimensions.
LAYER = LayerStates(torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 2]), size=3)


def test_rmu(monkeypatch: pytest.MonkeyPatch):
    """c 5 and u (3/5, 4/5): the states are drawn to (3, 4).

    Row 1: ((1 - 3)^2 + (0 - 4)^2) / 2 = 10 and (0^2 + 3^2) / 2 = 4.5, mean 7.25. Row 3: (3^2 + 2^2) / 2 = 6.5.
    Crossed: the sums are 14.5, 0 and 6.5, and each is divided by 2, 1 and 1 (for the row without tokens), so times 5/6.
    """
    monkeypatch.setattr(RMU, "direction", lambda *_: torch.tensor([0.6, 0.8]))
    inputs = ForgetInputs(states=replace(STATES, layers={7: LAYER}))
    assert RMU(coefficient=5.0)(inputs).tolist() == pytest.approx([7.25, 0, 6.5])
    crossed = RMU(coefficient=5.0, average_over="crossed")(inputs)
    assert crossed.tolist() == pytest.approx([14.5 * 5 / 6, 0, 6.5 * 5 / 6])


def test_direction_of_rmu_is_a_unit_vector_of_its_own_seed():
    before = torch.get_rng_state()
    first, second, other = RMU(seed=1).direction(64), RMU(seed=1).direction(64), RMU(seed=2).direction(64)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert first.norm().item() == pytest.approx(1)
    assert (first >= 0).all()


def test_rmu_trains_three_down_projections():
    import re

    def trained(layer: int, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in RMU(layer).default_trainable)

    llama = [n for n in range(9) if trained(7, f"model.layers.{n}.mlp.down_proj.weight")]
    assert llama == [5, 6, 7]
    assert [n for n in range(9) if trained(1, f"transformer.h.{n}.mlp.c_proj.weight")] == [0, 1]
    assert not trained(7, "model.layers.7.mlp.up_proj.weight")
    assert not trained(7, "transformer.h.7.attn.c_proj.weight")
    assert not trained(7, "model.layers.17.mlp.down_proj.weight")


def test_embed_diff():
    """Against a reference of all ones.

    Row 1: (0^2 + 1^2) / 2 = 0.5 and (2^2 + 0^2) / 2 = 2, mean 1.25. Row 3: (1^2 + 1^2) / 2 = 1.
    """
    policy = replace(STATES, layers={4: LAYER})
    reference = replace(STATES, layers={4: replace(LAYER, hidden=torch.ones(3, 2))})
    inputs = RetainInputs(states=policy, reference_states=reference)
    assert EmbedDiff(layer=4)(inputs).tolist() == pytest.approx([1.25, 0, 1])


def test_pdu():
    """(largest - mean)^2 of the logits: (log 3 / 2)^2 twice in row 1; 0 in row 2, whose tokens are equally probable."""
    loss = PDU()(ForgetInputs(states=STATES))
    assert loss.tolist() == pytest.approx([LOG3**2 / 4, 0], rel=1e-6)


def test_rkld():
    """alpha 2; reference logits (0, 0), memorizing logits (log 3 / 2, -1) at every token.

    Only what the memorizing model makes more probable is subtracted: teacher logits (-log 3, 0), so 1/4 and 3/4.
    KL(policy || teacher) with the policy at 3/4 and 1/4 is 3/4 log 3 + 1/4 log 1/3 = 1/2 log 3 = 0.5493061, at both
    tokens of row 1; with 1/2 and 1/2 it is 1/2 log 2 + 1/2 log 2/3 = 0.1438410.
    """
    memorizing = replace(STATES, hidden=torch.tensor([[LOG3 / 2, -1.0]]).repeat(3, 1))
    reference = replace(STATES, hidden=torch.zeros(3, 2))
    inputs = ForgetInputs(states=STATES, reference_states=reference, memorizing_states=memorizing)
    assert RKLD(alpha=2.0)(inputs).tolist() == pytest.approx([0.5493061, 0.1438410], rel=1e-6)
    same = RKLD(alpha=0.0)(ForgetInputs(states=STATES, reference_states=STATES, memorizing_states=memorizing))
    assert same.tolist() == pytest.approx([0, 0], abs=1e-7)


def test_dual_variable():
    """eps 1, step 0.5, from retain weight 2, warm-up of one epoch; the bound is 1 and the dual variable never below 0.

    Epoch 0, retain loss 3: stays 2. Epoch 1: 2 + 0.5 * (3 - 1) = 3; 3 + 0.5 * (0.2 - 1) = 2.6;
    2.6 + 0.5 * (-9 - 1) < 0. Epoch 2: 0 + 0.5 * (2 - 1) = 0.5.
    """
    objective = PDU(eps=1.0, step=0.5, warmup_epochs=1)
    forget, retain = torch.tensor(4.0), torch.tensor(3.0)
    assert objective.total(forget, retain, 0.5, 2.0).item() == 0.5 * 4 + 2 * (3 - 1)
    used = []
    for epoch, value in ((0, 3.0), (1, 3.0), (1, 0.2), (1, -9.0), (2, 2.0)):
        used.append(objective.after_step(torch.tensor(value), 2.0, epoch)["dual"])
    assert used == pytest.approx([2, 2, 3, 2.6, 0])
    assert objective.total(forget, retain, 0.5, 2.0).item() == pytest.approx(0.5 * 4 + 0.5 * (3 - 1))


def test_dual_variable_may_start_at_zero():
    objective = PDU(eps=1.0, warmup_epochs=0)
    assert objective.total(torch.tensor(4.0), torch.tensor(3.0), 1.0, 0.0).item() == 4
    assert objective.after_step(torch.tensor(3.0), 0.0, 0) == {"dual": 0}
    assert objective.total(torch.tensor(4.0), torch.tensor(3.0), 1.0, 0.0).item() == 4 + 2 * (3 - 1)


# Row 1 has two tokens with logits (0, 1) and (-1, 2), row 2 one with (0, 0) and padding whose logits must not count.
POSITIONS = Positions(
    logits=torch.tensor([[[0.0, 1.0], [-1.0, 2.0]], [[0.0, 0.0], [99.0, 99.0]]]),
    labels=torch.tensor([[0, 1], [0, -100]]),
    mask=torch.tensor([[1, 1], [1, 0]]),
)


def test_simnpo_raw_logits():
    """beta 2, delta 0.5: -(2/2) log s(2 (-z - 0.5)) = log(1 + e^(2z + 1)), averaged over tokens and vocabulary.

    Row 1: log(1 + e^1) = 1.3132617, log(1 + e^3) = 3.0485873, log(1 + e^-1) = 0.3132617, log(1 + e^5) = 5.0067153;
    their mean is 2.4204565. Row 2: log(1 + e^1).
    """
    loss = SimNPORawLogits(beta=2.0, delta=0.5)(ForgetInputs(positions=POSITIONS))
    assert loss.tolist() == pytest.approx([2.4204565, 1.3132617], rel=1e-6)


def test_pdu_over_labels():
    """At the positions of the labels: (1 - 0.5)^2 = 0.25 and (2 - 0.5)^2 = 2.25, mean 1.25; 0; padding not counted."""
    loss = PDU(average_over="labels")(ForgetInputs(positions=POSITIONS))
    assert loss.tolist() == pytest.approx([1.25, 0])


def test_npo_raw_logits():
    """beta 1, reference logits 1: -2 log s(1 - z) = 2 log(1 + e^(z - 1)), averaged over tokens and vocabulary.

    Row 1: log(1 + e^-1) = 0.3132617, log 2 = 0.6931472, log(1 + e^-2) = 0.1269280, log(1 + e^1) = 1.3132617; twice
    their mean is 1.2232993. Row 2: 2 * 0.3132617.
    """
    inputs = ForgetInputs(positions=POSITIONS, reference_positions=torch.ones(2, 2, 2))
    loss = NPORawLogits(beta=1.0)(inputs)
    assert loss.tolist() == pytest.approx([1.2232993, 0.6265234], rel=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (WGA, "beta"),
        (SatImp, "beta1"),
        (SatImp, "beta2"),
        (SimNPORawLogits, "delta"),
        (RKLD, "alpha"),
        *((PDU, n) for n in ("eps", "step", "warmup_epochs")),
    ],
)
def test_settings_must_not_be_negative(make: type[Objective], name: str):
    with pytest.raises(UserError, match=f"--model.objective.{name} must be a number of at least 0, got -1"):
        make(**{name: -1.0})


def test_default_weights():
    """Gradient ascent and fine-tuning have no retain term; SimNPO's forget weight is the paper's for forget10."""
    assert [cls.default_retain_weight for cls in (GradAscent, FineTune, GradDiff, IDK, NPO, DPO, SimNPO)] == [
        *(0, 0),
        *(1, 1, 1, 1, 1),
    ]
    assert SimNPO.default_forget_weight == 0.125
    assert NPO.default_forget_weight == 1


@given(beta=st.floats(0.05, 5), length=st.integers(1, 200), total=st.floats(-500, 0))
def test_simnpo_is_npo_without_reference(beta: float, length: int, total: float):
    """With gamma 0 and reference log-probs of 0, SimNPO at beta is NPO at beta / n, divided by n."""
    row = logps([total], [length])
    simnpo = SimNPO(beta)(ForgetInputs(forget=row))
    npo = NPO(beta / length)(ForgetInputs(forget=row, reference_forget=torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(simnpo, npo / length, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [SimNPO, NPO])
def test_small_beta_is_gradient_ascent(make: type[Objective]):
    """As beta tends to 0 the gradient tends to that of ascent: on sums for NPO, on means for SimNPO."""
    total = torch.tensor([-2.0, -12.0], dtype=torch.float64, requires_grad=True)
    row = AnswerLogps(total, FORGET.length)
    make(beta=1e-6)(ForgetInputs(forget=row, reference_forget=REFERENCE)).sum().backward()
    expected = torch.ones(2, dtype=torch.float64) if make is NPO else 1 / FORGET.length
    torch.testing.assert_close(total.grad, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [SimNPO, NPO, DPO, UNDIAL, SimNPORawLogits, NPORawLogits])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(make: type[Objective], beta: float):
    with pytest.raises(UserError, match=r"--model.objective.beta must be a number above 0, got"):
        make(beta=beta)


@pytest.mark.parametrize(
    ("make", "option", "known"),
    [
        (RMU, "objective", "answers or crossed"),
        (PDU, "objective", "answers or labels"),
        (EmbedDiff, "retain_loss", "answers or crossed"),
        (KL, "retain_loss", "answers or all"),
    ],
)
def test_averages_are_named(make: type[torch.nn.Module], option: str, known: str):
    with pytest.raises(UserError, match=f"--model.{option}.average_over must be {known}, got 'rows'"):
        make(average_over="rows")


@pytest.mark.parametrize("gamma", [-0.1, math.nan])
def test_gamma_must_not_be_negative(gamma: float):
    with pytest.raises(UserError, match=r"--model.objective.gamma must be a number of at least 0, got"):
        SimNPO(gamma=gamma)


def test_forward_must_be_written():
    with pytest.raises(TypeError, match="Objective must implement forward"):
        Objective()(ForgetInputs())


def test_altpo():
    """As DPO, with sampled answers in the place of refusals: the values of `test_dpo`."""
    inputs = {"sampled": ALTERNATE, "reference_forget": REFERENCE, "reference_sampled": REFERENCE_ALTERNATE}
    loss = AltPO(beta=0.5)(ForgetInputs(forget=FORGET, **inputs))
    torch.testing.assert_close(loss, torch.tensor([0.8056533, 4.5474848], dtype=torch.float64), rtol=1e-6, atol=0)


def test_ihl():
    """1 + p - q: row 1 has p - q = 1/2 and -1/2, row 2 has 0."""
    assert IHL()(ForgetInputs(states=STATES)).tolist() == pytest.approx([1.0, 1.0])
    assert IHL()(ForgetInputs(states=replace(STATES, labels=torch.tensor([0, 0, 0])))).tolist() == [1.5, 1.0]


def test_jensun():
    """log 2 + (p log p - (1 + p) log(1 + p)) / 2, p 1/4: 0.3803956; p 3/4: 0.0956026; p 1/2: 0.2157616.

    Row 1 is the mean of the first two, by the distributions: p = (3/4, 1/4) and (0, 1), their mean (3/8, 5/8);
    KL(p || m) = 3/4 log 2 + 1/4 log(2/5) = 0.2907877, KL((0, 1) || m) = log(8/5) = 0.4700036, half of the sum.
    """
    loss = JensUn()(ForgetInputs(states=STATES, alternate_tokens=torch.tensor([1, 0, 1])))
    assert loss.tolist() == pytest.approx([(0.3803956 + 0.0956026) / 2, 0.2157616], rel=1e-5)


def test_refusal_is_repeated_to_the_length_of_each_answer():
    """Refusals 7 8 and 9, whose ends 1 (and 1 2 for the second) are left out; answers of 3 and 2 tokens."""
    skip = -100
    labels = torch.tensor([[skip, 7, 8, 1], [skip, 9, 1, 2]])
    scored = states([[0.0, 0.0]] * 5, [0] * 5, [0, 0, 0, 1, 1])
    inputs = ForgetInputs({"alternate": {"labels": labels, "end": torch.tensor([1, 2])}}, {"forget": scored})
    assert inputs.alternate_tokens.tolist() == [7, 8, 7, 9, 9]


@pytest.mark.parametrize(("kind", "name"), [(ForgetInputs, "forget"), (RetainInputs, "retain")])
def test_log_probs_follow_from_states(kind: type[ForgetInputs | RetainInputs], name: str):
    """Token probabilities 3/4 and 1/4, and 1/2."""
    total, length = getattr(kind(states=STATES), name)
    assert total.tolist() == pytest.approx([math.log(3 / 16), math.log(1 / 2)])
    assert length.tolist() == [2, 1]


def test_jsd_retain_loss():
    """Reference certain to one half, policy (3/4, 1/4) and (1/2, 1/2).

    m = (5/8, 3/8): (log(4/5) / 2 + log(4/3) / 2 + 3/4 log(6/5) + 1/4 log(2/3)) / 2 = 0.0338221, and 0.
    """
    reference = states([[0.0, 0.0]] * 3, [0, 1, 0], [0, 0, 1])
    loss = JSD()(RetainInputs(states=STATES, reference_states=reference))
    assert loss.tolist() == pytest.approx([0.0338221, 0.0], abs=1e-6)
