"""Calibration and evaluation files of the command line, turned into batches for one model."""

from __future__ import annotations

import errno
import inspect
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError as tokenize_error
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.errors import CalibrationError, CheckpointError, ResourceError, StorageError
from lowrank.integrations.transformers import read_text_samples, token_limit, tokenize
from lowrank.io import open_tensors, printable
from lowrank.io.parsing import open_regular
from lowrank.io.sniffing import describe_content

__all__ = ["Data", "load_batches", "read_data"]

Data = list[str] | dict[str, Tensor]
ARRAY_SUFFIXES = (".npz", ".safetensors")
# An archive that unpacks to more than this, a thousand times its own size, is no data set.
_SUSPICIOUS_RATIO = 1000
_SUSPICIOUS_BYTES = 100_000_000
# What the readers of zip archives and of arrays make of damaged ones: encrypted members and unknown methods are RuntimeError
# and NotImplementedError, a broken stream zlib.error or lzma.LZMAError, a header that is no Python literal SyntaxError,
# numbers in it OverflowError or MemoryError.
_DAMAGE = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, ValueError, EOFError, OSError, KeyError, TypeError,
    IndexError, RuntimeError, SyntaxError, OverflowError, MemoryError, struct.error, tokenize_error,
)  # fmt: skip


def read_data(path: str | os.PathLike[str]) -> Data:
    """Read a data file without knowing the model: texts from ``.txt``, named arrays from ``.npz`` or ``.safetensors``.

    Raises:
        CalibrationError: another suffix, a damaged file, nothing in it, or arrays of different lengths.
        StorageError: reading failed, or the file became shorter meanwhile.
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
        found = describe_content(path) if path.exists() else "no such file"
        shown = "" if found is None else f"; this is {found}" if path.exists() else f"; {found}"
        raise CalibrationError(f"{printable(path)}: data must be a .txt, .npz or .safetensors file{shown}")
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
    where, packed = printable(path), 0
    try:
        with open(open_regular(path), "rb") as file:
            packed = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                unpacked = sum(member.file_size for member in members)
                if unpacked > max(_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO * packed):
                    raise ResourceError(f"{where}: {packed} bytes unpack to {unpacked}, which no honest data set does")
                found = {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
            if os.fstat(file.fileno()).st_size < packed:
                raise StorageError(f"{where}: the file became shorter while it was read")
    except _DAMAGE as error:
        if path.is_file() and path.stat().st_size < packed:
            raise StorageError(f"{where}: the file became shorter while it was read") from error
        # A damaged archive asks for places before the beginning (EINVAL); everything else is the system's own failure.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise StorageError(f"{where}: reading failed ({error.strerror})") from error
        raise CalibrationError(f"{where}: not a readable .npz file ({printable(_first_line(error))})") from error
    if len(found) != len(members):
        raise CalibrationError(f"{where}: holds two arrays of one name")
    for name, array in found.items():
        if array.dtype.kind not in "fiub":
            raise CalibrationError(f"{where}: array {printable(name)} has dtype {array.dtype}; numbers are needed")
    return {name: torch.from_numpy(_native(array)) for name, array in found.items()}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """One array, whose header is believed only as far as there are bytes for it."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        wanted = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or wanted > member.file_size or max(shape, default=0) >= 1 << 48:
            raise ValueError(f"an array of shape {shape} needs {wanted} bytes; there are {member.file_size}")
        if dtype.hasobject:
            raise ValueError("an array of Python objects, which only a pickle can hold, is not read")
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


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
