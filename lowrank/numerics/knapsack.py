"""Pick one candidate per row: least total cost under a budget on total weight, and how far that is from the optimum.

The multiple-choice knapsack problem by Lagrangian relaxation (Sinha and Zoltners 1979). Pure numbers; the planner gives
them meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Allocation", "allocate", "top_up"]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

# Where the enumeration that follows the greedy pass stops being exact. Up to here it takes well under a second;
# with more rows the greedy plan is close enough to the optimum (its gap is at most one step of one row).
_EXACT_ROWS = 512
_EXACT_STATES = 2048
# Passes over all rows that spend what is left of the budget; three or four are usual, the limit only bounds the time.
_TOP_UP_PASSES = 100
# Relative slack for sums taken in another order than math.fsum's; what is returned is checked with fsum.
_ROUNDING = 1e-12
# A sum keeps a budget when math.fsum of it does, so its exact value may lie above by half a unit in the last place.
_LAST_PLACE = 2.0**-52
# Beyond this price of the whole budget, sums over rows may overflow: then the greedy choice stands.
_STEEPEST = 1e290


@dataclass(frozen=True)
class Allocation:
    """One column per row.

    Attributes:
        choice: (rows,) chosen columns.
        cost: total cost of the choice.
        weight: total weight of the choice.
        bound: no choice within the budget costs less than this (equal to ``cost`` where the choice is optimal).
        feasible: the weight keeps the budget; where no choice does, the choice is the lightest.
    """

    choice: _Ints
    cost: float
    weight: float
    bound: float
    feasible: bool


@dataclass(frozen=True)
class _Segments:
    """Steps along the rows' lower hulls, in the order in which the one multiplier takes them."""

    row: _Ints
    column: _Ints
    added: _Floats
    rate: _Floats


def allocate(cost: _Floats, weight: _Floats, budget: float) -> Allocation:
    """Choose the least total cost with total weight at most ``budget``, one column from every row.

    Every row's lower convex hull in (weight, cost); all hull steps of all rows sorted by cost saved per weight (what
    bisection on one Lagrange multiplier converges to, with deterministic ties); what is left of the budget goes to
    single moves, also to candidates inside the hull; small problems are then finished by enumeration of all choices
    whose reduced cost fits into the gap.

    Args:
        cost: (rows, columns); ``inf`` where a row has fewer candidates or one is impossible.
        weight: (rows, columns), not negative; ``inf`` in the same places.
        budget: on the total weight.

    Example:
        >>> best = allocate(np.array([[8.0, 2.0], [8.0, 4.0]]), np.array([[0.0, 3.0], [0.0, 1.0]]), 3.0)
        >>> best.choice.tolist(), best.cost
        ([1, 0], 10.0)
    """
    rows = np.arange(cost.shape[0])
    choice = _lightest(cost, weight)
    floor = math.fsum(np.where(np.isfinite(weight), cost, np.inf).min(axis=1))
    used = math.fsum(weight[rows, choice])
    if used > budget:
        total = math.fsum(cost[rows, choice])
        return Allocation(choice, total, used, floor, feasible=False)
    # Anything above all totals does as a budget, also for an infinite one.
    budget = min(budget, 2.0 * math.fsum(np.where(np.isfinite(weight), weight, 0.0).max(axis=1)) + 1.0)
    segments = _hull_segments(cost, weight, choice)
    taken = int(np.searchsorted(np.cumsum(segments.added), budget - used, side="right"))
    prefix = np.array(choice)
    prefix[segments.row[:taken]] = segments.column[:taken]
    while math.fsum(weight[rows, prefix]) > budget:
        # The running sum was rounded down; give the last step back.
        taken -= 1
        prefix = np.array(choice)
        prefix[segments.row[:taken]] = segments.column[:taken]
    rate = float(segments.rate[taken]) if taken < segments.rate.size else 0.0
    slack = budget * (1.0 + _LAST_PLACE) - math.fsum(weight[rows, prefix])
    bound = max(floor, math.fsum(cost[rows, prefix]) - slack * rate)
    choice = top_up(cost, [(weight, budget)], prefix)
    total = math.fsum(cost[rows, choice])
    proven = total <= bound + _ROUNDING * abs(total)
    if not proven and rows.size <= _EXACT_ROWS:
        choice, proven = _enumerate(cost, weight, choice, budget, rate)
        total = math.fsum(cost[rows, choice])
    if proven:
        bound = total
    return Allocation(choice, total, math.fsum(weight[rows, choice]), min(bound, total), feasible=True)


