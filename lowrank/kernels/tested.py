"""Which torch the integer products were tested with, and a word where this one is newer."""

from __future__ import annotations

import logging
import re

import torch

__all__ = ["NEWEST_TESTED", "note_untested_torch"]

log = logging.getLogger("lowrank")

# The torch of constraints.txt (tests/kernels/test_tested.py holds them together).
NEWEST_TESTED = (2, 13, 0)
# What was said already; a newer version than tested is said once a process.
_noted: list[str] = []


def note_untested_torch() -> None:
    """Say once, on the logger "lowrank", that this torch is newer than any the package was tested with.

    Nothing else follows from it: the self-tests decide which integer products are taken, whatever the version.

    Example:
        >>> note_untested_torch()
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", torch.__version__)
    if _noted or found is None or tuple(int(part or 0) for part in found.groups()) <= NEWEST_TESTED:
        return
    _noted.append(torch.__version__)
    tested = ".".join(map(str, NEWEST_TESTED))
    log.warning(
        "torch %s was not tested with lowrank (tested: up to %s); integer products are tested on this machine as always",
        torch.__version__,
        tested,
    )
