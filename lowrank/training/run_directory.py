"""A training run on disk: its state to go on from, and in the end the best adapter alone. No pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, UsageError
from lowrank.io import (
    atomic_directory,
    check_destination,
    open_tensors,
    parse_json,
    printable,
    read_bounded,
    write_safetensors,
    write_text,
)
from lowrank.io.version import __version__
from lowrank.lora.files import TENSORS_NAME as ADAPTER_NAME

__all__ = ["HISTORY_NAME", "RunDirectory", "model_fingerprint"]

HISTORY_NAME = "history.json"
STATE_NAME = "state.json"
TENSORS_NAME = "state.safetensors"
TRAINED_NAME = "trained.safetensors"
_MAX_JSON_BYTES = 256 << 20


def model_fingerprint(model: nn.Module, changing: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of the names and shapes of a model's tensors, and of the values of those that training leaves alone."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor!r}".encode())
            continue
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if name not in changing:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RunDirectory:
    """Where a run leaves its state (``<directory>/checkpoint``) and its outcome.

    Args:
        directory: its parent must exist.
        facts: what a run must share with the one it goes on from: options, and fingerprints of model and data.
        resume: go on from the state that is there, if any.
        overwrite: replace what is there.

    Raises:
        UsageError: the directory is not empty, and neither ``resume`` nor ``overwrite`` is on.
        CheckpointError: the state there is of another run; says what differs.
        StorageError: it cannot be written.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.directory = check_destination(directory, overwrite or resume)
        self.facts: dict[str, Any] = json.loads(json.dumps({"version": __version__, **facts}))
        self.found: dict[str, Any] | None = None
        state = self.directory / "checkpoint"
        if resume and (state / STATE_NAME).is_file():
            self.found = self._read(state / STATE_NAME)
        elif resume and (self.directory / STATE_NAME).is_file():
            self.found = self._read(self.directory / STATE_NAME)
        elif resume and self.directory.is_dir() and any(self.directory.iterdir()):
            raise UsageError(
                f"output {printable(directory)}: holds no training state to resume; overwrite=True (--overwrite) starts anew"
            )
        self._stale = state if overwrite and self.found is None else None

    @property
    def finished(self) -> bool:
        """Whether the run that is found there has come to its end."""
        return self.found is not None and bool(self.found["finished"])

    @property
    def adapter_file(self) -> Path | None:
        """Of a finished run that trained one adapter and nothing else."""
        return None if (self.directory / TRAINED_NAME).exists() else self.directory / ADAPTER_NAME

    def start(self) -> None:
        """Drop what another run left to go on from; once this run holds the directory."""
        if self._stale is not None and self._stale.is_dir():
            shutil.rmtree(self._stale)

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors of the state (or of the outcome, where it is finished and holds more than an adapter)."""
        at = self.directory / TRAINED_NAME if self.finished else self.directory / "checkpoint" / TENSORS_NAME
        source = open_tensors(at)
        return {name: source.read(name) for name in source.names}

    def save_state(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state, in one step."""
        self.directory.mkdir(exist_ok=True)
        with atomic_directory(self.directory / "checkpoint", overwrite=True) as partial:
            write_safetensors(partial / TENSORS_NAME, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
            write_text(partial / STATE_NAME, _dump({"facts": self.facts, "finished": False, "progress": progress}))

    def save_outcome(self, history: str, tensors: Mapping[str, Tensor], adapter: Path | None) -> None:
        """Write the whole directory anew: the adapter's files, the trained tensors, or both, and the history."""
        with atomic_directory(self.directory, overwrite=True) as partial:
            if tensors:
                trained = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
                write_safetensors(partial / TRAINED_NAME, trained)
            if adapter is not None:
                for path in adapter.iterdir():
                    shutil.copyfile(path, partial / path.name)
            write_text(partial / HISTORY_NAME, history)
            write_text(partial / STATE_NAME, _dump({"facts": self.facts, "finished": True, "progress": {}}))

    def _read(self, path: Path) -> dict[str, Any]:
        found = parse_json(read_bounded(path, _MAX_JSON_BYTES), source=path)
        where = printable(path)
        keys = ("facts", "finished", "progress")
        if not isinstance(found, dict) or not all(key in found for key in keys) or not isinstance(found["facts"], dict):
            raise CheckpointError(f"{where}: is no training state; overwrite=True (--overwrite) starts anew")
        theirs = found["facts"]
        different = [key for key in {**theirs, **self.facts} if theirs.get(key) != self.facts.get(key)]
        if different:
            key = different[0]
            raise CheckpointError(
                f"{where}: was written by a run with another {key} ({_short(theirs.get(key))}, now {_short(self.facts.get(key))}); "
                "resume with the same arguments, model and data, or start anew with overwrite=True (--overwrite)"
            )
        return found


def _short(value: object) -> str:
    return printable(str(value))[:16]


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
