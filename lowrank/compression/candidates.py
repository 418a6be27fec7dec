"""Candidates in, plan out: which format, rank and number of bits every layer gets under a budget.

Plain data: nothing here touches a module. The optimisation itself is in :mod:`lowrank.knapsack`, the plan in
:mod:`lowrank.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowrank.compression.formats import format_of
from lowrank.compression.plan import Plan, PlanEntry
from lowrank.errors import BudgetError, LowRankError, NumericsError, UsageError
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.knapsack import Allocation, allocate, top_up

__all__ = ["Candidate", "LayerChoices", "Plan", "PlanEntry", "plan_formats"]

# Halvings of the share that bytes get beside cost when both budgets bind and cost is not bytes: a heuristic, 2^-12 is
# finer than the differences between the rates of real layers.
_BLEND_STEPS = 12
_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer.

    Attributes:
        spec: the format and its numbers.
        bytes: what the layer's tensors take in the file.
        error: the layer's additive share of the model's error (squared relative error, or nats); ``inf`` where it is
            impossible.
        cost: what the planner minimises; ``None`` means ``bytes``.
        parts: what the error is made of, by what measurements correct alike; ``None`` where nothing does.

    Example:
        >>> Candidate(LayerSpec("int8", bits=8, activations="int8"), 1040, 1e-5).price
        1040.0
    """

    spec: LayerSpec
    bytes: int
    error: float
    cost: float | None = None
    parts: tuple[tuple[str, float], ...] | None = None

    @property
    def price(self) -> float:
        """``cost``, or ``bytes`` where none was given."""
        return float(self.bytes if self.cost is None else self.cost)

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """``parts``, or the whole error as one, named after the format."""
        return ((self.spec.format, self.error),) if self.parts is None else self.parts

    @property
    def compressed(self) -> bool:
        """Whether the layer does not stay as it is."""
        return not format_of(self.spec).dense


