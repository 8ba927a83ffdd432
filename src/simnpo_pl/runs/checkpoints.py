"""Training state on disk: written whole or not at all, read without running code."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name and renames it; an earlier one stays until the new one is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save training state to a file."""
        with writing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load training state; tensors and plain values only.

        Raises:
            UserError: The file is not a whole checkpoint, or its content not that of its checksums.
        """
        try:
            # PyTorch writes checksums but does not look at them.
            with ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise BadZipFile
            return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UserError(
                f"--ckpt_path {path} is damaged or no checkpoint of ours; start anew or from another"
            ) from error
