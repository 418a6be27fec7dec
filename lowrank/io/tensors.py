"""safetensors in and out, without trusting the file: headers and indexes are checked in full before a byte is used.

The format: 8 bytes (little-endian length of the header), the header as JSON, then the payload
(https://github.com/huggingface/safetensors#format). The library accepts duplicate names and shapes such as
``[2^60, 0]``, maps the file (so that one cut short kills the process) and writes mode 0600:
hence a reader and a writer of our own.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lowrank.errors import CheckpointError, ResourceError, StorageError
from lowrank.io.parsing import open_regular, parse_json, printable, require_int
from lowrank.io.sniffing import describe_content

__all__ = ["SafetensorsHeader", "TensorEntry", "read_safetensors_header", "read_tensor", "write_safetensors"]

_FORMAT_HEADER_BYTES = 100_000_000  # the format's own limit
# Past these a reader would spend seconds and gigabytes on names alone; DeepSeek-V3 in one file has 90,000 tensors.
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 200_000
_MAX_DIMENSION_PRODUCT = 1 << 48
_MAX_DIMENSIONS = 64
_CHUNK_BYTES = 64 << 20

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_DTYPE_BITS = {name: dtype.itemsize * 8 for name, dtype in _TORCH_DTYPES.items()} | {
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: ``dtype`` as the file spells it, ``shape``, and ``[start, end)`` within the payload.

    >>> TensorEntry("F32", (2, 3), 0, 24).nbytes
    24
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the payload that the tensor takes."""
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in torch, or ``None`` where torch (or this package) has none: such a tensor can only be copied."""
        return _TORCH_DTYPES.get(self.dtype)


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header: ``tensors`` in the order of the file, ``metadata``, and where the payload starts.

    >>> SafetensorsHeader(Path("a"), {"x": TensorEntry("F32", (2,), 0, 8)}, {}, 64, 72).tensor_bytes
    8
    """

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together."""
        return self.file_bytes - self.data_start


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; of the payload only the length is looked at.

    Raises:
        CheckpointError: not a regular file, empty, a Git LFS pointer, a length that cannot be, a truncated payload or
            trailing bytes, duplicate names, offsets with holes or overlaps, sizes that contradict shape and dtype.
        ResourceError: a header of more than 200,000 tensors or 32 MiB.
        StorageError: reading failed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "a.safetensors"), {"x": torch.zeros(2, 3)})
    ...     read_safetensors_header(Path(folder, "a.safetensors")).tensors["x"].shape
    (2, 3)
    """
    where = printable(path)
    try:
        with open(open_regular(path), "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            _check_prefix(prefix, path, where)
            length = int.from_bytes(prefix, "little")
            if length > _FORMAT_HEADER_BYTES or length > file_bytes - 8:
                raise CheckpointError(
                    f"{where}: the header claims {length} bytes, but the file has {file_bytes} and the format allows "
                    f"{_FORMAT_HEADER_BYTES}; it is damaged or not a safetensors file"
                )
            if length > _MAX_HEADER_BYTES:
                raise ResourceError(f"{where}: a header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
            raw = file.read(length)
    except OSError as error:
        raise StorageError(f"{where}: reading failed ({error.strerror})") from error
    if len(raw) < length:
        raise StorageError(f"{where}: the file became shorter while it was read")
    if raw[:1] != b"{":
        raise CheckpointError(f"{where}: the header is not a JSON object; damaged, or not a safetensors file")
    if raw.count(b'"data_offsets"') > _MAX_TENSORS:
        raise ResourceError(f"{where}: a header of more than {_MAX_TENSORS} tensors; split the file into shards")
    document = parse_json(raw, source=path)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map names to text")
    tensors = {name: _entry(name, fields, where) for name, fields in document.items()}
    payload_bytes = file_bytes - 8 - length
    _check_layout(tensors, payload_bytes, where)
    return SafetensorsHeader(Path(path), tensors, metadata, 8 + length, file_bytes)


def _check_prefix(prefix: bytes, path: str | os.PathLike[str], where: str) -> None:
    if not prefix:
        raise CheckpointError(f"{where}: the file is empty")
    other = describe_content(path)
    if other is not None:
        raise CheckpointError(f"{where}: {other}")
    if len(prefix) < 8:
        raise CheckpointError(f"{where}: {len(prefix)} bytes; a safetensors file has at least 8")


def _entry(name: str, fields: object, where: str) -> TensorEntry:
    label = f"{where}: tensor {printable(name)!r}"
    if not name or "\0" in name:
        raise CheckpointError(f"{label}: a tensor name must not be empty or hold NUL")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{label}: dtype must be text; got {printable(repr(dtype)[:60])}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{label}: shape must be a list of at most {_MAX_DIMENSIONS} sizes")
    sizes = tuple(require_int(size, f"{label}: a size in shape", 0) for size in shape)
    product = 1
    for size in sizes:
        # Zero counts as one here: [2^60, 0] holds nothing and still overflows whoever multiplies.
        product *= max(size, 1)
        if product > _MAX_DIMENSION_PRODUCT:
            raise CheckpointError(f"{label}: shape {printable(list(sizes))} is larger than any memory")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise CheckpointError(f"{label}: data_offsets must be [start, end]")
    start, end = (require_int(offset, f"{label}: data_offsets", 0) for offset in offsets)
    bits = _DTYPE_BITS.get(dtype)
    if end < start or (bits is not None and (end - start) * 8 != math.prod(sizes) * bits):
        raise CheckpointError(
            f"{label}: {end - start} bytes do not fit shape {list(sizes)} of dtype {printable(dtype)}"
        )
    return TensorEntry(dtype, sizes, start, end)


def _check_layout(tensors: Mapping[str, TensorEntry], payload_bytes: int, where: str) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            fault = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(f"{where}: tensor {printable(name)!r} at byte {entry.start} {fault}")
        position = entry.end
    if position != payload_bytes:
        fault = "cut short" if position > payload_bytes else "followed by bytes that belong to no tensor"
        raise CheckpointError(f"{where}: the tensors need {position} bytes, the file holds {payload_bytes}: {fault}")


def read_tensor(header: SafetensorsHeader, name: str) -> torch.Tensor:
    """Read one tensor into new memory on the CPU, bit for bit.

    Raises:
        CheckpointError: no tensor of that name, or its dtype has no counterpart in torch.
        StorageError: reading failed, or the file has changed since its header was read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "a.safetensors"), {"x": torch.arange(3)})
    ...     read_tensor(read_safetensors_header(Path(folder, "a.safetensors")), "x")
    tensor([0, 1, 2])
    """
    _require_little_endian()
    where = f"{printable(header.path)}: tensor {printable(name)!r}"
    entry = header.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"{where} is not in the file")
    dtype = entry.torch_dtype
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {printable(entry.dtype)}, which torch cannot hold")
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with open(open_regular(header.path), "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != header.file_bytes:
                raise StorageError(f"{where}: the file changed its length while it was read")
            file.seek(header.data_start + entry.start)
            done = 0
            while done < entry.nbytes:
                count = file.readinto(view[done : done + _CHUNK_BYTES])
                if not count:
                    raise StorageError(f"{where}: the file became shorter while it was read")
                done += count
    except OSError as error:
        raise StorageError(f"{where}: reading failed ({error.strerror})") from error
    if dtype is torch.bool and entry.nbytes and int(buffer.max()) > 1:
        raise CheckpointError(f"{where}: a BOOL byte must be 0 or 1")
    return buffer.view(dtype).reshape(entry.shape) if entry.nbytes else torch.empty(entry.shape, dtype=dtype)


def dtype_name(dtype: torch.dtype) -> str | None:
    """Give the name of a torch dtype in a safetensors header, or ``None`` where the format has none."""
    return _DTYPE_NAMES.get(dtype)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a new file, synced to disk; the mode follows the umask.

    The widest elements come first and names in order within a width, as the library does, so that every tensor is
    aligned to its element and the same tensors give the same bytes.

    Args:
        path: the file; it must not exist.
        tensors: dense tensors on any device, of a dtype the format knows.
        metadata: text for ``__metadata__``; ``{"format": "pt"}`` unless given.

    Raises:
        CheckpointError: a dtype that safetensors cannot hold.
        OSError: writing failed (the caller knows what was being saved, and says so).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "a.safetensors"), {"x": torch.zeros(2)})
    ...     Path(folder, "a.safetensors").stat().st_size % 8
    0
    """
    _require_little_endian()
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name in ordered:
        tensor = tensors[name]
        spelled = dtype_name(tensor.dtype)
        if spelled is None:
            raise CheckpointError(f"tensor {printable(name)!r}: safetensors cannot hold dtype {tensor.dtype}")
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": spelled, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in ordered:
            _write_payload(file, tensors[name])
        file.flush()
        os.fsync(file.fileno())


def _write_payload(file: BinaryIO, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        return
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    view = dense.view(torch.uint8).numpy().data
    for start in range(0, len(view), _CHUNK_BYTES):
        file.write(view[start : start + _CHUNK_BYTES])


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise StorageError("safetensors files are little-endian; this machine is not")
