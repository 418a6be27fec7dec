"""Data files that commands are given one by one or by group, as in ``--validation news=a.txt --validation captions=b.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.calibration.groups import check_group_name
from lowrank.cli import data as cli_data
from lowrank.cli.models import model_batches
from lowrank.cli.paths import DataFile
from lowrank.errors import CalibrationError, UsageError
from lowrank.io import printable

__all__ = ["Samples", "check_files", "read_files"]


def check_files(option: str, files: Sequence[DataFile]) -> None:
    """Refuse files that cannot be told apart, before any is read.

    Args:
        option: by which they were given.

    Raises:
        UsageError: a name twice, files with and without one, several without one, a name that is none.

    Example:
        >>> check_files("--validation", [DataFile("news", Path("a.txt")), DataFile("captions", Path("b.txt"))])
    """
    plain = [file for file in files if not file.group]
    if plain and len(files) > 1:
        shown = " and ".join(printable(file.path) for file in files[:2])
        raise UsageError(
            f"{option}: given {len(files)} times ({shown}): put all samples into one file, or give each file's group a name, "
            f"{option} NAME=FILE, to have the budget hold in each"
        )
    seen: dict[str, DataFile] = {}
    for file in files:
        if file.group:
            try:
                check_group_name(file.group, option)
            except CalibrationError as error:
                raise UsageError(str(error)) from error
        other = seen.setdefault(file.group, file)
        if other is not file:
            raise UsageError(
                f"{option}: group {file.group!r} is given twice ({printable(other.path)} and {printable(file.path)}); give the second "
                "another name, or put its samples into the first file"
            )


@dataclass(frozen=True)
class Samples:
    """What was read of a command's data files, without knowing the model.

    Attributes:
        files: each with what it holds; by group, or one under "".
    """

    files: dict[str, tuple[Path, cli_data.Data]]

    @property
    def grouped(self) -> bool:
        """Whether the samples are in groups."""
        return bool(self.files) and "" not in self.files

    def by_group(self, model: nn.Module, source: Path, max_tokens: int, batch_size: int) -> dict[str, list[Any]]:
        """Give the batches for a model of each group; under "" where there are none."""
        return {
            group: model_batches(data, path, model, source, max_tokens, batch_size) or []
            for group, (path, data) in self.files.items()
        }

    def batches(self, model: nn.Module, source: Path, max_tokens: int, batch_size: int) -> Any:
        """Give what ``compress_model`` takes: batches, ``{group: batches}``, or ``None`` where no file was given."""
        found = self.by_group(model, source, max_tokens, batch_size)
        return found if self.grouped else found.get("")


def read_files(files: Sequence[DataFile]) -> Samples:
    """Read the files of an option that :func:`check_files` let through.

    Raises:
        CalibrationError, StorageError, ResourceError: as :func:`lowrank.cli.data.read_data`.
    """
    return Samples({file.group: (file.path, cli_data.read_data(file.path)) for file in files})
