"""The command line: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lowrank``; see :func:`lowrank.cli.app.main`, which is imported here so that this package itself is light."""
    from lowrank.cli.app import main as run

    return run(argv)
