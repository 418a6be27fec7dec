"""Calibration and evaluation files of the command line, turned into batches for one model."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.errors import CalibrationError, CheckpointError, ResourceError
from lowrank.integrations.transformers import read_text_samples, token_limit, tokenize
from lowrank.io import open_tensors, printable

__all__ = ["Data", "load_batches", "read_data"]

Data = list[str] | dict[str, Tensor]
ARRAY_SUFFIXES = (".npz", ".safetensors")
# An archive that unpacks to more than this, a thousand times its own size, is no data set.
_SUSPICIOUS_RATIO = 1000
_SUSPICIOUS_BYTES = 100_000_000


def read_data(path: str | os.PathLike[str]) -> Data:
    """Read a data file without knowing the model: texts from ``.txt``, named arrays from ``.npz`` or ``.safetensors``.

    Raises:
        CalibrationError: another suffix, a damaged file, nothing in it, or arrays of different lengths.
        ResourceError: an archive that unpacks to a thousand times its size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder, "a.npz"), x=np.zeros((4, 3), dtype=np.float32))
        ...     {name: tuple(array.shape) for name, array in read_data(Path(folder, "a.npz")).items()}
        {'x': (4, 3)}
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return read_text_samples(path)
    if suffix not in ARRAY_SUFFIXES:
        raise CalibrationError(f"{printable(path)}: data must be a .txt, .npz or .safetensors file")
    try:
        arrays = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    except CheckpointError as error:
        if isinstance(error, CalibrationError) or error.exit_code != CheckpointError.exit_code:
            raise
        raise CalibrationError(str(error)) from error
    if not arrays:
        raise CalibrationError(f"{printable(path)}: holds no arrays")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if 0 in lengths.values() or len(set(lengths.values())) != 1:
        shown = ", ".join(f"{printable(name)} {tuple(array.shape)}" for name, array in arrays.items())
        raise CalibrationError(
            f"{printable(path)}: the first dimension of every array counts samples and must be the same; got {shown}"
        )
    return arrays


def load_batches(
    data: Data, model: nn.Module, tokenizer: Any | None, *, source: str, batch_size: int = 8, max_tokens: int = 512
) -> list[Any]:
    """Turn what :func:`read_data` read into batches for the model.

    Args:
        data: texts, or arrays named like the arguments of the model's ``forward`` (a single array may have any name); ``labels``
            beside them are left out where the forward has no such argument.
        model: reads the batches.
        tokenizer: the model's own; needed for texts.
        source: the file to name in messages.
        batch_size: samples of a batch.
        max_tokens: a longer text is cut.

    Raises:
        CalibrationError: texts without a tokenizer, or names that the model does not take.

    Example:
        >>> batches = load_batches({"x": torch.zeros(5, 3)}, nn.Linear(3, 2), None, source="a.npz", batch_size=4)
        >>> [tuple(batch.shape) for batch in batches]
        [(4, 3), (1, 3)]
    """
    where = printable(source)
    if isinstance(data, list):
        if tokenizer is None:
            raise CalibrationError(
                f"{where}: text needs a tokenizer and the model's directory has none; "
                "give an .npz file with arrays named like the model's inputs"
            )
        limit = token_limit(model, tokenizer, max_tokens)
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        try:
            return list(tokenize(tokenizer, data, limit, batch_size, vocabulary=vocabulary))
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from error
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)
    spare = set() if len(data) == 1 or "labels" in _named(model) else {"labels"}
    arrays = {name: _as_input(array, dtype) for name, array in data.items() if name not in spare}
    count = len(next(iter(arrays.values())))
    pieces = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    if _takes(model, arrays):
        return [{name: array[piece] for name, array in arrays.items()} for piece in pieces]
    if len(arrays) == 1:
        (array,) = arrays.values()
        return [array[piece] for piece in pieces]
    names = ", ".join(printable(name) for name in arrays)
    raise CalibrationError(
        f"{where}: the model does not take the arrays {names} together; it takes {_signature(model)}"
    )


def _as_input(array: Tensor, dtype: torch.dtype) -> Tensor:
    if array.is_floating_point():
        return array.to(dtype)
    return array if array.dtype == torch.bool else array.long()


def _takes(model: nn.Module, arrays: Mapping[str, Tensor]) -> bool:
    return _named(model).issuperset(arrays)


def _named(model: nn.Module) -> set[str]:
    parameters = inspect.signature(model.forward).parameters
    return {name for name, parameter in parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD}


def _signature(model: nn.Module) -> str:
    return ", ".join(inspect.signature(model.forward).parameters)


def _read_npz(path: Path) -> dict[str, Tensor]:
    where = printable(path)
    try:
        if not path.is_file():
            raise CalibrationError(f"{where}: no such file")
        packed = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO * packed):
            raise ResourceError(f"{where}: {packed} bytes unpack to {unpacked}, which no honest data set does")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"{where}: not a readable .npz file ({printable(reason)})") from error
    for name, array in found.items():
        if array.dtype.kind not in "fiub":
            raise CalibrationError(f"{where}: array {printable(name)} has dtype {array.dtype}; numbers are needed")
    return {name: torch.from_numpy(_native(array)) for name, array in found.items()}


def _native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of a dtype and byte order that torch has."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    tensors = open_tensors(path)
    return {name: tensors.read(name) for name in tensors.names}
