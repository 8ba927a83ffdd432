"""Memory of training by method: computed from a model's shapes, and measured on small models to see that it holds.

python scripts/memory.py --loading runs/smollm2/base --write docs/scale.md

Computed: what `fit` says before it trains, see `simnpo_pl.models.memory`. Measured: the largest resident memory of a
separate process that trains, less that before the model was loaded.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _shape(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool
) -> dict[str, Any]:
    return {
        **{"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied},
    }


LARGE = {
    "SmolLM2-135M": _shape(49152, 576, 1536, 30, 9, 3, True),
    "SmolLM2-360M": _shape(49152, 960, 2560, 32, 15, 5, True),
    "Llama-3.2-1B": _shape(128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.2-3B": _shape(128256, 3072, 8192, 28, 24, 8, True),
    "Llama-3.1-8B": _shape(128256, 4096, 14336, 32, 32, 8, False),
}
SMALL = {
    "wide": _shape(8192, 768, 2048, 4, 12, 4, False),
    "large vocabulary": _shape(65536, 512, 1536, 2, 8, 8, True),
}
METHODS = {"SimNPO": ("SimNPO", "NLL"), "NPO": ("NPO", "NLL"), "NPO+KL": ("NPO", "KL")}
RANK = 16
ROWS, WIDTH = 8, 128
"""Forget rows in a forward pass, with as many retain rows, and tokens in each."""
CARDS, FREE = (12, 24, 48, 80), 0.15
"""GPUs by their memory, GB, and the part of it that an estimate has to leave for CUDA, the allocator and evaluation."""
OVERLAYS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"checkpointing": True},
    "low_memory": {"checkpointing": True, "eight_bit": True, "rows": 4},
    "lora": {"checkpointing": True, "half_base": True, "rows": 4},
}
"""Files of configs/hardware, from the most memory to the least, and what they set."""
GB, MB = 1e9, 1e6
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    config: dict[str, Any]
    method: str
    lora: bool
    autocast: bool = False
    checkpointing: bool = False
    half_base: bool = False
    eight_bit: bool = False
    rows: int = ROWS


# -- computed ------------------------------------------------------------------------------------------------


def computed(case: Case, gpu: bool = True) -> dict[str, float]:
    """Bytes by what they are for, see `simnpo_pl.models.memory`.

    Args:
        case: What is trained.
        gpu: Whether on a GPU, where more logits are kept and at work at once.
    """
    import torch

    from simnpo_pl.models.lora import LoraOptions, inject_adapter
    from simnpo_pl.models.memory import Step, training_bytes

    with torch.device("meta"):
        model = llama(case.config, torch.bfloat16 if case.half_base else torch.float32)
        if case.lora:
            inject_adapter(model, LoraOptions(rank=RANK))
    step = Step(
        2 * case.rows,
        WIDTH,
        autocast=case.autocast,
        checkpointing=case.checkpointing,
        eight_bit=case.eight_bit,
        frozen=int(case.method == "NPO+KL" and not case.lora),
        reads_logits=case.method == "NPO+KL",
        gpu=gpu,
    )
    return training_bytes(model, step)


def llama(config: dict[str, Any], dtype: Any = None) -> Any:
    """A Llama without training."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    return AutoModelForCausalLM.from_config(LlamaConfig(**config, max_position_embeddings=2048), dtype=dtype)


# -- measured ------------------------------------------------------------------------------------------------


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Start the largest resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def train(folder: str, case: Case, found: Any) -> None:
    """Put into `found` the largest resident memory of two optimizer steps, less that before the model; bytes."""
    import lightning.pytorch as pl
    import torch

    from simnpo_pl.models.lora import LoraOptions
    from simnpo_pl.models.reference import REFERENCE_KEY
    from simnpo_pl.module.unlearning import UnlearningModule
    from simnpo_pl.objectives import NPO, SimNPO
    from simnpo_pl.objectives.retain import KL, NLL

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    objective, retain = METHODS[case.method]
    size = ROWS

    def part(start: int) -> dict[str, Any]:
        ids = (torch.arange(size * WIDTH).view(size, WIDTH) * 7 + start) % case.config["vocab_size"]
        labels = ids.clone()
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": torch.arange(size)}

    batch = {"forget": part(1) | {REFERENCE_KEY: torch.full((size,), -100.0)}, "retain": part(2)}
    if objective == "SimNPO":
        del batch["forget"][REFERENCE_KEY]
    module = UnlearningModule(
        folder,
        objective={"SimNPO": SimNPO, "NPO": NPO}[objective](),
        retain_loss={"NLL": NLL, "KL": KL}[retain](),
        lora=LoraOptions(rank=RANK) if case.lora else None,
        gradient_checkpointing=case.checkpointing,
        lr=1e-5,
    )
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        precision="bf16-mixed" if case.autocast else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )

    forget_peak()
    before = resident()
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    found.put(resident("VmHWM") - before)


