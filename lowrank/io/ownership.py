"""What a path stands for: whether two of them are the same or lie in one another, and which directories are our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lowrank.errors import CheckpointError, LowRankError
from lowrank.io.tensors import read_safetensors_header
from lowrank.io.version import PACKAGE

__all__ = ["MARKER_NAME", "is_ours", "marker_text", "overlaps"]

# In every directory that we write and that has no manifest of another kind.
MARKER_NAME = "lowrank_directory.json"
# One of these and the directory is ours, whatever else somebody has put beside it.
_MANIFESTS = ("lowrank_config.json", MARKER_NAME)
# Names that others use too: ours only where nothing else lies there.
_FRONTIER = frozenset({"frontier.json", "frontier.md", "frontier.html", "plans"})
_TRAINING = frozenset(
    {"state.json", "state.safetensors", "history.json", "trained.safetensors", "checkpoint", "adapter_config.json"}
    | {"adapter_model.safetensors"}
)
_ADAPTER = frozenset({"adapter_config.json", "adapter_model.safetensors"})
# Deeper than this a model's directory holds nothing that is read.
_DEPTH = 3


def marker_text() -> str:
    """Give the content of the marker of a directory that has no manifest of another kind."""
    return '{"written_by": "lowrank"}\n'


def is_ours(directory: Path) -> bool:
    """Tell whether a directory is one that this package wrote: compressed or merged models, frontiers, adapters, runs.

    Example:
        >>> is_ours(Path("/usr"))
        False
    """
    names = set(os.listdir(directory))
    if any(name in names and (directory / name).is_file() for name in _MANIFESTS):
        return True
    if "frontier.json" in names and names <= _FRONTIER:
        return True
    if names <= _TRAINING and any((directory / place / "state.json").is_file() for place in (".", "checkpoint")):
        return True
    if names == _ADAPTER:
        try:
            return PACKAGE in read_safetensors_header(directory / "adapter_model.safetensors").metadata
        except LowRankError:
            return False
    return False


def overlaps(output: str | os.PathLike[str], source: str | os.PathLike[str]) -> bool:
    """Tell whether writing to one path touches the other: the same, inside it, around it, or a file of it by another name.

    Args:
        output: a file or directory, there or not yet.
        source: a file or directory that is read.

    Example:
        >>> overlaps("/tmp/model/report.json", "/tmp/model"), overlaps("/tmp/model2", "/tmp/model")
        (True, False)
    """
    one, other = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        return True
    # Names are not enough: hard links, and directories that are mounted twice.
    if _identity(other) in {_identity(path) for path in (one, *one.parents)} - {None}:
        return True
    if _identity(one) in {_identity(path) for path in (other, *other.parents)} - {None}:
        return True
    is_directory = one.is_dir()
    found = _identity(one)
    for path in _files(other, _DEPTH):
        real = Path(os.path.realpath(path))
        if (is_directory and real.is_relative_to(one)) or (found is not None and _identity(real) == found):
            return True
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _files(directory: Path, depth: int) -> Iterator[Path]:
    if not directory.is_dir():
        return
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth > 1:
                yield from _files(Path(entry.path), depth - 1)
        else:
            yield Path(entry.path)
