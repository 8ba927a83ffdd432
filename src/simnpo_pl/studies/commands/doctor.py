"""What is here: versions, devices, whether the hub answers, and what configs need that is not here yet."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError

NEEDED = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "jsonargparse", "tensorboard")
FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt")
HUB = "https://huggingface.co"


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "configs", nargs="*", type=Path, metavar="CONFIG", help="configs to look into; default: configs/*.yaml"
    )
    parser.add_argument("--timeout", type=float, default=3.0, help="how long to wait for the hub, seconds (default: 3)")


def run(options: Namespace) -> None:
    """Print what is here and what is missing.

    Raises:
        UserError: A config is not to be read.
    """
    for title, lines in (
        ("versions", list(_versions())),
        ("devices", list(_devices())),
        ("hub", [_hub(options.timeout)]),
        ("configs", list(_configs(options.configs or sorted(Path("configs").glob("*.yaml"))))),
    ):
        print(title)
        for line in lines or ["none found"]:
            print(f"  {line}")


def _versions() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, metadata, version

    yield f"python {sys.version.split()[0]}"
    yield f"simnpo_pl {version('simnpo_pl')}"
    for name in NEEDED:
        yield f"{name} {version(name)}"
    extras: dict[str, list[str]] = {}
    for line in metadata("simnpo_pl").get_all("Requires-Dist") or []:
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker:
            name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()
            extras.setdefault(marker.split("extra ==")[1].strip(" '\")("), []).append(name)
    for extra, names in extras.items():
        missing = []
        for name in names:
            try:
                version(name)
            except PackageNotFoundError:
                missing.append(name)
        how = f"lacks {', '.join(missing)}: pip install 'simnpo_pl[{extra}]'" if missing else "there"
        yield f"extra {extra}: {how}"


def _devices() -> Iterator[str]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield f"CPU: {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        exact = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true, no bfloat16"
        yield f"GPU {number}: {found.name}, {found.total_memory / 2**30:.0f} GiB, default precision {exact}"
    if not torch.cuda.is_available():
        yield "no GPU that torch can use"


def _hub(timeout: float) -> str:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT must be a web address, got {endpoint}")
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=timeout):
            state = "answers"
    except HTTPError as error:
        state = f"answers with {error.code}"
    except OSError as error:
        state = f"does not answer ({getattr(error, 'reason', error)}): give folders instead of hub ids"
    from huggingface_hub import get_token

    return f"{endpoint} {state}; {'a token is set' if get_token() else 'no token, needed for restricted models only'}"


def _configs(files: list[Path]) -> Iterator[str]:
    import yaml

    for file in files:
        try:
            content = yaml.safe_load(file.expanduser().read_text())
        except FileNotFoundError:
            raise UserError(f"{file} does not exist; give a config file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} is no config; expected groups such as model and data")
        needs = [f"{what} {name} ({_where(name)})" for what, name in _named(content)]
        yield f"{file}: {'; '.join(needs) or 'an overlay, or generated data: needs nothing'}"


def _named(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Models, data and logs that a config names."""
    model, data, evaluation = (content.get(group) or {} for group in ("model", "data", "eval"))
    arguments = data.get("init_args", data) if isinstance(data, dict) else {}
    for what, value in (
        ("model", model.get("name")),
        ("reference", model.get("reference")),
        *((f"data.{name}", arguments.get(name)) for name in ("path", "forget", "retain", "refusals", "holdout")),
        ("retrained model", evaluation.get("retrained")),
        ("log", evaluation.get("retain_log")),
    ):
        if isinstance(value, str):
            yield what, value


def _where(name: str) -> str:
    """Whether a folder or hub id is here."""
    if name.startswith("hf://"):
        return "file on the hub"
    if Path(name).expanduser().exists():
        return "here"
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(name).suffix in FILES:
        return "not here"
    from huggingface_hub.constants import HF_HUB_CACHE

    kinds = ("models", "datasets")
    cached = any((Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}").is_dir() for kind in kinds)
    return "in the hub's cache" if cached else "on the hub, not downloaded"
