"""The first second of the command, while torch is imported: Ctrl-C ends it in one line, without a traceback.

Imports nothing but the standard library: it is in force before anything else is read.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import pairwise
from types import FrameType

__all__ = ["end_quietly", "is_command", "watch"]

_INTERRUPTED = 130
_COMMAND = __name__.partition(".")[0]
_NEVER_SECONDS = 1_000_000_000


def is_command() -> bool:
    """Tell whether this process is the command line: its script, or ``python -m lowrank``.

    Example:
        >>> is_command()
        False
    """
    if sys.argv[:1] == ["-m"]:
        # So it is while the package is imported on the way to its __main__.
        names = sys.orig_argv
        return any(before == "-m" and name == _COMMAND for before, name in pairwise(names))
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name in (_COMMAND, f"{_COMMAND}.exe", f"{_COMMAND}-script.py")


def end_quietly(number: int, frame: FrameType | None) -> None:
    """Say that the command was interrupted, and end the process: nothing has been begun that would have to be finished."""
    os.write(2, b"lowrank: error: interrupted\n")
    os._exit(_INTERRUPTED)


def watch() -> None:
    """Take Ctrl-C until the command itself does, where this process is the command line and nobody else takes it.

    Where standard error is a file, progress bars write their first and last state and nothing between.
    """
    if is_command() and sys.stderr is not None and not sys.stderr.isatty():
        # Read by tqdm as it is imported.
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, str(_NEVER_SECONDS))
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
