"""What adapters make of a weight, and what putting that into it cost."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Change", "MergeRow"]


class Change(NamedTuple):
    """What adapters make of a weight: ``diag(rows) W + left @ right``.

    Attributes:
        left: (out, r) float64, scalings included.
        right: (r, in · kernel) float64.
        rows: (out,) float64, or ``None`` for ones (no DoRA).
    """

    left: Tensor
    right: Tensor
    rows: Tensor | None


class MergeRow(NamedTuple):
    """One merged layer in a report; see :class:`lowrank.lora.merge.MergeReport`."""

    name: str
    kind: str
    adapters: tuple[str, ...]
    rank_before: int | None
    rank_after: int | None
    bytes_before: int
    bytes_after: int
    error: float
    note: str
