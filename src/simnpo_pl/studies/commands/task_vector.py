"""Task vector (Ilharco et al. 2023, "Editing Models with Task Arithmetic"): start - alpha * (overfit - start).

The overfit model is the start model fine-tuned on the forget rows alone, for example by
`fit --config configs/finetune.yaml --data.train_split forget10`.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--start", required=True, metavar="MODEL", help="start model: hub id or folder")
    parser.add_argument("--overfit", required=True, metavar="MODEL", help="start model fine-tuned on the forget rows")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="length of the step, at least 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="where the unlearned model is to stand"
    )


def run(options: Namespace) -> None:
    """Write the unlearned model.

    Raises:
        UserError: The models are not of one architecture, alpha makes no sense, or the folder is there already.
    """
    if not 0 <= options.alpha < float("inf"):
        raise UserError(f"--alpha must be a number of at least 0, got {options.alpha}")
    out = options.out.expanduser()
    if out.exists():
        raise UserError(f"--out {out} is there already; give another folder, it is not written over")

    import torch

    from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model

    # A start model may have its tokenizer elsewhere; a run's model has its own.
    tokenizer = load_tokenizer(options.overfit)
    start, overfit = load_causal_lm(options.start), load_causal_lm(options.overfit)
    weights = dict(overfit.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in start.named_parameters()}
    for name in sorted(shapes.keys() | weights.keys()):
        ours, theirs = shapes.get(name), tuple(weights[name].shape) if name in weights else None
        if ours != theirs:
            raise UserError(
                f"--start {options.start} and --overfit {options.overfit} differ in {name} ({ours} against {theirs}): "
                "the overfit model must be the start model fine-tuned"
            )
    with torch.no_grad():
        for name, weight in start.named_parameters():
            weight.sub_(weights[name] - weight, alpha=options.alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(start, tokenizer, out)
    print(f"written: {out}, {len(weights)} tensors moved by alpha {options.alpha:g}")
