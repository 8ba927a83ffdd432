"""Models made by arithmetic on the weights of others, without training: perturbed references and task vectors.

perturb: (1 - share) * model + share * a model of the same architecture with random weights. The SimNPO paper, figure
A1, gives NPO such a reference: `fit --model.objective NPO --model.reference FOLDER`. Share 1 is the untrained model.

task-vector (Ilharco et al. 2023, "Editing Models with Task Arithmetic"): start - alpha * (overfit - start). The overfit
model is the start model fine-tuned on only the forget rows, for example by
`fit --config configs/finetune.yaml --data.train_split forget10`.
"""

from argparse import Namespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model
from simnpo_pl.utils.errors import UserError


def run(options: Namespace) -> None:
    if options.out.exists():
        raise UserError(f"--out: {options.out} exists already; give another folder")
    if options.command == "perturb":
        model, tokenizer = load_causal_lm(options.model), load_tokenizer(options.model)
        perturb(model, options.share, options.seed)
        what = f"{options.share:g} of it random with seed {options.seed}"
    else:
        # A start model may lack a tokenizer; a run's model has one.
        model, tokenizer = load_causal_lm(options.start), load_tokenizer(options.overfit)
        subtract(model, load_causal_lm(options.overfit), options.alpha)
        what = f"{options.start} moved by alpha {options.alpha:g}"
    save_model(model, tokenizer, options.out)
    print(f"written: {options.out}, {what}")


def perturb(model: Any, share: float, seed: int) -> None:
    """Average a model's weights with a share of random ones, drawn as the architecture initializes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = dict(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.lerp_(drawn[key], share)


def subtract(start: Any, overfit: Any, alpha: float) -> None:
    """Subtract from the start model's weights what fine-tuning added to them."""
    ours, weights = dict(start.named_parameters()), dict(overfit.named_parameters())
    shapes = [{(name, tuple(weight.shape)) for name, weight in side.items()} for side in (ours, weights)]
    if different := sorted(shapes[0] ^ shapes[1]):
        raise UserError(
            f"--start and --overfit differ in {different[0][0]}: the overfit model must be the start model fine-tuned"
        )
    with torch.no_grad():
        for name, weight in ours.items():
            weight.sub_(weights[name] - weight, alpha=alpha)