def load(folder: str, rank: int, processes: int, port: int, found: Any) -> None:
    """Put into `found` the largest resident memory of loading a model that is sharded, and what stays; bytes."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from simnpo_pl.models.loading import load_causal_lm
    from simnpo_pl.models.sharding import shard

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (processes,))
    before, highest, done = resident("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    model = load_causal_lm(folder, sharded=True)
    shard(model, mesh)
    done.set()
    watching.join()
    torch.distributed.barrier()
    found.put((highest - before, resident("RssAnon") - before))
    torch.distributed.destroy_process_group()


# -- tables --------------------------------------------------------------------------------------------------


def large_table() -> str:
    """Memory of the large models by method."""
    lines = [
        "| model | trained | method | weights | gradients | AdamW | reference | activations | logits | float32 "
        "| bf16-mixed | bf16-mixed, checkpointing | base in bfloat16, checkpointing |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in ("Llama-3.2-1B", "Llama-3.1-8B"):
        for lora in (False, True):
            for method in METHODS:
                case = Case(LARGE[model], method, lora)
                parts = computed(case)
                mixed = replace(case, autocast=True)
                others = [mixed, replace(mixed, checkpointing=True)]
                if lora:
                    others.append(replace(case, checkpointing=True, half_base=True, autocast=True))
                totals = [sum(parts.values()), *(sum(computed(other).values()) for other in others)]
                named = ("weights", "gradients", "AdamW", "frozen models", "activations", "logits")
                cells = [f"{value / GB:.1f}" for value in (*(parts.get(name, 0.0) for name in named), *totals)]
                cells += [] if lora else ["-"]
                lines.append(f"| {model} | {'adapter' if lora else 'all'} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cards_table() -> str:
    """What fits into which card: the first overlay whose estimate leaves a part of the card's memory free."""
    lines = ["| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    for model, config in LARGE.items():
        takes = {name: sum(computed(card_case(config, name)).values()) / GB for name in OVERLAYS}
        cells = []
        for card in CARDS:
            fits = next((name for name, size in takes.items() if size <= (1 - FREE) * card), None)
            cells.append("-" if fits is None else f"{f'`{fits}.yaml`' if fits else 'no overlay'}, {takes[fits]:.1f}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card_case(config: dict[str, Any], overlay: str) -> Case:
    """SimNPO on a GPU, bf16-mixed, with one of `OVERLAYS`."""
    return replace(Case(config, "SimNPO", overlay == "lora", autocast=True), **OVERLAYS[overlay])


def small_cases() -> list[tuple[str, Case]]:
    """What is measured."""
    wide, vocabulary = SMALL.values()
    known = [Case(wide, method, lora) for lora in (False, True) for method in METHODS]
    known += [Case(vocabulary, method, False) for method in ("SimNPO", "NPO+KL")]
    known += [Case(wide, "SimNPO", lora, checkpointing=True) for lora in (False, True)]
    return [(next(name for name, config in SMALL.items() if config == case.config), case) for case in known]


def small_table() -> str:
    """Computed against measured."""
    lines = [
        "| model | trained | method | checkpointing | computed, MB | measured, MB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SMALL.items():
            llama(config).save_pretrained(Path(folder) / name)
        for name, case in small_cases():
            measured = in_a_process(str(Path(folder) / name), case)
            expected = sum(computed(case, gpu=False).values())
            trained = "adapter" if case.lora else "all"
            lines.append(
                f"| {name} | {trained} | {case.method} | {'yes' if case.checkpointing else 'no'} "
                f"| {expected / MB:.0f} | {measured / MB:.0f} | {measured / expected:.2f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def in_a_process(folder: str, case: Case) -> int:
    """What `train` finds in a process forked from this one."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=train, args=(folder, case, found))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"a measurement ended with exit code {child.exitcode}")
    return int(found.get())


def loading_table(folder: str) -> str:
    """Memory of loading a model on two processes: pages of their own, not those of the file, which they share."""
    import torch

    from simnpo_pl.models.loading import load_causal_lm

    lines = ["| file, MB | weights in float32, MB | peak, MB | afterwards, MB |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as half:
        model = load_causal_lm(folder)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        model.to(torch.bfloat16).save_pretrained(half)
        for source in (folder, half):
            size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
            found = [" and ".join(f"{value / MB:.0f}" for value in both) for both in loaded(source)]
            lines.append(f"| {size / MB:.0f} | {weights / MB:.0f} | {' | '.join(found)} |")
    return "\n".join(lines)


def loaded(folder: str) -> Any:
    """Largest memory of both processes, and what stays of it."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queues = [context.Queue() for _ in range(2)]
    children = [context.Process(target=load, args=(folder, r, 2, port, queues[r])) for r in range(2)]
    for child in children:
        child.start()
    found = [queue.get(timeout=300) for queue in queues]
    for child in children:
        child.join()
    return zip(*found, strict=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loading", metavar="FOLDER", help="a model whose loading on two processes is measured, too")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page that takes the tables between its marks")
    parser.add_argument(
        "--only", nargs="+", choices=["cards", "memory", "memory-measured", "loading"], help="tables to make"
    )
    options = parser.parse_args()
    if THRESHOLD not in os.environ:
        # Freed memory goes back to the system, so that the peak is that of what is held at once.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {THRESHOLD: "65536"})
    makers = {"cards": cards_table, "memory": large_table, "memory-measured": small_table}
    if options.loading:
        makers["loading"] = lambda: loading_table(options.loading)
    for name in options.only or makers:
        table = makers[name]()
        print(f"{table}\n")
        if options.write:
            text = options.write.read_text()
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, rest = text.split(start)
            options.write.write_text(f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
