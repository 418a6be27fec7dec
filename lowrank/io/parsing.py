"""Reading text that somebody else wrote: strict JSON, integers that are integers, names that are safe to print."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError, LowRankError, ResourceError, StorageError, is_whole

__all__ = ["parse_json", "printable", "read_bounded", "read_json", "require_int"]

# Tokenizers write 10^30 (31 digits) for "no limit"; nothing honest is longer than this.
_MAX_INTEGER_DIGITS = 100
_PRINTED_CHARACTERS = 200
# Every name takes two quotes and every value a comma, colon or bracket. A file of 200,000 tensors has 2 million of the one
# and 2.8 million of the other; what is far beyond takes gigabytes, as numbers, as names or as empty lists.
_MOST_QUOTES = 2_500_000
_MOST_VALUES = 3_500_000
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def printable(name: object) -> str:
    """Escape everything in a name that a terminal would act on, and cut it at 200 characters.

    Args:
        name: a path, tensor name or layer name from a file; anything else is converted by ``str``.

    Returns:
        Text of printable characters only: control characters, line ends, bidirectional marks and bytes that are not
        UTF-8 (lone surrogates) become backslash escapes.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    text = os.fsdecode(name) if isinstance(name, (bytes, os.PathLike)) else str(name)
    shown = text[:_PRINTED_CHARACTERS] + ("..." if len(text) > _PRINTED_CHARACTERS else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def parse_json(text: str | bytes, *, source: object) -> Any:
    """Parse JSON by the letter of RFC 8259, and refuse what two readers could understand differently.

    Args:
        text: the document; bytes must be UTF-8.
        source: the file (or other origin) to name in messages.

    Returns:
        The parsed value; numbers are finite ``int`` or ``float``.

    Raises:
        CheckpointError: bad syntax or encoding, a byte-order mark, duplicate keys, ``NaN`` or ``Infinity`` (also as
            ``1e400``), a number of more than 100 digits, nesting beyond the recursion limit, half a surrogate pair.
        ResourceError: millions of names or values, of whatever kind.

    >>> parse_json('{"rank": 8}', source="plan.json")
    {'rank': 8}
    """
    where = printable(source)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}: JSON must be UTF-8; byte {error.start} is not") from error
    # Counted before anything is made of them; those inside of strings count too, which no honest file has as many of.
    if text.count('"') > _MOST_QUOTES or sum(map(text.count, ",:[{")) > _MOST_VALUES:
        raise ResourceError(f"{where}: JSON of more than {_MOST_VALUES} values, the most that is read; split the file")
    if text.startswith("\ufeff"):
        raise CheckpointError(f"{where}: JSON must not begin with a byte-order mark; save the file as plain UTF-8")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: the name {printable(twice)!r} is given twice in one JSON object")
        return result

    def integer(digits: str) -> int:
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise CheckpointError(f"{where}: a number of {len(digits)} digits; at most {_MAX_INTEGER_DIGITS} are read")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: the number {printable(digits[:40])} does not fit a 64-bit float")
        return value

    def constant(word: str) -> Any:
        raise CheckpointError(f"{where}: {word} is not JSON; numbers must be finite")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: JSON text holds half a surrogate pair, which is not Unicode") from error
    return value


def require_int(
    value: Any, name: str, low: int, high: int | None = None, *, error: type[LowRankError] = CheckpointError
) -> int:
    """Return ``value`` if it is an integer in ``[low, high]``; ``8.0``, ``"8"`` and ``True`` are not.

    Args:
        value: what was read.
        name: how to call it in the message, with its layer and file.
        low, high: the legal range, both ends included; ``high=None`` sets no upper end.
        error: the class to raise.

    Raises:
        LowRankError: of class ``error``, with the value and the range.

    >>> require_int(8, "rank", 1, 64)
    8
    """
    legal = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not is_whole(value, low, high):
        raise error(f"{name} must be {legal}; got {printable(repr(value)[:60])} ({type(value).__name__})")
    return value


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and return its descriptor; anything but a regular file is refused.

    Raises:
        CheckpointError: there is no such file, or it is a directory, a device or a pipe.
        StorageError: the system does not let it be opened.
    """
    where = printable(path)
    try:
        # Without O_NONBLOCK opening a pipe would wait for a writer; asked before and after, a swap gains nothing.
        _require_regular(os.stat(path).st_mode, where)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: no such file") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not a legal file name ({error})") from error
    except OSError as error:
        raise StorageError(f"{where}: cannot be opened ({error.strerror})") from error
    try:
        _require_regular(os.fstat(descriptor).st_mode, where)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((word for test, word in kinds if test(mode)), "a device")
        raise CheckpointError(f"{where}: {kind}, where a regular file is needed")


def read_bounded(path: str | os.PathLike[str], limit_bytes: int) -> bytes:
    """Read a whole regular file of at most ``limit_bytes`` bytes.

    Raises:
        CheckpointError: no such file, or not a regular file.
        ResourceError: the file is larger.
        StorageError: reading failed.

    >>> len(read_bounded(__file__, 1 << 20)) > 100
    True
    """
    where = printable(path)
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise StorageError(f"{where}: reading failed ({error.strerror})") from error
    if len(data) > limit_bytes:
        raise ResourceError(f"{where}: larger than {limit_bytes} bytes, the most that is read of such a file")
    return data


def read_json(path: str | os.PathLike[str], limit_bytes: int = 32 << 20) -> dict[str, Any]:
    """Read a file that holds one JSON object; see :func:`parse_json`.

    Raises:
        CheckpointError, ResourceError, StorageError: as :func:`read_bounded` and :func:`parse_json`, or not an object.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "a.json").write_text('{"rank": 8}')
    ...     read_json(pathlib.Path(folder, "a.json"))
    {'rank': 8}
    """
    value = parse_json(read_bounded(Path(path), limit_bytes), source=path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{printable(path)}: must hold a JSON object; holds a {type(value).__name__}")
    return value
