"""The fast paths to answer log-probs against the plain one."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from simnpo_pl.models import head, packing
from simnpo_pl.models.logprobs import Scorer, divergence, join, score_together, with_plan
from simnpo_pl.models.packing import layout_of, stacked


def rows(seed: int = 0, sizes: tuple[int, ...] = (12, 7, 3, 9)) -> dict[str, torch.Tensor]:
    """Right-padded rows of random tokens whose first two are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    width = max(sizes)
    ids = torch.randint(5, 200, (len(sizes), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(sizes).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def load(folder: Path, attention: str = "sdpa"):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


def test_sum_of_log_probs_row_by_row(model_folder: Path):
    """Each row by itself, without padding, from the model's own full logits."""
    model, batch = load(model_folder), rows()
    logps = Scorer(model)({"rows": batch})["rows"].logps()
    for i, length in enumerate((12, 7, 3, 9)):
        ids = batch["input_ids"][i, :length]
        with torch.no_grad():
            own = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = sum(own[t - 1, ids[t]] for t in range(2, length))
        assert logps.total[i].item() == pytest.approx(expected.item(), rel=1e-5)
        assert logps.length[i].item() == length - 2
        assert logps.mean[i].item() == pytest.approx(expected.item() / (length - 2), rel=1e-5)


def test_unmasked_row_scores_all_but_the_first_token(model_folder: Path):
    """A row of T tokens that is all answer has T - 1 scored ones; public code counts T."""
    batch = rows()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    logps = Scorer(load(model_folder))({"rows": batch})["rows"].logps()
    assert logps.length.tolist() == [11, 6, 2, 8]


def test_packed_equals_padded(model_folder: Path):
    """Loss to 1e-6 and gradient to 1e-5, both relative."""
    results = []
    for attention in ("sdpa", "eager"):
        model = load(model_folder, attention)
        scorer = Scorer(model)
        assert (scorer.forward.way == "packed") is (attention == "sdpa")
        loss = scorer({"rows": rows()})["rows"].logps().mean.mean()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (packed, packed_grad), (padded, padded_grad) = results
    assert packed == pytest.approx(padded, rel=1e-6)
    assert (packed_grad - padded_grad).norm() / padded_grad.norm() < 1e-5


def test_chunks_equal_one_piece(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The head in chunks of two tokens, recomputed in the backward pass, gives the same loss and gradient."""
    results = []
    for budget in (2**25, 2 * 1024):
        monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
        model = load(model_folder)
        states = Scorer(model)({"rows": rows()})["rows"]
        loss = states.logps().mean.mean()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), states.token_scores()))
    (whole, whole_grad, whole_scores), (chunked, chunked_grad, chunked_scores) = results
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert (chunked_grad - whole_grad).norm() / whole_grad.norm() < 1e-5
    torch.testing.assert_close(chunked_scores[0], whole_scores[0], rtol=1e-5, atol=1e-6)
    assert chunked_scores[1].tolist() == whole_scores[1].tolist()


@pytest.mark.parametrize("autocast", [False, True])
def test_divergence_in_chunks(model_folder: Path, other_folder: Path, autocast: bool, monkeypatch: pytest.MonkeyPatch):
    """KL to another model, four tokens at once, has the value and gradient of all at once."""
    results = []
    for budget in (2**25, 16 * 1024):
        monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
        model, other = load(model_folder), load(other_folder)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                reference = Scorer(other)({"rows": rows()})["rows"]
            states = Scorer(model)({"rows": rows()})["rows"]
            values = states.per_token(lambda logits, _, target: divergence(target, logits), reference)
        assert (len(values) * 1024 <= budget) is (budget == 2**25)
        values.mean().backward()
        results.append((values.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (whole, whole_grad), (chunked, chunked_grad) = results
    torch.testing.assert_close(chunked, whole, rtol=2e-2 if autocast else 1e-6, atol=1e-6)
    assert (chunked_grad - whole_grad).norm() / whole_grad.norm() < (2e-2 if autocast else 1e-5)


def test_parts_come_back_apart(model_folder: Path):
    """One pass over two sets of rows of unlike width gives what two passes give."""
    scorer = Scorer(load(model_folder))
    parts = {"forget": rows(0), "retain": rows(1, (5, 20, 4))}
    together = scorer(parts)
    for name, part in parts.items():
        alone = scorer({name: part})[name]
        assert together[name].size == alone.size == len(part["input_ids"])
        torch.testing.assert_close(together[name].logps().total, alone.logps().total, rtol=1e-5, atol=1e-5)
        assert together[name].lengths().tolist() == alone.lengths().tolist()


@pytest.mark.parametrize("budget", [2**25, 0], ids=["kept", "again"])
def test_parts_through_the_head_together(model_folder: Path, budget: int, monkeypatch: pytest.MonkeyPatch):
    """Losses to 1e-6 and gradients to 1e-5 of parts that go through it apart, and of those logits taken whole."""
    monkeypatch.setattr(head, "LOGITS_BUDGET", budget)
    monkeypatch.setattr(head, "CPU_CHUNK", 512)
    parts, results = {"forget": rows(0), "retain": rows(1, (4, 11))}, []
    for way in ("together", "apart", "whole"):
        model = load(model_folder, "eager" if way == "whole" else "sdpa")
        scorer = Scorer(model)
        states = scorer(parts)
        if way == "together":
            states = score_together(states, ["forget", "retain"])
            assert all(part.known_logps is not None for part in states.values())
        logps = {name: part.logps() for name, part in states.items()}
        loss = logps["forget"].mean.square().mean() - 0.5 * logps["retain"].total.mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((loss.item(), gradient))
    for loss, gradient in results[1:]:
        assert results[0][0] == pytest.approx(loss, rel=1e-6)
        assert ((results[0][1] - gradient).norm() / gradient.norm()).item() < 1e-5


def test_correct_tokens(model_folder: Path):
    """Correct are the positions whose label is the argmax of the model's own logits."""
    model, batch = load(model_folder), rows()
    with torch.no_grad():
        argmax = model(input_ids=batch["input_ids"]).logits.argmax(-1)
    # Make every second label right.
    batch["labels"][:, 3::2] = torch.where(batch["labels"][:, 3::2] == -100, -100, argmax[:, 2:-1:2])
    scores = Scorer(model)({"rows": batch})["rows"].token_scores()
    expected = (argmax[:, :-1] == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
    assert scores[1].tolist() == expected.tolist()
    assert 0 < sum(expected.tolist()) < len(expected)


def test_sliding_window_within_packed_rows(make_model: Callable[..., Path]):
    """A window shorter than the rows is kept when rows are packed."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        attn_implementation="sdpa",
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():
        expected = model(**{k: v for k, v in rows().items() if k != "labels"}).logits
    scorer = Scorer(model)
    assert scorer.forward.way == "packed"
    states = scorer({"rows": rows()})["rows"]
    scored = torch.nn.functional.pad(rows()["labels"][:, 1:], (0, 1), value=-100) != -100
    torch.testing.assert_close(states.logits(), expected[scored], rtol=1e-4, atol=1e-4)


def alike() -> dict[str, torch.Tensor]:
    """Rows that begin alike: two from one prompt, one that is another's beginning, one repeated, one of its own."""
    batch = rows()
    ids = batch["input_ids"]
    ids[1, :5], ids[2] = ids[0, :5], ids[1]
    ids = torch.cat([ids, ids[3:]])
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"][3:]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_layout_of_rows_that_begin_alike():
    """A token is placed once for all rows that agree up to it; after the first difference agreement counts no more."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 9, 9], [5, 2, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    layout = layout_of(ids, mask)
    assert layout.cells.tolist() == [0, 1, 2, 3, 6, 11, 12, 13]
    assert layout.tokens.view(4, 4).tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [0, 1, 4, 5], [6, 7, 0, 0]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1]]
    assert layout.shared
    assert layout.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 4, 5, 6, 7]
    assert layout.lengths.tolist() == [[4, 1, 1, 2], [4, 3, 4, 2]]
    assert not layout_of(ids[[0, 3]], mask[[0, 3]]).shared


def test_layouts_one_below_the_other():
    """Of unlike widths, of which one shares tokens: as the layout of all rows, where no neighbours begin alike."""
    parts = [alike(), rows(1, (5, 20, 4))]
    parts[1]["input_ids"][0, 0] = 4
    joined, apart = join(parts), [layout_of(part["input_ids"], part["attention_mask"]) for part in parts]
    below, whole = stacked(apart), layout_of(joined["input_ids"], joined["attention_mask"])
    real = joined["attention_mask"].flatten() != 0
    assert below[:2] == whole[:2]
    assert below.shared
    assert below.cells.tolist() == whole.cells.tolist()
    assert below.tokens[real].tolist() == whole.tokens[real].tolist()
    for field in ("positions", "keys", "lengths"):
        assert getattr(below, field).tolist() == getattr(whole, field).tolist()
    assert stacked(apart[:1]) is apart[0]


@pytest.mark.parametrize("shared", [False, True])
def test_flash_attention_by_row(make_model: Callable[..., Path], shared: bool, monkeypatch: pytest.MonkeyPatch):
    """Its kernel's arguments describe the rows, of which one may have no token of its own: the same log-probs."""

    calls = []

    def flash(query: Any, key: Any, value: Any, starts: Any, key_starts: Any, *rest: Any, scale: float) -> list[Any]:
        calls.append(len(query))
        assert rest == (width, width, 0.0, True, False)
        assert starts.dtype == key_starts.dtype == torch.int32
        outputs = []
        for (a, b), (c, d) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
            own = [x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d])]
            seen = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
            output = scaled_dot_product_attention(*own, attn_mask=seen, scale=scale, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return [torch.cat(outputs)]

    model = load(make_model(0, num_attention_heads=4, num_key_value_heads=2, hidden_size=64))
    parts = {"one": alike() if shared else rows(3), "other": rows(1, (5, 20, 4))}
    width = max(part["input_ids"].shape[1] for part in parts.values())
    scorer, results = Scorer(model), []
    for fast in (False, True):
        model.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_has_flash", lambda device, fast=fast: fast)
            patch.setattr(packing, "_FLASH_DTYPES", (torch.float32,))
            patch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
            states = scorer(parts)
            means = torch.cat([states[name].logps().mean for name in parts])
        means.sum().backward()
        results.append([means.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plans_that_come_with_the_rows(model_folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch):
    """The same states, bit for bit, as from plans made there, packed and padded; nothing is made again."""
    scorer, parts = Scorer(load(model_folder, attention)), {"forget": alike(), "retain": rows(1, (5, 20, 4))}
    plain = scorer(parts, [1])
    planned = {name: with_plan(part) for name, part in parts.items()}
    monkeypatch.setattr("simnpo_pl.models.logprobs.with_plan", None)
    for name, states in scorer(planned, [1]).items():
        torch.testing.assert_close(states.hidden, plain[name].hidden, rtol=0, atol=0)
        one, other = states.layers[1], plain[name].layers[1]
        torch.testing.assert_close((one.hidden, one.rows), (other.hidden, other.rows), rtol=0, atol=0)
        for field in ("predictors", "labels", "rows"):
            assert getattr(states, field).tolist() == getattr(plain[name], field).tolist()


def test_rows_that_begin_alike(model_folder: Path):
    """Computed once, they score and pull as each by itself: loss to 1e-6, gradient to 1e-5, scores to 1e-5."""
    batch, results = alike(), []
    for attention in ("sdpa", "eager"):
        model = load(model_folder, attention)
        states = Scorer(model)({"rows": batch})["rows"]
        loss = (states.logps().mean * torch.arange(1, 6)).sum()
        loss.backward()
        scores = states.token_scores()
        results.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()]), scores, len(states.hidden)))
    (shared, shared_grad, shared_scores, used), (apart, apart_grad, scores, _) = results
    assert used < scores.shape[1]
    assert shared.item() == pytest.approx(apart.item(), rel=1e-6)
    assert (shared_grad - apart_grad).norm() / apart_grad.norm() < 1e-5
    torch.testing.assert_close(shared_scores[0], scores[0], rtol=1e-5, atol=1e-6)
    assert shared_scores[1].tolist() == scores[1].tolist()


def test_unknown_change_of_the_logits(model_folder: Path, caplog: pytest.LogCaptureFixture):
    """A model that does to its logits what no config names is run as a whole, and that is said."""
    from transformers import LlamaForCausalLM

    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model, batch = Doubled.from_pretrained(model_folder), rows()
    with caplog.at_level("INFO", "simnpo_pl"):
        scorer = Scorer(model)
    assert "Doubled: rows are padded, not packed (the map from its hidden states to its logits" in caplog.text
    got = scorer({"rows": batch})["rows"].logps().total
    ids = batch["input_ids"][2, :3]
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    assert got[2].item() == pytest.approx(own[1, ids[2]].item(), rel=1e-5)


def test_join_keeps_rows_apart():
    joined = join([rows(0), rows(1, (5, 20, 4))])
    assert joined["input_ids"].shape == (7, 20)
    assert joined["attention_mask"].sum(1).tolist() == [12, 7, 3, 9, 5, 20, 4]
    assert (joined["labels"][:4, 12:] == -100).all()
