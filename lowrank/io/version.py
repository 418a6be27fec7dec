"""The package's name and version, in one place."""

from __future__ import annotations

import torch

__all__ = ["PACKAGE", "__version__", "versions"]

PACKAGE = "lowrank"
__version__ = "0.4.0"


def versions() -> dict[str, str]:
    """Name what a result depends on: this package's version and torch's.

    Example:
        >>> sorted(versions())
        ['lowrank', 'torch']
    """
    return {PACKAGE: __version__, "torch": str(torch.__version__)}
