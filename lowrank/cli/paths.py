"""Paths that commands are given: what is read, what is written, and that the two never meet.

Every path of a command is declared with one of the types below. That is all a new command needs: :class:`Command` compares
all that it writes with all that it reads before it runs.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lowrank.cli.shell import STANDARD_OUTPUT
from lowrank.errors import UsageError
from lowrank.io import printable
from lowrank.io.ownership import overlaps

__all__ = [
    "DATA",
    "INPUT",
    "OUTPUT_DIRECTORY",
    "OUTPUT_FILE",
    "Command",
    "DataFile",
    "DataPath",
    "InputPath",
    "OutputPath",
    "refuse_overlaps",
]


class InputPath(click.Path):
    """A file or directory that is read and stays as it is."""


@dataclass(frozen=True)
class DataFile:
    """A data file that a command is given, and the group that its samples are.

    Attributes:
        group: "" where it was given without a name.
    """

    group: str
    path: Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)


class DataPath(InputPath):
    """A data file, as ``FILE`` or, where its samples are a group by themselves, as ``NAME=FILE``.

    Example:
        >>> DataPath(path_type=Path).convert("news=texts/a=b.txt", None, None)
        DataFile(group='news', path=PosixPath('texts/a=b.txt'))
        >>> DataPath(path_type=Path).convert("./a=b.txt", None, None).group
        ''
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Take the name off; a path with a slash before its first "=" has none."""
        text = os.fspath(value)
        name, equals, rest = text.partition("=")
        if not equals or os.sep in name:
            return DataFile("", Path(os.fsdecode(super().convert(text, param, ctx))))
        if not name.strip() or not rest:
            self.fail(
                f"{printable(text)}: a group of samples is given as NAME=FILE, such as news=news.txt; a file whose own name has a '=' is "
                f"given as .{os.sep}{printable(text)}",
                param,
                ctx,
            )
        return DataFile(name.strip(), Path(os.fsdecode(super().convert(rest, param, ctx))))


class OutputPath(click.Path):
    """A file or directory that is written; a file named ``-`` is standard output."""


INPUT = InputPath(path_type=Path)
DATA = DataPath(path_type=Path)
OUTPUT_FILE = OutputPath(path_type=Path)
OUTPUT_DIRECTORY = OutputPath(path_type=Path)


class Command(click.Command):
    """A command that does not run where it would write to what it reads."""

    def invoke(self, ctx: click.Context) -> Any:
        """Check the paths, then run."""
        refuse_overlaps(list(_given(self, ctx, InputPath)), list(_given(self, ctx, OutputPath)))
        return super().invoke(ctx)


def _given(command: click.Command, ctx: click.Context, kind: type[click.Path]) -> Iterator[tuple[str, Path]]:
    """Names (as the user gives them) and values of all parameters of a kind."""
    for parameter in command.params:
        value = ctx.params.get(parameter.name or "")
        if not isinstance(parameter.type, kind) or value is None:
            continue
        name = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name
        for path in value if isinstance(value, tuple) else (value,):
            yield name, Path(path)


def refuse_overlaps(inputs: list[tuple[str, Path]], outputs: list[tuple[str, Path]]) -> None:
    """Refuse outputs that are, hold or lie inside an input or another output, by whatever name they go.

    Args:
        inputs: name of the option and path of what is read.
        outputs: the same of what is written; ``-`` and devices are passed over.

    Raises:
        UsageError: names the two options and what to do.

    Example:
        >>> refuse_overlaps([("SOURCE", Path("model"))], [("--json", Path("report.json"))])
    """
    written = [(name, path) for name, path in outputs if path != STANDARD_OUTPUT and not _is_device(path)]
    for name, path in written:
        for other, source in inputs:
            if overlaps(path, source):
                raise UsageError(
                    f"{name} {printable(path)} and input {other} {printable(source)} are the same or lie in one another; "
                    "write somewhere else"
                )
    for index, (name, path) in enumerate(written):
        for other, second in written[:index]:
            if overlaps(path, second):
                raise UsageError(
                    f"{name} {printable(path)} and {other} {printable(second)} are the same or lie in one another; "
                    "give each a path of its own"
                )
    for stream, descriptor in (("standard output", 1), ("standard error", 2)):
        redirected = _file_behind(descriptor)
        for other, source in inputs:
            if redirected is not None and overlaps(redirected, source):
                raise UsageError(f"{stream} goes into input {other} {printable(source)}; redirect it somewhere else")


def _is_device(path: Path) -> bool:
    """Whether a path is there and is neither a file nor a directory: it keeps nothing that could be lost."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _file_behind(descriptor: int) -> Path | None:
    """The regular file that a standard stream was redirected to, where the system tells."""
    name = Path(f"/proc/self/fd/{descriptor}")
    try:
        if sys.platform != "linux" or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        target = Path(os.readlink(name))
    except OSError:
        return None
    return target if target.exists() else None
