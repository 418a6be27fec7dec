"""How often the model has run over the samples while a plan was looked for: a number that depth does not change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["MOST_PASSES", "Passes"]

# Over the samples of the search, or as many of them as predictions are made on. Verification comes on top: no plan is made from it.
MOST_PASSES = 40


@dataclass
class Passes:
    """Count runs over the samples where they happen.

    Attributes:
        limit: how many there may be.
        spent: by what they were for.

    Example:
        >>> passes = Passes(3)
        >>> passes.add("predictions", 2)
        >>> passes.total, passes.left
        (2, 1)
    """

    limit: int = MOST_PASSES
    spent: Counter[str] = field(default_factory=Counter)

    def add(self, purpose: str, count: int = 1) -> None:
        """Count some."""
        self.spent[purpose] += count

    @property
    def total(self) -> int:
        """How many there were."""
        return self.spent.total()

    @property
    def left(self) -> int:
        """How many there may still be."""
        return max(self.limit - self.total, 0)
