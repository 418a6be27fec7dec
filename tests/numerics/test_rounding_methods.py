"""Codes and scales in groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.rounding_methods import ROUNDINGS, Grid, dequantize_groups, nearest, scale_dtype


def weights(rows: int = 6, columns: int = 100) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_method_gives_codes_that_the_grid_holds(
    method: str, bits: int, group: int | None, zero_point: bool
) -> None:
    weight, grid = weights(), Grid(bits, group, zero_point)
    codes, scale, zero = ROUNDINGS[method](weight, grid)
    assert codes.dtype is torch.uint8 and int(codes.max()) <= grid.top
    assert scale.shape == (6, grid.groups(100)) and scale.dtype is scale_dtype(weight, grid)
    assert (zero is not None) == zero_point
    if zero is not None:
        assert zero.dtype is torch.uint8 and zero.shape == scale.shape and int(zero.max()) <= grid.top
    made = dequantize_groups(codes, scale, zero, grid, torch.float64)
    # By hand, group by group.
    span = group or 100
    for start in range(0, 100, span):
        at = start // span
        offset = grid.middle if zero is None else zero[:, at : at + 1].double()
        expected = scale[:, at : at + 1].double() * (codes[:, start : start + span].double() - offset)
        assert torch.equal(made[:, start : start + span], expected)


def squared(weight: Tensor, scale: Tensor, zero: Tensor, top: int, importance: Tensor) -> Tensor:
    """(rows,) squared error of rounding each row to the nearest level."""
    codes = (torch.round(weight / scale) + zero).clamp(0, top)
    return ((scale * (codes - zero) - weight).square() * importance).sum(dim=1)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(
    "grid", [Grid(2), Grid(3), Grid(4), Grid(6), Grid(8), Grid(2, None, True), Grid(4, None, True)], ids=str
)
def test_ranges_are_near_the_best_of_a_long_search(grid: Grid, weighed: bool) -> None:
    weight = weights(12, 32) ** 3
    importance = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) if weighed else None
    by = torch.ones(32, dtype=torch.float64) if importance is None else importance
    moment = None if importance is None else torch.diag(importance)
    codes, scale, zero = nearest(weight, grid, moment)
    offset = torch.full_like(scale, grid.middle).double() if zero is None else zero.double()
    own = squared(weight, scale.double(), offset, grid.top, by)
    made = dequantize_groups(codes, scale, zero, grid, torch.float64)
    torch.testing.assert_close(((made - weight).square() * by).sum(dim=1), own)
    least = torch.full_like(own, torch.inf)
    reach = weight.abs().amax(dim=1, keepdim=True) / grid.middle
    zeros = [grid.middle] if zero is None else range(grid.top + 1)
    for share in torch.linspace(0.1, 2.2, 300).tolist():
        for at in zeros:
            for sign in (1.0, -1.0) if zero is None else (1.0,):
                tried = squared(weight, sign * share * reach, torch.full_like(reach, at), grid.top, by)
                least = torch.minimum(least, tried)
    # With more levels the error jumps about from scale to scale, and only a search as long finds its least.
    assert float(own.sum()) <= (1.05 if grid.bits < 4 else 1.25) * float(least.sum())


@pytest.mark.parametrize("zero_point", [False, True])
def test_nearest_errs_less_than_with_whole_ranges_and_takes_the_nearest_levels(zero_point: bool) -> None:
    weight, grid = weights(), Grid(4, 32, zero_point)
    codes, scale, zero = nearest(weight, grid)
    made = dequantize_groups(codes, scale, zero, grid, torch.float64)
    for step in (-1, 1):
        moved = (codes.int() + step).clamp(0, grid.top).to(torch.uint8)
        other = dequantize_groups(moved, scale, zero, grid, torch.float64)
        assert bool(((made - weight).abs() <= (other - weight).abs() * (1 + 1e-12)).all())
    whole = weight.abs().reshape(-1)[: 6 * 96].view(-1, 32).amax(dim=1)
    # A third of the squared step of the whole range over 12 is what rounding within it costs.
    assert float((made - weight)[:, :96].square().mean()) < float((2 * whole / 15).square().mean()) / 12


def test_all_levels_are_used_whichever_side_reaches_farther() -> None:
    ramp = torch.linspace(-7.0, 8.0, 16)
    for weight in (ramp[None], -ramp[None]):
        codes, scale, zero = nearest(weight, Grid(4))
        assert sorted(codes[0].tolist()) == list(range(16))
        assert torch.equal(dequantize_groups(codes, scale, zero, Grid(4)), weight)


def test_zeros_stay_zeros_and_small_weights_get_a_wider_scale() -> None:
    weight = torch.zeros(2, 8)
    weight[0, 0] = 1e-7
    assert scale_dtype(weight, Grid(4)) is torch.float32
    made = dequantize_groups(*nearest(weight, Grid(4)), Grid(4))
    torch.testing.assert_close(made, weight, rtol=1e-5, atol=0.0)
    assert scale_dtype(torch.zeros(2, 8), Grid(4)) is torch.float16
    assert not dequantize_groups(*nearest(torch.zeros(2, 8), Grid(4, zero_point=True)), Grid(4)).any()


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(NumericsError, match="nan at index"):
        nearest(torch.tensor([[1.0, float("nan")]]), Grid(4))
    with pytest.raises(RankError, match="from 2 to 8, got 9"):
        Grid(9)
    with pytest.raises(RankError, match="group: must be None"):
        Grid(4, 0)
    huge = torch.full((1, 4), 1e300, dtype=torch.float64)
    with pytest.raises(NumericsError, match="too large"):
        nearest(huge, Grid(4))