def _lightest(cost: _Floats, weight: _Floats) -> _Ints:
    """Find the lightest column of each row; of equally light ones the cheapest, of those the first."""
    lightest = weight.min(axis=1, keepdims=True)
    return np.asarray(np.where(weight == lightest, cost, np.inf).argmin(axis=1), dtype=np.int64)


def _hull_segments(cost: _Floats, weight: _Floats, start: _Ints) -> _Segments:
    """Walk from ``start`` (each row's lightest column) along the lower hull to its cheapest; steepest steps first."""
    active = np.arange(start.size)
    at = start
    steepest = np.full(start.size, np.inf)
    found: list[tuple[_Ints, _Ints, _Floats, _Floats]] = []
    while active.size:
        saved = cost[active, at][:, None] - cost[active]
        added = weight[active] - weight[active, at][:, None]
        possible = (saved > 0) & (added > 0) & np.isfinite(added)
        rates = np.full(saved.shape, -np.inf)
        with np.errstate(over="ignore"):
            np.divide(saved, added, out=rates, where=possible)
        column = rates.argmax(axis=1)
        local = np.arange(active.size)
        # Hull rates fall along a row; rounding must not swap two steps, so a rate never exceeds the one before it.
        rate = np.minimum(rates[local, column], steepest)
        going = possible[local, column]
        active, column, rate = active[going], column[going], rate[going]
        found.append((active, column, added[going, column], rate))
        at, steepest = column, rate
    if not found:
        empty = np.zeros(0)
        return _Segments(empty.astype(np.int64), empty.astype(np.int64), empty, empty)
    row, column, added, rate = (np.concatenate(parts) for parts in zip(*found, strict=True))
    step = np.repeat(np.arange(len(found)), [part[0].size for part in found])
    rate = np.minimum(rate, np.finfo(np.float64).max)
    order = np.lexsort((step, row, -rate))
    return _Segments(row[order], column[order], added[order], rate[order])


def top_up(cost: _Floats, limits: Sequence[tuple[_Floats, float]], choice: _Ints) -> _Ints:
    """Spend what is left of every budget on single moves that save cost, most saved per share of the slack first.

    Args:
        cost: (rows, columns), ``inf`` where there is no candidate.
        limits: weights, shaped and filled like ``cost``, and the budget on each one's total; ``choice`` keeps them.
        choice: (rows,) columns to start from.

    Example:
        >>> top_up(np.array([[8.0, 2.0], [8.0, 4.0]]), [(np.array([[0.0, 3.0], [0.0, 1.0]]), 3.0)], np.array([0, 0]))
        array([0, 1])
    """
    rows = np.arange(choice.size)
    choice = np.array(choice)
    for _ in range(_TOP_UP_PASSES):
        slacks = [budget - math.fsum(weight[rows, choice]) for weight, budget in limits]
        possible = np.isfinite(cost)
        for (weight, _), slack in zip(limits, slacks, strict=True):
            possible &= weight - weight[rows, choice][:, None] <= slack
        saved = np.where(possible, cost[rows, choice][:, None] - np.where(possible, cost, 0.0), 0.0)
        column = saved.argmax(axis=1)
        gain = saved[rows, column]
        movers = np.nonzero(gain > 0)[0]
        prices = [weight[rows, column] - weight[rows, choice] for weight, _ in limits]
        share = np.zeros(movers.size)
        for price, slack in zip(prices, slacks, strict=True):
            if slack > 0:
                share = np.maximum(share, price[movers] / slack)
        undo: list[tuple[int, int]] = []
        with np.errstate(divide="ignore"):
            order = np.lexsort((movers, -(gain[movers] / share)))
        for row in movers[order].tolist():
            if all(price[row] <= slack for price, slack in zip(prices, slacks, strict=True)):
                undo.append((row, int(choice[row])))
                choice[row] = column[row]
                slacks = [slack - float(price[row]) for price, slack in zip(prices, slacks, strict=True)]
        while undo and any(math.fsum(weight[rows, choice]) > budget for weight, budget in limits):
            # The running slack was rounded up; give the last move back.
            row, before = undo.pop()
            choice[row] = before
        if not undo:
            break
    return choice


