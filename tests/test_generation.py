"""The greedy loop against transformers' own generation."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from simnpo_pl.generation import greedy


@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_equals_generate(model_folder: Path, tokens: int):
    """Prompts of unlike length in one batch give what each gives by itself, whether or not it ends early."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 5)]
    # An id the model often produces, so that some rows end before others.
    free = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=-1)[0] for p in prompts]
    stop = free[1][len(prompts[1]) + 2].item()
    expected = []
    for prompt, ids in zip(prompts, free, strict=True):
        new = ids[len(prompt) :].tolist()[:tokens]
        expected.append(new[: new.index(stop)] if stop in new else new)
    assert greedy(model, prompts, tokens, [stop]) == expected
    if tokens == 12:
        assert len({len(row) for row in expected}) > 1
