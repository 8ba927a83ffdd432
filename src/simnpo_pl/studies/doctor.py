"""What is installed and reachable: versions, devices, the hub, and what configs need."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import distributions, metadata, requires, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from simnpo_pl.studies.options import path
from simnpo_pl.studies.plans import read_yaml
from simnpo_pl.utils.errors import UserError

NEEDED = ("simnpo_pl", "torch", "lightning", "transformers", "torchmetrics", "datasets", "jsonargparse", "tensorboard")
FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt")


def run(options: Namespace) -> None:
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("hub", _hub(options.timeout)),
        ("configs", _configs(options.configs or sorted(Path("configs").glob("*.yaml")))),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")


def _versions() -> Iterator[str]:
    yield f"python {sys.version.split()[0]}"
    for name in NEEDED:
        yield f"{name} {version(name)}"
    needed = [Requirement(line) for line in requires("simnpo_pl") or []]
    for extra in metadata("simnpo_pl").get_all("Provides-Extra") or []:
        names = [one.name for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        missing = [name for name in names if not list(distributions(name=name))]
        lacks = f"lacks {', '.join(missing)}: pip install 'simnpo_pl[{extra}]'"
        yield f"extra {extra}: {lacks if missing else 'installed'}"


def _devices() -> Iterator[str]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield f"CPU: {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        exact = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true, no bfloat16"
        yield f"GPU {index}: {found.name}, {found.total_memory / 2**30:.0f} GiB, default precision {exact}"
    if not torch.cuda.is_available():
        yield "no GPU that torch can use"


def _hub(timeout: float) -> Iterator[str]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT must be a web address, got {endpoint}")
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=timeout):
            state = "answers"
    except HTTPError as error:
        state = f"answers with {error.code}"
    except OSError as error:
        state = f"does not answer ({getattr(error, 'reason', error)}): give folders instead of hub ids"
    yield f"{endpoint} {state}; {'a token is set' if get_token() else 'no token, needed for restricted models only'}"


def _configs(files: list[Path]) -> Iterator[str]:
    for file in files:
        needs = [f"{what} {name} ({_where(name)})" for what, name in _named(read_yaml(file))]
        yield f"{file}: {'; '.join(needs) or 'an overlay, or generated data: needs nothing'}"
    if not files:
        yield "none found"


def _named(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Models, data and logs that a config names and that the run does not make itself."""
    model, data, evaluation = (content.get(group) or {} for group in ("model", "data", "eval"))
    named = {"model": model.get("name"), "reference": model.get("reference")}
    arguments = data.get("init_args", data) if isinstance(data, dict) else {}
    named |= {f"data.{name}": arguments.get(name) for name in ("path", "forget", "retain", "refusals", "holdout")}
    named |= {"retrained model": evaluation.get("retrained"), "log": evaluation.get("retain_log")}
    own = arguments.get("path") if model.get("name") == f"{arguments.get('path')}/start" else None
    made = ("auto", own, f"{own}/start", f"{own}/retrained")
    return ((what, name) for what, name in named.items() if isinstance(name, str) and name not in made)


def _where(name: str) -> str:
    if name.startswith("hf://"):
        return "file on the hub"
    if path(name).exists():
        return "here"
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(name).suffix in FILES:
        return "not here"
    folders = [Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" for kind in ("models", "datasets")]
    return "in the hub's cache" if any(map(Path.is_dir, folders)) else "on the hub, not downloaded"
