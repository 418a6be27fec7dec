"""Codes with a low-rank rest, and factors as codes: better than their parts, and what the formulas say."""

from __future__ import annotations

import pytest
import torch
from helpers import matrix_with_spectrum, seeded
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.corrected_codes import corrected_codes, energy
from lowrank.numerics.factor_codes import factor_codes
from lowrank.numerics.factors import factorize_in_metric
from lowrank.numerics.feedback import gptq, lost_energy
from lowrank.numerics.grids import Grid, dequantize_groups
from lowrank.numerics.moments import InputStatistics


def rows_of(features: int, count: int = 500) -> Tensor:
    rows = torch.randn(count, features, dtype=torch.float64, generator=seeded(1))
    rows = rows + torch.randn(count, 1, dtype=torch.float64, generator=seeded(2))
    return rows * torch.logspace(-0.5, 0.7, features, dtype=torch.float64)


def weight_of(rows: int = 40, columns: int = 60) -> Tensor:
    return matrix_with_spectrum(rows, columns, torch.logspace(0.5, -0.5, rows), seeded(3))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(3, 32, True)], ids=str)
def test_the_rest_is_worth_its_rank(grid: Grid, known: bool) -> None:
    weight, rows = weight_of(), rows_of(60)
    moment = rows.T @ rows / len(rows) if known else None
    found = corrected_codes(weight, grid, 4, moment)
    made = dequantize_groups(*found.rounded, grid, torch.float64) + found.factors.left @ found.factors.right
    assert found.factors.rank == 4
    assert found.error == pytest.approx(energy(weight - made, moment))
    # At least as good as what one would do by hand: round, then the closed form.
    plain = gptq(weight, grid, moment)
    lost = weight - dequantize_groups(*plain, grid, torch.float64)
    metric = torch.eye(60, dtype=torch.float64) if moment is None else moment
    curve = factorize_in_metric(lost, metric)
    by_hand = float(curve.errors[4]) ** 2 * curve.energy
    assert found.error <= by_hand * (1 + 1e-9) < lost_energy(weight, plain, grid, moment)


def test_more_rounds_are_never_worse() -> None:
    weight, rows, grid = weight_of(), rows_of(60), Grid(2, 32)
    moment = rows.T @ rows / len(rows)
    errors = [corrected_codes(weight, grid, 6, moment, rounds=rounds).error for rounds in (1, 2, 6)]
    assert errors[0] > errors[1] >= errors[2]


def test_rows_that_stand_for_a_moment_do_as_well() -> None:
    weight, rows, grid = weight_of(), rows_of(60, 2000), Grid(3, 20)
    kept = InputStatistics(60, sampled=True)
    kept.update(rows)
    metric, whole = kept.metric(centred=False), rows.T @ rows / len(rows)
    assert corrected_codes(weight, grid, 4, metric).error == pytest.approx(
        corrected_codes(weight, grid, 4, whole).error, rel=0.1
    )
    one, other = (factor_codes(weight, 10, Grid(4), Grid(4, 20), each).error for each in (metric, whole))
    assert one == pytest.approx(other, rel=0.1)


@pytest.mark.parametrize("known", [True, False])
def test_factors_fitted_to_each_other_err_less_than_rounded_apart(known: bool) -> None:
    weight, rows = weight_of(), rows_of(60)
    moment = rows.T @ rows / len(rows) if known else None
    metric = torch.eye(60, dtype=torch.float64) if moment is None else moment
    best = factorize_in_metric(weight, metric)
    factors = best.factors(12)
    for bits in (3, 4, 8):
        grid = Grid(bits, 32)
        found = factor_codes(weight, 12, grid, grid, moment)
        left, right = (dequantize_groups(*each, grid, torch.float64) for each in found[:2])
        assert found.error == pytest.approx(energy(weight - left @ right, moment))
        apart_left, apart_right = (
            dequantize_groups(*gptq(each, grid), grid, torch.float64) for each in (factors.left, factors.right)
        )
        floor = float(best.errors[12]) ** 2 * best.energy
        assert floor * (1 - 1e-9) <= found.error < energy(weight - apart_left @ apart_right, moment)
        assert factor_codes(weight, 12, grid, grid, moment, rounds=1).error >= found.error


def test_ranks_that_are_none_are_refused() -> None:
    with pytest.raises(RankError, match="fc: rank: must be from 1 to 40"):
        corrected_codes(weight_of(), Grid(4), 41, name="fc")
    with pytest.raises(RankError, match="rank: must be from 1 to 40"):
        factor_codes(weight_of(), 0, Grid(4), Grid(4))
