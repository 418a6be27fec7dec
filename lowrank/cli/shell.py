"""What a command owes the shell: one line a failure, an exit code that says why, clean ends on signals and pipes."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

import click

from lowrank.cli.startup import end_quietly
from lowrank.errors import LowRankError, ResourceError, StorageError
from lowrank.io import printable
from lowrank.io.version import PACKAGE
from lowrank.reporting.report import Report

__all__ = ["STANDARD_OUTPUT", "check_file", "emit", "emit_report", "note", "run", "write_file"]

# A file of this name is standard output.
STANDARD_OUTPUT = Path("-")

INTERRUPTED = 130
TERMINATED = 143
OUR_BUG = 1
# What torch says when an allocation fails; it has no class of its own for the CPU.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


class _Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failure it may handle."""


def run(body: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command and return its exit code; every failure is one line on standard error.

    Args:
        body: does the work, writing results with :func:`emit`.
        debug: let exceptions through, with their traceback.

    Returns:
        0, or the code of the failure: 1 our bug, 2 usage, 3 bad input, 4 numerics or a budget that cannot be met,
        5 reading or writing failed, 6 over a resource limit, 130 interrupted, 143 terminated.

    Example:
        >>> run(lambda: emit("done"))
        done
        0
    """
    _survive_odd_encodings()
    with _signals(), _short_warnings(debug):
        try:
            body()
            _flush()
            return 0
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except _Terminated:
            return _fail("terminated", TERMINATED)
        except click.exceptions.Exit as request:
            _flush()
            return request.exit_code
        except Exception as error:
            if debug:
                raise
            return _fail(*_explain(error))


def emit(text: str) -> None:
    """Write a result to standard output; a reader who has gone away (``| head``) is no failure.

    Raises:
        StorageError: writing failed otherwise, as on a full disk.

    Example:
        >>> emit("one line")
        one line
    """
    with _writing():
        if sys.stdout is not None:
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
            sys.stdout.flush()


def emit_report(report: Report, json_file: Path | None, html_file: Path | None = None) -> None:
    """Write a report to the files that were asked for, and print it: as JSON where that is to go to ``-``, else as text.

    Raises:
        StorageError: writing failed.
    """
    if html_file is not None:
        write_file(html_file, report.to_html().encode())
    if json_file is not None and json_file != STANDARD_OUTPUT:
        write_file(json_file, report.to_json().encode())
    emit(report.to_json() if json_file == STANDARD_OUTPUT else report.to_text())


def note(text: str) -> None:
    """Write a line about the progress to standard error.

    Example:
        >>> note("reading the model")
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"lowrank: {text}", file=sys.stderr, flush=True)


def check_file(path: Path) -> None:
    """Find out before the work whether a file can be written.

    Raises:
        StorageError: a directory, or in one that is missing or read-only.

    Example:
        >>> check_file(Path("/nonexistent/report.json"))
        Traceback (most recent call last):
            ...
        lowrank.errors.StorageError: /nonexistent/report.json: its directory does not exist; create it first
    """
    parent = path.absolute().parent
    if path.is_dir():
        raise StorageError(f"{printable(path)}: is a directory; name a file")
    if not parent.is_dir():
        raise StorageError(f"{printable(path)}: its directory does not exist; create it first")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise StorageError(f"{printable(path)}: cannot be written (read-only)")


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or stays as it was; a device or pipe is written to directly.

    Raises:
        StorageError: writing failed.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".lowrank-", delete=False) as file:
            partial = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                # A temporary file is private; this one is to have the mode of any other, or of the one it replaces.
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError(f"{printable(path)}: cannot be written ({error.strerror})") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, LowRankError):
        return str(error), error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, NotImplementedError):
        return str(error), 2
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return (
            "out of memory; use a smaller --batch-size or --max-tokens, or a machine with more",
            ResourceError.exit_code,
        )
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{printable(error.filename)}: "
        return f"{name}reading or writing failed ({error.strerror})", StorageError.exit_code
    return f"this is a bug in lowrank: {type(error).__name__}: {error}; --debug shows where", OUR_BUG


def _fail(message: str, code: int) -> int:
    # One line whatever the message holds, with nothing in it that a terminal would act on.
    line = " ".join(message.split())
    with contextlib.suppress(StorageError):
        _flush()
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    note(f"error: {shown}")
    return code


def _flush() -> None:
    with _writing():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # What is still buffered would fail once more when Python flushes at exit.
        _to_null(sys.stdout)
    except OSError as error:
        _to_null(sys.stdout)
        raise StorageError(f"standard output: writing failed ({error.strerror})") from error
    except ValueError as error:
        if sys.stdout is None or not sys.stdout.closed:
            raise
        raise StorageError("standard output: it is closed") from error


def _to_null(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _survive_odd_encodings() -> None:
    """A C locale or a path that is not UTF-8 must not turn a finished run into a failure while printing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the run through its clean-up; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {}
    for number, handler in ((signal.SIGTERM, terminate), (signal.SIGINT, interrupt)):
        current = signal.getsignal(number)
        if current in (signal.SIG_DFL, signal.default_int_handler, end_quietly):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def _short_warnings(debug: bool) -> Iterator[None]:
    """Our own warnings in one line each; those of the libraries below only with --debug."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if f"{os.sep}{PACKAGE}{os.sep}" in filename or debug:
            note(f"warning: {message}")

    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("default")
        warnings.showwarning = show
        yield
