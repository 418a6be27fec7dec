"""Numbers, names and tables as text: what every report on the terminal and in Markdown is made of."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from lowrank.errors import StorageError
from lowrank.io.numbers import MISSING, percent

__all__ = [
    "MISSING",
    "Column",
    "beside",
    "count_text",
    "counted",
    "human_bytes",
    "markdown_name",
    "markdown_table",
    "one_line",
    "percent",
    "plain",
    "rounded_up",
    "shorten",
    "shown_name",
    "stable_json",
    "terminal_table",
    "wrap",
    "write_files",
]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: heading.
        numeric: right-aligned.
        keep: the end of a text that survives shortening, ``"right"`` for dotted names; ``None`` is never shortened.
        least: characters below which a text is not shortened before other columns are left out.
        drop: order in which columns are left out of a narrow terminal, 1 first; 0 stays.
    """

    title: str
    numeric: bool = False
    keep: str | None = None
    least: int = 14
    drop: int = 0


def human_bytes(size: float | None) -> str:
    """Write bytes in decimal units, three digits.

    Example:
        >>> human_bytes(90_868_376), human_bytes(512), human_bytes(999_950)
        ('90.9 MB', '512 B', '1.00 MB')
    """
    if size is None or not math.isfinite(size):
        return MISSING
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        text = _three_digits(size)
        if abs(float(text)) < 1000:
            return f"{text} {unit}"
    return f"{size:,.0f} TB"


def one_line(text: str) -> str:
    """Escape everything in a text that a terminal would act on (control characters, line ends, lone surrogates).

    Example:
        >>> one_line("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def count_text(number: int | float | None) -> str:
    """Write a number with thousands separators; one decimal where it is not whole.

    Example:
        >>> count_text(30522), count_text(12.34), count_text(None)
        ('30,522', '12.3', '-')
    """
    if number is None or (isinstance(number, float) and not math.isfinite(number)):
        return MISSING
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def counted(number: int, thing: str) -> str:
    """Write a number of things, which agree with it.

    Example:
        >>> counted(1, "layer"), counted(2400, "layer")
        ('1 layer', '2,400 layers')
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def beside(value: float, limit: float) -> str:
    """Write a number with the digits that tell on which side of a limit it is, four at least.

    Example:
        >>> beside(0.03217, 0.1), beside(0.1000004, 0.1), beside(0.1, 0.1)
        ('0.03217', '0.1000004', '0.1')
    """
    for digits in range(4, 17):
        text = f"{value:.{digits}g}"
        if value == limit or ((float(text) > limit) == (value > limit) and float(text) != limit):
            return text
    return repr(value)


def rounded_up(value: float, digits: int = 3) -> str:
    """Write a number that is no smaller than the value: a budget that is raised to it holds.

    Example:
        >>> rounded_up(0.10004), rounded_up(0.25), rounded_up(0.0)
        ('0.101', '0.25', '0')
    """
    if value <= 0.0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(value)) - digits + 1
    text = f"{value:.{digits}g}"
    return text if float(text) >= value else f"{(math.floor(value / 10.0**exponent) + 1) * 10.0**exponent:.{digits}g}"


def shorten(text: str, width: int, keep: str = "left") -> str:
    """Cut a text to ``width`` characters; ``keep`` names the end that stays. ASCII dots, for a C locale.

    Example:
        >>> shorten("encoder.layer.0.query", 12, keep="right"), shorten("a long reason", 9)
        ('...r.0.query', 'a long...')
    """
    if len(text) <= width:
        return text
    if width <= 3:
        return text[:width] if keep == "left" else text[len(text) - width :]
    kept = width - 3
    return f"{text[:kept].rstrip()}..." if keep == "left" else f"...{text[len(text) - kept :]}"


def shown_name(name: str) -> str:
    """Name a module for the reader: by its path, or as the model itself where that is empty.

    Example:
        >>> shown_name("encoder.0"), shown_name("")
        ('encoder.0', '(the model itself)')
    """
    return name or "(the model itself)"


