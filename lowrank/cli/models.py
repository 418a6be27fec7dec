"""Models and batches that the command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowrank.checkpoint import MANIFEST_NAME, load_model
from lowrank.cli import data as cli_data
from lowrank.cli.shell import note
from lowrank.errors import CheckpointError
from lowrank.integrations.transformers import is_model_directory, load_pretrained, load_tokenizer
from lowrank.io import open_tensors, printable

__all__ = ["model_batches", "open_model"]


def open_model(path: Path, device: str | None, quiet: bool, *, compressed: bool = True) -> nn.Module:
    """Open the model of a directory: an original or (unless that makes no sense) a compressed one.

    Raises:
        CheckpointError: tensors without a model, or a directory that cannot be loaded.
    """
    if not quiet:
        note(f"loading {printable(path)}")
    if compressed and (path / MANIFEST_NAME).is_file():
        return load_model(path, device=device)
    _check_runnable(path)
    model: nn.Module = load_pretrained(path, tokenizer=False)[0]
    return model if device is None else model.to(device)


def _check_runnable(path: Path) -> None:
    """Refuse tensors without a model; whatever else is wrong with a path, loading says better."""
    if path.exists() and not is_model_directory(path):
        tensors = open_tensors(path)
        raise CheckpointError(
            f"{printable(path)}: {len(tensors.names)} tensors without a config.json; running the model needs a Hugging "
            "Face directory, or lowrank.compress_model(model) in Python"
        )


def model_batches(
    data: cli_data.Data | None, path: Path | None, model: nn.Module, source: Path, max_tokens: int, batch_size: int
) -> list[Any] | None:
    """Turn what was read from a data file into batches for the model; ``None`` where no file was given."""
    if data is None:
        return None
    tokenizer = load_tokenizer(source) if isinstance(data, list) else None
    return cli_data.load_batches(data, model, tokenizer, source=str(path), batch_size=batch_size, max_tokens=max_tokens)
