"""Memory of training by method: computed from a model's shapes, and measured on small models to see that it holds.

python scripts/memory.py --loading runs/smollm2/base --write docs/scale.md

Computed: weights, gradients, Adam's moments, a reference beside the policy, and what the backward pass keeps of the
layers (their code is run on tensors that have shapes but no values). Measured: the largest resident memory of a process
of its own that trains, less that before the model was loaded.
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
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LARGE: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
    "Llama-3.1-8B": {
        **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "wide": {
        **{"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4},
        **{"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False},
    },
    "large vocabulary": {
        **{"vocab_size": 65536, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
}
METHODS = {"SimNPO": ("SimNPO", "NLL"), "NPO": ("NPO", "NLL"), "NPO+KL": ("NPO", "KL")}
RANK = 16
ROWS, WIDTH = 16, 128
"""Rows in a forward pass, half of them to forget and half to retain, and tokens in each."""
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


# -- computed ------------------------------------------------------------------------------------------------


def computed(case: Case, chunk: int) -> dict[str, float]:
    """Bytes by what they are for.

    Args:
        case: What is trained.
        chunk: Logits at work at once.
    """
    weights, adapter = counts(case.config)
    trained, size = adapter if case.lora else weights, 2 if case.half_base else 4
    return {
        "weights": size * weights + (4 * adapter if case.lora else 0),
        "gradients": 4 * trained,
        "Adam": 8 * trained,
        "reference": size * weights if case.method == "NPO+KL" and not case.lora else 0,
        "layers": layer_bytes(case),
        "logits": logits_bytes(case, chunk),
    }


def counts(config: dict[str, Any]) -> tuple[int, int]:
    """Weights, and those of an adapter on every linear layer but the head."""
    import torch
    from torch import nn

    with torch.device("meta"):
        model = llama(config)
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    return sum(p.numel() for p in model.parameters()), sum(RANK * (m.in_features + m.out_features) for m in linear)


def layer_bytes(case: Case) -> float:
    """What a forward pass keeps for the backward pass, weights aside; from the code itself, on tensors without values.

    Two depths tell what a layer keeps and what stands outside of them. Of a layer that is computed again only the
    input is kept, but for the one at work.
    """
    one, two = (kept_by_layers(replace(case, method="SimNPO", checkpointing=False), depth) for depth in (1, 2))
    width = 2 if case.half_base else 4
    again = ROWS * WIDTH * case.config["hidden_size"] * width
    return one + (case.config["num_hidden_layers"] - 1) * (again if case.checkpointing else two - one)


def logits_bytes(case: Case, chunk: int) -> float:
    """What the head keeps and works on, see `simnpo_pl.head`."""
    from simnpo_pl.head import LOGITS_BUDGET

    logits = ROWS * (WIDTH - 1) * case.config["vocab_size"]
    at_work = 0
    if case.method == "NPO+KL":
        # Of the retain rows, two models' logits and log-probs, the probabilities, differences, products and a gradient.
        logits //= 2
        at_work = 8 * (logits if logits <= LOGITS_BUDGET else LOGITS_BUDGET // 4)
    kept = logits if logits <= LOGITS_BUDGET else 0
    # A chunk of logits and its gradient.
    return 4.0 * (kept + max(at_work, 2 * min(chunk, logits)))


_counted: dict[str, int] = {}


def kept_by_layers(case: Case, depth: int) -> int:
    """Bytes that a forward pass through so many layers keeps; the same case is counted once."""
    key = f"{case} {depth}"
    if key not in _counted:
        _counted[key] = _count(case, depth)
    return _counted[key]


def _count(case: Case, depth: int) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from simnpo_pl.lora import LoraOptions, add_adapter
    from simnpo_pl.packing import layout_of, packed_hidden

    # Rows that differ from their first token on.
    ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % case.config["vocab_size"]
    layout = layout_of(ids, torch.ones_like(ids))
    with torch.device("meta"):
        model = llama(case.config | {"num_hidden_layers": depth})
        model = model.to(torch.bfloat16) if case.half_base else model
        if case.lora:
            # Weights without values have no fingerprint.
            with patch("simnpo_pl.lora.base_fingerprint", return_value=""):
                add_adapter(model, LoraOptions(rank=RANK))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        made = torch.empty_like(value, device="cpu", requires_grad=False)
                        trains = value.requires_grad
                        held[name] = torch.nn.Parameter(made, trains) if held is module._parameters else made
        model.train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        tensors = {name: mode.from_tensor(getattr(layout, name)) for name in ("cells", "tokens", "positions")}
        layout = layout._replace(**tensors)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=case.autocast),
        ):
            packed_hidden(model.base_model, mode.from_tensor(ids), layout)
        return sum(storage.nbytes() for storage in kept.values())


def llama(config: dict[str, Any]) -> Any:
    """A Llama without training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=2048))


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

    from simnpo_pl.lora import LoraOptions
    from simnpo_pl.module import UnlearningModule
    from simnpo_pl.objectives import NPO, SimNPO
    from simnpo_pl.reference import REFERENCE_KEY
    from simnpo_pl.retain import KL, NLL

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    objective, retain = METHODS[case.method]
    size = ROWS // 2

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


