"""Rounding of weights: exact ranges, finite scales, errors within half a step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.rounding import check_bits, dequantize_rows, largest_code, quantize_rows, rounding_bound


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_entry_is_within_half_a_step(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 33, generator=seeded(bits)).to(dtype)
    codes, scale = quantize_rows(weight, bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert int(codes.abs().max()) == largest_code(bits) == 2 ** (bits - 1) - 1
    error = (codes.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.5 * scale.double()[:, None] * (1 + 1e-4)).all())


def test_bound_holds_and_is_tight() -> None:
    weight = torch.randn(40, 60, generator=seeded(1))
    codes, scale = quantize_rows(weight)
    measured = float(torch.linalg.vector_norm(dequantize_rows(codes, scale).double() - weight.double()))
    assert 0.4 * rounding_bound(scale, 60) < measured <= rounding_bound(scale, 60)


@pytest.mark.parametrize("size", [1e-6, 1e-38, 1e-42, 5e-324, 3e38])
def test_extreme_rows_keep_finite_positive_scales(size: float) -> None:
    weight = torch.tensor([[size, -size / 2], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    codes, scale = quantize_rows(weight)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert codes[1].tolist() == [0, 0]
    assert scale[1] == 1.0
    error = (codes.double() * scale.double()[:, None] - weight).abs()
    assert bool((error <= 0.5 * scale.double()[:, None] * (1 + 1e-4)).all())


def test_small_rows_do_not_lose_digits() -> None:
    codes, _ = quantize_rows(torch.tensor([[1e-6, -5e-7, 1e-8]]))
    assert codes.tolist() == [[127, -64, 1]] or codes.tolist() == [[127, -63, 1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_named_with_its_index(value: float) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = value
    with pytest.raises(NumericsError, match=r"head: .*\[1, 2\]"):
        quantize_rows(weight, name="head")


def test_a_row_beyond_float32_is_refused() -> None:
    with pytest.raises(NumericsError, match="row 1 is too large"):
        quantize_rows(torch.tensor([[1.0], [1e300]], dtype=torch.float64))


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, "8", True, None])
def test_bits_outside_two_to_eight_are_refused(bits: object) -> None:
    with pytest.raises(RankError, match="2 to 8"):
        check_bits(bits)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single(shape: tuple[int, int]) -> None:
    codes, scale = quantize_rows(torch.ones(shape))
    assert codes.shape == shape
    assert scale.shape == shape[:1]
