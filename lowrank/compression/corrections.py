"""What measured plans say of the predictions: a factor for each format's weights and for its rounded activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from scipy.optimize import nnls

from lowrank.compression.allocation import Allocator
from lowrank.compression.candidates import Candidate
from lowrank.compression.plan import Plan
from lowrank.layers.spec import LayerSpec

__all__ = ["Corrections"]

# How strongly a factor is held to what all plans together say: as much as this share of one measured plan. A heuristic: several formats
# in one plan cannot be told apart by it alone.
PRIOR = 0.05
# Plans whose measured contribution is this many times the target, or less than the target by it, say half as much.
NEAR = 4.0
# No factor is taken further than this from what all plans together say.
MOST_FACTOR = 8.0


@dataclass
class Corrections:
    """Plan with predictions that whole-plan measurements have corrected (after LEMS, 2026).

    A plan's error is a sum over layers of predicted parts: the weights in one format, the rounded activations of one format. Each kind of
    part gets one factor, fitted by non-negative least squares on the relative errors of all plans that were measured so far.

    Attributes:
        base: plans with predictions as they were made.
        factors: measured over predicted, by part; parts that are not there take :attr:`common`.
        common: what all measured plans together say.
    """

    base: Allocator
    factors: dict[str, float] = field(default_factory=dict)
    common: float = 1.0
    _measured: list[tuple[Plan, float]] = field(default_factory=list)
    _known: dict[str, dict[LayerSpec, Candidate]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = {layer.name: {item.spec: item for item in layer.candidates} for layer in self.base.choices}
        self._current = self.base

    @property
    def allocator(self) -> Allocator:
        """What makes plans, with corrected predictions."""
        return self._current

    def plan(self, total: float) -> Plan:
        """Make the best plan by what is known now; see :meth:`Allocator.plan`."""
        return self._current.plan(total)

    def predicted(self, plan: Plan) -> float:
        """Predict a plan's contributions by what is known now."""
        return math.fsum(self._factor(part) * value for part, value in self._parts(plan).items())

    def repriced(self, plan: Plan) -> Plan:
        """Give a plan with the contributions of its layers as they are predicted now."""
        entries = tuple(
            replace(entry, error=self._corrected(self._known[entry.name][entry.spec]).error)
            if entry.spec in self._known.get(entry.name, {})
            else entry
            for entry in plan.entries
        )
        return replace(plan, entries=entries)

    def learn(self, plan: Plan, measured: float, target: float) -> None:
        """Take in what a plan was measured to cost, and fit the factors anew.

        Args:
            measured: in the unit in which contributions add up.
            target: what plans are wanted for; measurements near it count for more.
        """
        if not 0.0 < measured < math.inf:
            return
        self._measured.append((plan, measured))
        self._fit(target)
        self._current = replace(
            self.base,
            choices=[
                replace(layer, candidates=tuple(self._corrected(item) for item in layer.candidates))
                for layer in self.base.choices
            ],
        )

    def _fit(self, target: float) -> None:
        rows = [(self._parts(plan), measured) for plan, measured in self._measured]
        rows = [(parts, measured) for parts, measured in rows if math.fsum(parts.values()) > 0.0]
        if not rows:
            return
        self.common = median(measured / math.fsum(parts.values()) for parts, measured in rows)
        names = sorted({name for parts, _ in rows for name, value in parts.items() if value > 0.0})
        matrix, wanted = [], []
        for parts, measured in rows:
            far = abs(math.log(measured / target)) / math.log(NEAR) if 0.0 < target < math.inf else 0.0
            weight = 0.5**far
            matrix.append([weight * self.common * parts.get(name, 0.0) / measured for name in names])
            wanted.append(weight)
        for index in range(len(names)):
            matrix.append([PRIOR**0.5 if place == index else 0.0 for place in range(len(names))])
            wanted.append(PRIOR**0.5)
        found, _ = nnls(np.array(matrix), np.array(wanted))
        self.factors = {
            name: self.common * min(max(float(value), 1.0 / MOST_FACTOR), MOST_FACTOR)
            for name, value in zip(names, found, strict=True)
        }

    def _factor(self, part: str) -> float:
        return self.factors.get(part, self.common)

    def _parts(self, plan: Plan) -> dict[str, float]:
        """Predicted contributions, summed by what they are of."""
        sums: dict[str, float] = {}
        for entry in plan.entries:
            item = self._known.get(entry.name, {}).get(entry.spec)
            parts = ((entry.format, entry.error),) if item is None else item.shares
            for name, value in parts:
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def _corrected(self, item: Candidate) -> Candidate:
        if not math.isfinite(item.error):
            return item
        return replace(item, error=math.fsum(self._factor(part) * value for part, value in item.shares))