def load(folder: str, rank: int, processes: int, port: int, by_slices: bool, found: Any) -> None:
    """Put into `found` the largest resident memory of loading a model that is shared out, and what stays; bytes."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from simnpo_pl.models import load_causal_lm
    from simnpo_pl.sharding import shard

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
    model = load_causal_lm(folder, shared_out=by_slices)
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
        "| model | trained | method | weights | gradients | Adam | reference | layers | logits | float32 | bf16-mixed "
        "| bf16-mixed, checkpointing | base in bfloat16, checkpointing |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    chunk = 2**25
    for model, config in LARGE.items():
        for lora in (False, True):
            for method in METHODS:
                case = Case(config, method, lora)
                parts = computed(case, chunk)
                mixed = replace(case, autocast=True)
                others = [mixed, replace(mixed, checkpointing=True)]
                if lora:
                    others.append(replace(case, checkpointing=True, half_base=True, autocast=True))
                totals = [sum(computed(other, chunk).values()) for other in others]
                cells = [f"{value / GB:.1f}" for value in (*parts.values(), sum(parts.values()), *totals)]
                cells += [] if lora else ["-"]
                lines.append(f"| {model} | {'adapter' if lora else 'all'} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        "| model | trained | method | computed, MB | measured, MB | measured / computed |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SMALL.items():
            llama(config).save_pretrained(Path(folder) / name)
        for name, case in small_cases():
            measured = in_a_process(str(Path(folder) / name), case)
            expected = sum(computed(case, 2**20).values())
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

    from simnpo_pl.models import load_causal_lm

    lines = ["| file, MB | weights of float32, MB | how | largest, MB | stays, MB |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as half:
        model = load_causal_lm(folder)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        model.to(torch.bfloat16).save_pretrained(half)
        for source in (folder, half):
            size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
            for how, by_slices in (("whole on each, then shared out", False), ("each its slices", True)):
                found = [" and ".join(f"{value / MB:.0f}" for value in both) for both in loaded(source, by_slices)]
                lines.append(f"| {size / MB:.0f} | {weights / MB:.0f} | {how} | {' | '.join(found)} |")
    return "\n".join(lines)


def loaded(folder: str, by_slices: bool) -> Any:
    """Largest memory of both processes, and what stays of it."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queues = [context.Queue() for _ in range(2)]
    children = [context.Process(target=load, args=(folder, r, 2, port, by_slices, queues[r])) for r in range(2)]
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
    parser.add_argument("--only", nargs="+", choices=["memory", "memory-measured", "loading"], help="tables to make")
    options = parser.parse_args()
    if THRESHOLD not in os.environ:
        # Freed memory goes back to the system, so that the peak is that of what is held at once.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {THRESHOLD: "65536"})
    makers = {"memory": large_table, "memory-measured": small_table}
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