def _enumerate(cost: _Floats, weight: _Floats, choice: _Ints, budget: float, rate: float) -> tuple[_Ints, bool]:
    """Find the best choice among all that could beat ``choice``, and whether that proves it optimal.

    A choice that is cheaper than this one has a sum of reduced costs ``c + λw − min(c + λw)`` below the duality gap, so
    partial choices above it are dropped, as are those that another partial choice beats in both cost and weight. With
    more than ``_EXACT_STATES`` left the most promising go on and nothing is proven.
    """
    rows = np.arange(choice.size)
    if rate * budget > _STEEPEST:
        return choice, False
    finite = np.isfinite(weight) & np.isfinite(cost)
    with np.errstate(over="ignore"):
        # Overflow is a candidate that no budget this tight can hold.
        penalised = np.where(finite, cost, np.inf) + rate * np.where(finite, weight, 0.0)
    best = penalised.min(axis=1)
    reduced = penalised - best[:, None]
    incumbent = math.fsum(cost[rows, choice])
    gap = incumbent - (math.fsum(best) - rate * budget * (1.0 + _LAST_PLACE))
    if not (math.isfinite(gap) and gap > 0):
        return choice, False
    lightest_rest = np.append(np.cumsum(weight.min(axis=1)[::-1])[::-1], 0.0)
    most = budget * (1.0 + _ROUNDING)
    held_weight, held_cost, held_reduced = np.zeros(1), np.zeros(1), np.zeros(1)
    trail: list[tuple[_Ints, _Ints]] = []
    proven = True
    for row in rows.tolist():
        columns = np.nonzero(reduced[row] < gap)[0]
        new_weight = (held_weight[:, None] + weight[row, columns]).ravel()
        new_cost = (held_cost[:, None] + cost[row, columns]).ravel()
        new_reduced = (held_reduced[:, None] + reduced[row, columns]).ravel()
        keep = np.nonzero((new_reduced < gap) & (new_weight + lightest_rest[row + 1] <= most))[0]
        keep = keep[np.lexsort((new_cost[keep], new_weight[keep]))]
        ahead = np.concatenate(([np.inf], np.minimum.accumulate(new_cost[keep])[:-1]))
        keep = keep[new_cost[keep] < ahead[: keep.size]]
        if not keep.size:
            return choice, proven
        if keep.size > _EXACT_STATES:
            proven = False
            keep = keep[np.argsort(new_reduced[keep], kind="stable")[:_EXACT_STATES]]
        trail.append((keep // columns.size, columns[keep % columns.size]))
        held_weight, held_cost, held_reduced = new_weight[keep], new_cost[keep], new_reduced[keep]
    for state in np.argsort(held_cost, kind="stable").tolist():
        if held_cost[state] >= incumbent:
            break
        candidate = np.array(choice)
        for row in reversed(rows.tolist()):
            parents, columns = trail[row]
            candidate[row] = columns[state]
            state = int(parents[state])
        if math.fsum(weight[rows, candidate]) <= budget:
            return candidate, proven
    return choice, proven
