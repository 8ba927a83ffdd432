"""Loading and saving models: safetensors only, no remote code, one clear line when a model is not to be had."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError

from simnpo_pl.models.lora import ADAPTER_CONFIG, base_of, has_adapter, load_with_adapter, save_adapter
from simnpo_pl.models.weight_files import WeightFiles, model_on_disk
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, replace, write_json

_trusted = False
_LOCAL_ROOTS = ("/", "./", "../", "~")


def trust_remote_code(trusted: bool) -> None:
    """Say whether code that comes with a model or tokenizer may be run; by default it may not.

    Args:
        trusted: Whether it may, from now on in this process.
    """
    global _trusted
    _trusted = trusted
    if trusted:
        rank_zero_warn("--trust_remote_code true: code that comes with models and tokenizers runs with all your rights")


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a model.

    Args:
        name: Hub id or folder.

    Raises:
        UserError: The tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find_model(name), trust_remote_code=_trusted)
    except UserError:
        raise
    except Exception as error:
        raise _unavailable(name, "tokenizer", error) from error


def context_length(name: str) -> int | None:
    """Longest sequence a model was made for, tokens; None where its config does not say.

    Args:
        name: Hub id or folder.

    Raises:
        UserError: The config cannot be loaded.
    """
    length = getattr(_config(name).get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def model_shapes(name: str, dtype: str = "float32") -> Any:
    """A model on the meta device, from its config alone: shapes without values.

    Args:
        name: Hub id or folder; an adapter's counts those of its base.
        dtype: Type of the weights.

    Raises:
        UserError: The config cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    config = _config(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=_trusted)
    except Exception as error:
        raise _unavailable(name, "config", error) from error


def _config(name: str) -> Any:
    """Config of a model, or of an adapter's base."""
    from transformers import AutoConfig

    try:
        found = find_model(name)
        if (Path(found) / ADAPTER_CONFIG).is_file():
            with base_of(Path(found)) as base:
                return _config(base)
        return AutoConfig.from_pretrained(found, trust_remote_code=_trusted)
    except UserError:
        raise
    except Exception as error:
        raise _unavailable(name, "config", error) from error


def load_causal_lm(
    name: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    option: str = "--model.name",
    sharded: bool = False,
    merge: bool = False,
) -> Any:
    """Causal language model, in eval mode as transformers gives it.

    An adapter is merged into its base in float32. In bfloat16 that would round its update, so it stays beside its base
    in float32, as peft loads it, unless `merge` is set.

    Args:
        name: Hub id or folder with safetensors weights, of a model or of an adapter.
        dtype: Type of the weights, `float32` or `bfloat16`.
        attn_implementation: Attention of transformers; None lets it choose.
        option: Setting that names the model, for messages.
        sharded: Whether the model is about to be sharded; its weights are read then, where its files allow it.
        merge: Whether an adapter is merged in bfloat16, too.

    Raises:
        UserError: The model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    quiet_loading()
    try:
        resolved = find_model(name, option)
        if (Path(resolved) / ADAPTER_CONFIG).is_file():
            settings = (dtype, attn_implementation, option)
            merge = merge or dtype == "float32"
            return load_with_adapter(Path(resolved), lambda base: load_causal_lm(base, *settings), merge, option)
        if sharded and (unread := _on_disk(resolved, getattr(torch, dtype), options)) is not None:
            return unread
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolved,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            low_cpu_mem_usage=True,
            trust_remote_code=_trusted,
            output_loading_info=True,
            **options,
        )
    except UserError:
        raise
    except Exception as error:
        raise _unavailable(name, "model", error, option) from error
    model, found = loaded
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        # They would be drawn at random.
        raise UserError(
            f"{option}: {name} lacks {len(missing)} of its weights, such as {missing[0]}; give a model whose weights "
            "are whole and belong to its config.json"
        )
    if unused:
        rank_zero_warn(
            f"{option}: {len(unused)} weights of {name} have no place in its architecture and are not used, such as "
            f"{unused[0]}"
        )
    return model


def _on_disk(name: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A model that is yet to be read; None where it has to be read as a whole (its files hold it in another form)."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    config = AutoConfig.from_pretrained(name, trust_remote_code=_trusted)
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files: list[Any]
    if index is None:
        files = [cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)]
    else:
        files, _ = get_checkpoint_shard_files(name, index)
    if None in files or getattr(config, "quantization_config", None) is not None:
        return None

    def build() -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=_trusted, **options)

    model = model_on_disk(build, WeightFiles(Path(file) for file in files))
    if model is None or getattr(model, "_keep_in_fp32_modules", None):
        return None
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def quiet_loading() -> None:
    """Show no progress of loading, unless the user asked transformers to talk."""
    from transformers.utils import logging as transformers_logging

    if not os.environ.get("TRANSFORMERS_VERBOSITY"):
        transformers_logging.disable_progress_bar()


def frozen_copy(model: Any) -> Any:
    """A copy of a model in eval mode that asks for no gradients."""
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()


def save_model(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, torch.Tensor] | None = None, merge: bool = True
) -> None:
    """Write a Hugging Face folder so that it is either whole or not there.

    The files go to a folder beside it, which then takes its name; an earlier folder of that name is
    kept until the new one is whole.

    Args:
        model: Model from transformers.
        tokenizer: Saved with it; None where the model reads no text.
        folder: Where the model is to stand.
        state: Weights to save in place of the model's own (gathered from several devices).
        merge: Whether an adapter is added to its base, which is read again for it, or saved alone.
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
            # Beside a config.json transformers would look for the base's weights here.
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
    """Let transformers 4 load a folder, too: it knows some settings by other names, and ignores the new ones."""
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
    """A folder as it stands, or a hub id; a missing folder is told apart from an unknown hub id.

    Args:
        name: Hub id or folder.
        option: Setting that names the model, for messages.

    Raises:
        UserError: The folder is not there or holds no model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise UserError(f"{option}: {name} holds no config.json; expected a folder written by save_pretrained")
        return str(folder)
    if name.startswith(_LOCAL_ROOTS) or name.count("/") > 1:
        raise UserError(f"{option}: folder {name} does not exist; give a folder with a model or a hub id")
    return name


def _unavailable(name: str, what: str, error: Exception, option: str = "--model.name") -> UserError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return UserError(
            f"{option}: {name} comes with code of its own, which is not run; look at it, and give --trust_remote_code "
            "true if it may run with all your rights"
        )
    if Path(name).expanduser().is_dir():
        return UserError(f"{option}: the {what} in {name} cannot be loaded ({reason[:300]})")
    return UserError(
        f"{option}: {what} {name} is neither a folder here nor to be had from the hub "
        f"({type(error).__name__}: {reason[:160]}); give {option} FOLDER and --data.path FOLDER to work "
        "without network, or run --config configs/demo.yaml, which needs none"
    )