@dataclass(frozen=True)
class LayerChoices:
    """A layer and its candidates.

    Attributes:
        name: the module's full name.
        kind: what it is, for the report.
        shape: of its weight, (out, in, …).
        candidates: at least one of finite error.

    Example:
        >>> LayerChoices("fc", "linear", (4, 4), (Candidate(LayerSpec("dense"), 64, 0.0),)).name
        'fc'
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    candidates: tuple[Candidate, ...]


def plan_formats(
    layers: Sequence[LayerChoices],
    *,
    error_budget: float | None = None,
    size_budget: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Plan:
    """Find the cheapest choice of candidates whose errors add up to at most the budget (or: of least error within a size).

    Lower convex hull per layer, one multiplier for all, greedy top-up, enumeration where that is quick ; the
    plan carries the duality gap. The same input gives the same plan, ties included.

    Args:
        layers: names unique; candidates of infinite error are passed over.
        error_budget: bounds the sum of errors, in their unit; alone: least cost.
        size_budget: bounds the sum of bytes; alone: least error. With both: least cost within both.
        metadata: JSON data to keep in the plan.

    Raises:
        UsageError: no budget, or one that is negative or NaN.
        BudgetError: out of reach; carries the plan that comes closest.
        NumericsError: a candidate's error, bytes or cost is NaN or negative.
        LowRankError: two layers of one name, or a layer without a possible candidate.

    Example:
        >>> dense = Candidate(LayerSpec("dense"), 64, 0.0)
        >>> small = Candidate(LayerSpec("int8", bits=8, activations="int8"), 20, 0.01)
        >>> layers = [LayerChoices(name, "linear", (4, 4), (dense, small)) for name in ("a", "b")]
        >>> plan = plan_formats(layers, error_budget=0.015)
        >>> [entry.format for entry in plan.entries], plan.bytes, plan.duality_gap
        (['int8', 'dense'], 84, 0.0)
    """
    for name, budget in (("error_budget", error_budget), ("size_budget", size_budget)):
        if budget is not None and not budget >= 0:
            raise UsageError(f"{name}: must be a number from 0, got {budget}")
    table = _Table.of(layers)
    if error_budget is None and size_budget is None:
        raise UsageError("error_budget, size_budget: at least one must be given")
    if not layers:
        return Plan((), "cost", 0.0, 0.0, metadata or {})
    if error_budget is None:
        assert size_budget is not None
        found = allocate(table.error, table.bytes, size_budget)
        plan = table.plan(layers, found, "error", metadata)
        if not found.feasible:
            raise BudgetError(
                f"size_budget: no plan takes at most {size_budget} bytes; the smallest takes {plan.bytes} bytes at a "
                f"predicted error of {plan.error:.6g}; raise size_budget or allow more formats",
                plan=plan,
                error=plan.error,
            )
        return plan
    found = allocate(table.cost, table.error, error_budget)
    plan = table.plan(layers, found, table.objective, metadata)
    if not found.feasible:
        raise BudgetError(
            f"error_budget: no plan has a predicted error of at most {error_budget:.6g}; the safest reaches "
            f"{plan.error:.6g} with {plan.bytes} bytes; raise error_budget or allow the dense format",
            plan=plan,
            error=plan.error,
        )
    if size_budget is None or plan.bytes <= size_budget:
        return plan
    smallest = plan
    if table.objective != "bytes":
        smallest = table.plan(layers, allocate(table.bytes, table.error, error_budget), "bytes", metadata)
    if smallest.bytes > size_budget:
        _refuse_both(smallest, error_budget, size_budget)
    return table.plan(layers, _blend(table, found, error_budget, size_budget), "cost", metadata)


@dataclass(frozen=True)
class _Table:
    """The candidates as (layers, most candidates) arrays; ``inf`` in all of them where there is none."""

    cost: _Floats
    error: _Floats
    bytes: _Floats
    objective: str

    @classmethod
    def of(cls, layers: Sequence[LayerChoices]) -> _Table:
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise LowRankError(f"layer {twice!r}: stands in the candidates twice; every layer needs one list")
        counts = [len(layer.candidates) for layer in layers]
        shape = len(layers), max(counts, default=0)
        filled = np.arange(shape[1]) < np.array(counts, dtype=np.int64)[:, None]
        cost, error, size = (np.full(shape, np.inf) for _ in range(3))
        flat = [candidate for layer in layers for candidate in layer.candidates]
        error[filled] = [candidate.error for candidate in flat]
        size[filled] = [candidate.bytes for candidate in flat]
        cost[filled] = [candidate.bytes if candidate.cost is None else candidate.cost for candidate in flat]
        for what, values in (("error", error), ("bytes", size), ("cost", cost)):
            wrong = ~(values >= 0) if what == "error" else filled & ~((values >= 0) & (values < np.inf))
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise NumericsError(
                    f"layer {names[row]!r}: {what} of candidate {column} ({layers[row].candidates[column].spec.format}) "
                    f"must be a number from 0, got {values[row, column]}"
                )
        possible = error < np.inf
        if not possible.any(axis=1).all():
            name = names[int(possible.any(axis=1).argmin())]
            raise LowRankError(f"layer {name!r}: has no candidate of finite error; add the dense one")
        objective = "bytes" if np.array_equal(cost, size) else "cost"
        return cls(np.where(possible, cost, np.inf), error, np.where(possible, size, np.inf), objective)

    def plan(
        self, layers: Sequence[LayerChoices], found: Allocation, objective: str, metadata: Mapping[str, Any] | None
    ) -> Plan:
        entries = []
        for layer, column in zip(layers, found.choice.tolist(), strict=True):
            best = layer.candidates[column]
            entries.append(PlanEntry(layer.name, layer.kind, layer.shape, best.spec, best.bytes, best.error))
        # Rounding of the bound may leave a gap of -1e-16.
        return Plan(tuple(entries), objective, found.cost, max(found.cost - found.bound, 0.0), metadata or {})


def _refuse_both(smallest: Plan, error_budget: float, size_budget: int) -> NoReturn:
    gap = smallest.duality_gap or 0.0
    proof = (
        f"none takes under {math.ceil(smallest.bytes - gap)} bytes"
        if smallest.bytes - gap > size_budget
        else f"one that is up to {gap:.0f} bytes smaller is not ruled out"
    )
    raise BudgetError(
        f"error_budget and size_budget: no plan found with a predicted error of at most {error_budget:.6g} and at most "
        f"{size_budget} bytes; the smallest takes {smallest.bytes} bytes at an error of {smallest.error:.6g} "
        f"({proof}); raise either budget",
        plan=smallest,
        error=smallest.error,
    )


def _blend(table: _Table, cheapest: Allocation, error_budget: float, size_budget: int) -> Allocation:
    """Least cost within both budgets, where the cheapest plan is too large and the smallest is not.

    A second multiplier μ on bytes, by bisection of its share t = μ/(1 + μ): each μ gives the lower bound
    ``min(cost + μ·bytes) − μ·size_budget`` and a plan.
    """
    rows = np.arange(table.cost.shape[0])
    best: Allocation | None = None
    bound = cheapest.bound
    low, high = 0.0, 1.0
    shares = [1.0]
    for _ in range(_BLEND_STEPS + 1):
        share = shares[-1]
        blended = table.bytes if share == 1.0 else (1.0 - share) * table.cost + share * table.bytes
        found = allocate(blended, table.error, error_budget)
        size = math.fsum(table.bytes[rows, found.choice])
        cost = math.fsum(table.cost[rows, found.choice])
        if share < 1.0:
            bound = max(bound, (found.bound - share * size_budget) / (1.0 - share))
        if size <= size_budget:
            high = share
            if best is None or cost < best.cost:
                best = Allocation(found.choice, cost, found.weight, bound, feasible=True)
        else:
            low = share
        shares.append((low + high) / 2)
    assert best is not None  # The first share, 1, is the smallest plan, which fits.
    # Layers that tie at one multiplier move together; single moves part them.
    choice = top_up(table.cost, [(table.error, error_budget), (table.bytes, size_budget)], best.choice)
    cost = math.fsum(table.cost[rows, choice])
    return Allocation(choice, cost, math.fsum(table.error[rows, choice]), min(bound, cost), feasible=True)
