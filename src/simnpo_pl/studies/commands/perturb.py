"""A perturbed reference: (1 - share) * model + share * a model of the same architecture with random weights.

The SimNPO paper, figure A1, gives NPO such a reference; use it by `fit --model.objective NPO --model.reference FOLDER`.
Share 1 is the untrained model itself.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="hub id or folder")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the random model's weights, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the model is to stand")


def run(options: Namespace) -> None:
    """Write the perturbed model.

    Raises:
        UserError: The share makes no sense, or the folder is there already.
    """
    if not 0 <= options.share <= 1:
        raise UserError(f"--share must be from 0 to 1, got {options.share}")
    out = options.out.expanduser()
    if out.exists():
        raise UserError(f"--out {out} is there already; give another folder, it is not written over")
    perturb(options.model, options.share, options.seed, out)
    print(f"written: {out}, {options.share:g} of it random with seed {options.seed}")


def perturb(name: str, share: float, seed: int, out: Path) -> None:
    """Average a model's weights with random ones, as the architecture draws them at its birth.

    Args:
        name: Hub id or folder of the model.
        share: Of the random weights, 0 to 1.
        seed: Of the random weights.
        out: Folder that receives model and tokenizer.

    Raises:
        UserError: The model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model

    model, tokenizer = load_causal_lm(name), load_tokenizer(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = dict(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.lerp_(drawn[key], share)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, out)
