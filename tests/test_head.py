"""The head in chunks against logits taken whole, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simnpo_pl.models import head
from simnpo_pl.models.head import Head

U, S, D, V = 7, 11, 8, 1500
KINDS = {"plain": {}, "scaled": {"scale": 0.25}, "capped": {"cap": 2.0}, "both": {"scale": 3.0, "cap": 1.5}}


def setup(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear map, hidden states, which state predicts each label, labels; some states predict several, one none."""
    torch.manual_seed(0)
    module = nn.Linear(D, V, bias=bias, dtype=dtype)
    predictors = torch.tensor([0, 0, 0, 1, 2, 3, 3, 4, 5, 5, 0])
    return module, torch.randn(U, D, dtype=dtype), predictors, torch.randint(0, V, (S,))


def gradients(function: Callable[[Tensor], Tensor], module: nn.Linear, hidden: Tensor) -> list[Tensor]:
    """Values and all gradients, with an upstream gradient that differs from value to value."""
    module.zero_grad()
    hidden = hidden.clone().requires_grad_()
    values = function(hidden)
    values.backward(torch.linspace(-1, 2, len(values)))
    return [values.detach(), hidden.grad, *(p.grad.clone() for p in module.parameters())]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert ((one - other).norm() / other.norm()).item() < tolerance


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary in three parts, the last one smaller."""
    monkeypatch.setattr(head, "CPU_CHUNK", 512 * U)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [2**25, 0], ids=["kept", "again"])
def test_log_probs(kind: str, bias: bool, budget: int, monkeypatch: pytest.MonkeyPatch):
    """Log-probs of labels, their gradients and whether they are the most probable, from logits kept or made again."""
    monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
    module, hidden, predictors, labels = setup(bias)
    own = Head(module, V, **KINDS[kind])

    def plain(hidden: Tensor) -> Tensor:
        return own(hidden)[predictors].log_softmax(dim=-1)[torch.arange(S), labels]

    labels[:4] = own(hidden)[predictors].argmax(dim=-1)[:4].detach()
    expected = gradients(plain, module, hidden)
    close(gradients(lambda h: own.logps(h, predictors, labels), module, hidden), expected)
    logps, correct = own.scores(hidden, predictors, labels)
    close([logps], expected[:1])
    assert correct.tolist() == (own(hidden)[predictors].argmax(dim=-1) == labels).tolist()
    assert 4 <= int(correct.sum()) < S


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [True, False], ids=["matrix", "module"])
def test_function_of_a_tokens_logits(kind: str, plain: bool, monkeypatch: pytest.MonkeyPatch):
    """Two tokens at once give what all at once give; a module that is no matrix is called."""
    module, hidden, _, labels = setup(bias=True)
    if not plain:
        module.register_forward_hook(lambda *_: None)
    own, labels = Head(module, V, **KINDS[kind]), labels[:U]

    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        logps = logits.log_softmax(dim=-1)
        return -(logps.exp() * logps).sum(dim=-1) + labels * logps[:, 0]

    results = []
    for budget in (2**25, 8 * V):
        monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
        results.append(gradients(lambda h: own.per_token(entropy, h, labels), module, hidden))
    close(*results)


def test_module_that_is_no_matrix():
    """Log-probs of a head that is adapted, quantized or sharded come from calling it."""
    module, hidden, predictors, labels = setup(bias=False)
    plain, called = Head(module, V), Head(nn.Sequential(module), V)
    expected = gradients(lambda h: plain.logps(h, predictors, labels), module, hidden)
    close(gradients(lambda h: called.logps(h, predictors, labels), module, hidden), expected)
    for one, other in zip(
        plain.scores(hidden, predictors, labels), called.scores(hidden, predictors, labels), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_frozen_head_takes_no_gradient():
    module, hidden, predictors, labels = setup(bias=True)
    module.requires_grad_(False)
    hidden.requires_grad_()
    Head(module, V).logps(hidden, predictors, labels).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("budget", [2**25, 0], ids=["kept", "again"])
def test_autocast(budget: int, monkeypatch: pytest.MonkeyPatch):
    """Products in bfloat16, everything else and the gradient of the weights in float32."""
    monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
    module, hidden, predictors, labels = setup(bias=True)
    own = Head(module, V)
    expected = gradients(lambda h: own.logps(h, predictors, labels), module, hidden)

    def mixed(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return own.logps(hidden, predictors, labels)

    got = gradients(mixed, module, hidden)
    assert {value.dtype for value in got} == {torch.float32}
    close(got, expected, 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close([own.scores(hidden, predictors, labels)[0]], expected[:1], 2e-2)
        close([own.per_token(lambda z: z[:, 0], hidden)], [own(hidden)[:, 0]], 2e-2)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.floats(0.1, 30), st.booleans(), st.sampled_from([None, 5.0, 30.0]))
def test_bfloat16_log_probs_are_those_of_the_normalized_logits(seed: int, size: float, bias: bool, cap: float | None):
    """Never above 0, and the plain path's: a label's logit may not be more exact than the sum it is divided by."""
    torch.manual_seed(seed)
    module = nn.Linear(D, V, bias=bias)
    hidden, predictors = torch.randn(U, D), torch.randint(0, U, (S,))
    module.weight.data *= size
    own = Head(module, V, cap=cap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = own(hidden)
        labels = logits[predictors].argmax(dim=-1)
        labels[::3] = torch.randint(0, V, labels[::3].shape)
        expected = logits.log_softmax(dim=-1)[predictors, labels]
        for got in (own.logps(hidden, predictors, labels), own.scores(hidden, predictors, labels)[0]):
            assert got.max() <= 0
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_weights_in_bfloat16():
    module, hidden, predictors, labels = setup(bias=False, dtype=torch.bfloat16)
    own = Head(module, V)
    got = gradients(lambda h: own.logps(h, predictors, labels), module, hidden)
    wide = nn.Linear(D, V, bias=False)
    wide.weight.data = module.weight.data.float()
    expected = gradients(lambda h: Head(wide, V).logps(h, predictors, labels), wide, hidden.float())
    assert [value.dtype for value in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    close([value.float() for value in got], expected, 2e-2)


def test_no_label():
    """A part without a scored token has no log-probs and gives no gradient."""
    module, hidden, _, _ = setup(bias=False)
    none = torch.zeros(0, dtype=torch.long)
    values = Head(module, V).logps(hidden[:0].requires_grad_(), none, none)
    assert values.shape == (0,)
    values.sum().backward()
    assert module.weight.grad.abs().sum() == 0


def test_improbable_label():
    """A log-prob far below the smallest float's logarithm stays what it is."""
    module = nn.Linear(1, 3, bias=False)
    module.weight.data = torch.tensor([[0.0], [-500.0], [1.0]])
    zero = torch.zeros(1, dtype=torch.long)
    logp = Head(module, 3).logps(torch.ones(1, 1), zero, zero + 1)
    assert logp.item() == pytest.approx(-501.3132617, rel=1e-6)
