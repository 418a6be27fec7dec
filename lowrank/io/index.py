"""The tensors of a file or of a sharded directory under one name space, read one by one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.errors import CheckpointError, StorageError
from lowrank.io.parsing import printable, read_json
from lowrank.io.sniffing import describe_content
from lowrank.io.tensors import SafetensorsHeader, TensorEntry, read_safetensors_header, read_tensor

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "TensorSource", "open_tensors", "read_index"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_OTHERS = (".gguf", ".h5", ".onnx", ".msgpack", ".ot")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorSource:
    """Checked headers of one or more safetensors files; no file is held open.

    Attributes:
        path: the file or directory that was asked for.
        headers: one per file, in the order of their names.

    >>> TensorSource(Path("empty"), ()).names
    ()
    """

    path: Path
    headers: tuple[SafetensorsHeader, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, file by file in the order of the headers."""
        return tuple(name for header in self.headers for name in header.tensors)

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """Shape, dtype and place of every tensor."""
        return {name: entry for header in self.headers for name, entry in header.tensors.items()}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(header.tensor_bytes for header in self.headers)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together, headers included."""
        return sum(header.file_bytes for header in self.headers)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU; see :func:`lowrank.io.read_tensor`."""
        for header in self.headers:
            if name in header.tensors:
                return read_tensor(header, name)
        raise CheckpointError(f"{printable(self.path)}: no tensor {printable(name)!r}")


def open_tensors(path: str | os.PathLike[str]) -> TensorSource:
    """Check the headers of a ``.safetensors`` file, or of a directory with ``model.safetensors`` or an index of shards.

    Raises:
        CheckpointError: nothing there that can be read, a pickle file, or a damaged header or index.
        ResourceError, StorageError: as :func:`lowrank.io.read_safetensors_header`.

    >>> import tempfile
    >>> from lowrank.io import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "model.safetensors"), {"x": torch.arange(3)})
    ...     open_tensors(folder).read("x").tolist()
    [0, 1, 2]
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix in _PICKLE_SUFFIXES and path.is_file():
            found = describe_content(path) or f"pickle files can run code and are not read; {_CONVERT}"
            raise CheckpointError(f"{printable(path)}: {found}")
        return TensorSource(path, (read_safetensors_header(path),))
    if (path / WEIGHTS_NAME).exists():
        return TensorSource(path, (read_safetensors_header(path / WEIGHTS_NAME),))
    if (path / INDEX_NAME).exists():
        return read_index(path)
    try:
        pickles = sorted(name for name in os.listdir(path) if name.endswith((*_PICKLE_SUFFIXES, *_OTHERS)))
    except OSError as error:
        raise StorageError(f"{printable(path)}: cannot be listed ({error.strerror})") from error
    hint = ""
    if pickles:
        found = describe_content(path / pickles[0]) or f"a pickle, which can run code and is not read; {_CONVERT}"
        hint = f"; {printable(pickles[0])} is {found}"
    raise CheckpointError(f"{printable(path)}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}{hint}")


_CONVERT = "load it where you trust it and save it as safetensors"


def read_index(directory: str | os.PathLike[str]) -> TensorSource:
    """Check ``model.safetensors.index.json`` and every shard it names.

    Raises:
        CheckpointError: no ``metadata``, ``weight_map`` not a map of names to file names, a shard missing or outside
            the directory (``..``, absolute, through a link; links within a Hugging Face cache are allowed), a tensor in
            two shards, absent from its shard, or in no entry of the map.

    >>> import json, tempfile
    >>> from lowrank.io import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "a.safetensors"), {"x": torch.zeros(2)})
    ...     index = {"metadata": {}, "weight_map": {"x": "a.safetensors"}}
    ...     _ = Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    ...     read_index(folder).names
    ('x',)
    """
    directory = Path(directory)
    where = printable(directory / INDEX_NAME)
    index = read_json(directory / INDEX_NAME)
    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{where}: has no metadata object; the index is damaged")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{where}: weight_map must map tensor names to file names")
    shards = {shard: _shard_path(directory, shard) for shard in sorted(set(weight_map.values()))}
    headers = {shard: read_safetensors_header(path) for shard, path in shards.items()}
    owner: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in owner:
                raise CheckpointError(
                    f"{where}: tensor {printable(name)!r} is in {printable(owner[name])} and in {printable(shard)}"
                )
            owner[name] = shard
            if name not in weight_map:
                raise CheckpointError(f"{where}: does not list {printable(name)!r}, which {printable(shard)} holds")
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            raise CheckpointError(f"{where}: tensor {printable(name)!r} is not in {printable(shard)} as the index says")
    return TensorSource(directory, tuple(headers.values()))


def _shard_path(directory: Path, shard: str) -> Path:
    label = f"{printable(directory / INDEX_NAME)}: shard {printable(shard)!r}"
    if not shard or shard in (".", "..") or "\0" in shard or "/" in shard or "\\" in shard:
        raise CheckpointError(f"{label} must be the plain name of a file beside the index")
    path = directory / shard
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{label} is missing; was the download finished?")
    if not is_contained(path, directory):
        raise CheckpointError(f"{label} is a link that leads out of the directory")
    return path


def is_contained(path: Path, directory: Path) -> bool:
    """Tell whether a path, links followed, ends inside ``directory`` (or in the blobs of the Hugging Face cache it is in).

    A cache holds ``models--x/snapshots/<revision>/`` with links to ``models--x/blobs/``.
    """
    home = Path(os.path.realpath(directory))
    target = Path(os.path.realpath(path))
    allowed = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    return any(target.is_relative_to(root) for root in allowed)
