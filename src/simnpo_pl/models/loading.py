"""Loading and saving models: safetensors only, no remote code, one clear line when a model cannot be loaded."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError

from simnpo_pl.models.lora import ADAPTER_CONFIG, base_of, has_adapter, load_with_adapter, save_adapter
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, replace, write_json

_trusted = False


def trust_remote_code(trusted: bool) -> None:
    """Set whether this process may run code that comes with a model or tokenizer; by default it may not."""
    global _trusted
    _trusted = trusted
    if trusted:
        rank_zero_warn("--trust_remote_code true: code that comes with models and tokenizers runs with all your rights")


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a model, a hub id or folder; raises UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    with _one_line(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(find_model(name), trust_remote_code=_trusted)


def context_length(name: str) -> int | None:
    """Longest sequence that a model supports, tokens; None where its config does not say."""
    length = getattr(load_config(name).get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def model_shapes(name: str, dtype: str = "float32") -> Any:
    """A model, or an adapter's base, on the meta device, from its config only."""
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with _one_line(name, "config"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=_trusted)


def load_config(name: str, option: str = "--model.name") -> Any:
    """Config of a model, or of an adapter's base; raises UserError, which names the option, where it cannot be."""
    from transformers import AutoConfig

    with _one_line(name, "config", option):
        found = find_model(name, option)
        if (Path(found) / ADAPTER_CONFIG).is_file():
            with base_of(Path(found)) as base:
                return load_config(base, option)
        return AutoConfig.from_pretrained(found, trust_remote_code=_trusted)


def load_causal_lm(
    name: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    option: str = "--model.name",
    sharded: bool = False,
    merge: bool = False,
) -> Any:
    """Causal language model, in eval mode as transformers gives it.

    An adapter is merged into its base in float32. In bfloat16 that would round its update, so it stays next to its base
    in float32, as peft loads it, unless `merge` is set.

    Args:
        name: Hub id or folder with safetensors weights, of a model or of an adapter.
        dtype: Type of the weights, `float32` or `bfloat16`.
        attn_implementation: Attention of transformers; None lets it choose.
        option: Setting that names the model, for messages.
        sharded: Whether the model will be sharded: then only the first process reads the weights, on all others the
            model is on the meta device, see `simnpo_pl.models.sharding.shard`.
        merge: Whether an adapter is merged in bfloat16, too.
    """
    from transformers import AutoModelForCausalLM

    on_meta = sharded and torch.distributed.get_rank() > 0
    quiet_loading()
    with _one_line(name, "model", option):
        resolved = find_model(name, option)
        if (Path(resolved) / ADAPTER_CONFIG).is_file():
            load_base = partial(load_causal_lm, dtype=dtype, attn_implementation=attn_implementation, option=option)
            model = load_with_adapter(Path(resolved), load_base, merge or dtype == "float32", option)
            if on_meta:
                model.to("meta").tie_weights()
            return model
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolved,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            device_map="meta" if on_meta else None,
            use_safetensors=True,
            trust_remote_code=_trusted,
            output_loading_info=True,
        )
    model, found = loaded
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        # They would be drawn at random.
        raise UserError(
            f"{option}: {name} lacks {len(missing)} of its weights, such as {missing[0]}; give a model whose weights "
            "are complete and belong to its config.json"
        )
    if unused:
        rank_zero_warn(
            f"{option}: {len(unused)} weights of {name} are not part of its architecture and are not used, such as "
            f"{unused[0]}"
        )
    return model


def quiet_loading() -> None:
    """Hide transformers' progress bars, unless the user set TRANSFORMERS_VERBOSITY."""
    from transformers.utils import logging as transformers_logging

    if not os.environ.get("TRANSFORMERS_VERBOSITY"):
        transformers_logging.disable_progress_bar()


def save_model(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, torch.Tensor] | None = None, merge: bool = True
) -> None:
    """Write a Hugging Face folder; one of the same name is replaced once the new one is complete.

    `state` replaces the model's own weights (gathered from several devices). An adapter is merged into its base, which
    is loaded again for this; without `merge` only the adapter is saved.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if has_adapter(model) and merge:
            save_adapter(model, fresh / "adapter", state)
            merged = load_causal_lm(str(fresh / "adapter"), str(model.dtype).removeprefix("torch."), merge=True)
            shutil.rmtree(fresh / "adapter")
            merged.save_pretrained(fresh)
        elif has_adapter(model):
            # Next to a config.json transformers would look for the base's weights here.
            save_adapter(model, fresh, state)
            model.generation_config.save_pretrained(fresh)
        else:
            model.save_pretrained(fresh, state_dict=state)
        if tokenizer is not None:
            # Transformers 4 reads a chat template here only.
            tokenizer.save_pretrained(fresh, save_jinja_files=False)
        _add_transformers_4_names(fresh)
        replace(fresh, folder)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _add_transformers_4_names(folder: Path) -> None:
    """Let transformers 4 load a folder, too: it has other names for some settings, and ignores the new ones."""
    file = folder / "config.json"
    if file.is_file():
        config = read_json(file)
        rope = config.get("rope_parameters") or {}
        # Settings by type of layer have no name in transformers 4.
        if "rope_theta" in rope:
            own = ("rope_theta", "partial_rotary_factor")
            config |= {name: rope[name] for name in own if name in rope}
            if config["model_type"] == "gpt_neox":
                config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
            if rope.get("rope_type", "default") != "default":
                config["rope_scaling"] = {name: value for name, value in rope.items() if name not in own}
        write_json(file, config | {"torch_dtype": config.get("dtype")})
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = read_json(file)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        write_json(file, config)


def find_model(name: str, option: str = "--model.name") -> str:
    """The path of a folder, or a hub id.

    Raises:
        UserError: The folder does not exist or contains no model; the message names `option`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise UserError(f"{option}: {name} contains no config.json; expected a folder written by save_pretrained")
        return str(folder)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"{option}: folder {name} does not exist; give a folder with a model or a hub id")
    return name


@contextmanager
def _one_line(name: str, what: str, option: str = "--model.name") -> Iterator[None]:
    """Turns any error inside into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            message = (
                f"{name} comes with its own code, which is not run; read it, and give --trust_remote_code true if it "
                "may run with all your rights"
            )
        elif Path(name).expanduser().is_dir():
            message = f"the {what} in {name} cannot be loaded ({reason[:300]}); expected the files of save_pretrained"
        else:
            message = (
                f"{what} {name} is no folder here and cannot be loaded from the hub ({type(error).__name__}: "
                f"{reason[:160]}); give {option} FOLDER and --data.path FOLDER to work without network, or run "
                "--config configs/demo.yaml, which needs none"
            )
        raise UserError(f"{option}: {message}") from error