def wrap(text: str, width: int) -> str:
    """Break a paragraph into lines, never between a number and its per cent sign.

    Example:
        >>> print(wrap("an error of 9 % or so", 13))
        an error of
        9 % or so
    """
    return textwrap.fill(text.replace(" %", "\0%"), width).replace("\0%", " %")


def terminal_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None, *, width: int = 120
) -> str:
    """Make a table no wider than ``width`` where that is possible: texts are shortened first, then columns left out.

    Example:
        >>> columns = [Column("layer", keep="right"), Column("rank", numeric=True)]
        >>> print(terminal_table(columns, [["a.b", "8"]], ["1 layer", ""]))
        layer      rank
        -------  ------
        a.b           8
        -------  ------
        1 layer
    """
    everything = [*rows, *([total] if total is not None else [])]
    kept = list(range(len(columns)))
    # An all-empty column tells nothing and costs width.
    kept = [i for i in kept if any(row[i] not in ("", MISSING) for row in everything) or columns[i].drop == 0]
    # tabulate pads headings by two.
    need = [max([len(column.title) + 2, *(len(row[i]) for row in everything)]) for i, column in enumerate(columns)]

    def overflow(indices: Sequence[int], limits: Mapping[int, int]) -> int:
        return sum(limits.get(i, need[i]) for i in indices) + 2 * (len(indices) - 1) - width

    limits: dict[int, int] = {}
    while True:
        limits = {i: need[i] for i in kept if columns[i].keep is not None}
        excess = overflow(kept, limits)
        while excess > 0 and any(limits[i] > columns[i].least for i in limits):
            # The one with most to spare gives first.
            widest = max(limits, key=lambda i: limits[i] - columns[i].least)
            limits[widest] -= 1
            excess -= 1
        droppable = [i for i in kept if columns[i].drop]
        if excess <= 0 or not droppable:
            break
        kept.remove(min(droppable, key=lambda i: columns[i].drop))

    def fit(row: Sequence[str]) -> list[str]:
        return [shorten(row[i], limits[i], columns[i].keep or "left") if i in limits else row[i] for i in kept]

    body: list[Any] = [fit(row) for row in rows]
    if total is not None:
        body += [SEPARATING_LINE, fit(total)]
    table = tabulate(
        body,
        headers=[columns[i].title for i in kept],
        tablefmt="simple",
        disable_numparse=True,
        colalign=[("right" if columns[i].numeric else "left") for i in kept] if body else None,
    )
    return "\n".join(line.rstrip() for line in table.splitlines())


def markdown_name(name: str) -> str:
    """Write a name as a code span that can neither end its table cell nor start markup.

    Example:
        >>> markdown_name("a.b"), markdown_name("a|b`c")
        ('`a.b`', "`a\\\\|b'c`")
    """
    return "`" + name.replace("`", "'").replace("|", "\\|") + "`" if name else shown_name(name)


def markdown_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table of texts; pipes must be escaped already (see :func:`markdown_name`)."""
    return tabulate(
        rows,
        headers=[column.title for column in columns],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=[("right" if column.numeric else "left") for column in columns] if rows else None,
    )


def plain(value: object) -> Any:
    """Give the value as JSON knows it: tuples as lists, NaN and infinities as null, tensors of one element as numbers.

    Example:
        >>> plain({"error": float("nan"), "shape": (2, 3)})
        {'error': None, 'shape': [2, 3]}

    Raises:
        TypeError: something that is not plain data.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    raise TypeError(f"a report holds plain data, got a {type(value).__name__}")


def stable_json(value: object) -> str:
    """JSON that is the same for the same data: sorted keys, shortest exact floats, a newline at the end."""
    return json.dumps(plain(value), sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def write_files(directory: str | os.PathLike[str], files: Mapping[str, str]) -> Path:
    """Write texts into a directory, which is made where it is missing; existing files of these names are replaced.

    Raises:
        StorageError: the directory or a file cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # A name read from a file may hold lone surrogates, which UTF-8 cannot.
            (folder / name).write_bytes(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise StorageError(f"{folder}: the report cannot be written ({error.strerror or error})") from error
    return folder


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
