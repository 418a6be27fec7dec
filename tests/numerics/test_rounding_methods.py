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


@pytest.mark.parametrize("zero_point", [False, True])
def test_nearest_is_within_half_a_step(zero_point: bool) -> None:
    weight, grid = weights(), Grid(4, 32, zero_point)
    codes, scale, zero = nearest(weight, grid)
    lost = (dequantize_groups(codes, scale, zero, grid, torch.float64) - weight).abs()
    step = scale.double().abs().repeat_interleave(32, dim=1)[:, :100]
    # The scale's own rounding to float16 moves the outermost level by half a unit in its last place; a zero point is whole, too.
    reach = 1.0 + 15 * torch.finfo(torch.float16).eps if zero_point else 0.5 + 8 * torch.finfo(torch.float16).eps
    assert bool((lost <= reach * step).all())


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
