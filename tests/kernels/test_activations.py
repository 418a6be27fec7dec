"""Activations as codes: zero exact, ranges kept, extremes finite; as digits: exact to the dtype."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import seeded
from torch import Tensor

from lowrank.kernels import quantize_tokens, split_tokens, wide_matmul
from lowrank.kernels.activations import pieces_for

EXTREMES = [0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 3.4e38]


def restored(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    codes, scale, offset = quantize_tokens(x, symmetric)
    assert codes.dtype == torch.int8
    shift = torch.zeros(()) if offset is None else offset
    return (codes.double() - shift.double()) * scale.double(), scale.double()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", EXTREMES)
def test_codes_are_within_half_a_step(symmetric: bool, size: float) -> None:
    x = (
        torch.rand(2000, 17, generator=seeded(3), dtype=torch.float64) * 2
        - 1
        + torch.linspace(-1.5, 1.5, 2000)[:, None]
    ) * size
    x = x.clamp(-3.4e38, 3.4e38).float()
    back, scale = restored(x, symmetric)
    assert bool(((back - x.double()).abs() <= scale * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_ties_and_one_sided_tokens_stay_in_range(symmetric: bool) -> None:
    ends = torch.linspace(-255, 255, 511)
    low, high = torch.meshgrid(ends, ends, indexing="ij")
    x = torch.stack([low.flatten(), high.flatten(), torch.zeros(low.numel())], dim=1)
    back, scale = restored(x, symmetric)
    assert bool(((back - x.double()).abs() <= scale * (0.5 + 1e-4)).all())
    assert bool((back[:, 2] == 0).all())


def test_asymmetric_halves_the_error_of_one_sided_tokens() -> None:
    x = torch.rand(500, 64, generator=seeded(4))
    errors = [float((restored(x, symmetric)[0] - x).norm()) for symmetric in (False, True)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [False, True])
def test_non_finite_tokens_have_non_finite_scales(value: float, symmetric: bool) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    _, scale, _ = quantize_tokens(x, symmetric)
    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("dtype", "pieces"), [(torch.float32, 1), (torch.float32, 2), (torch.float32, 3), (torch.float64, 7)]
)
@pytest.mark.parametrize("size", EXTREMES)
def test_digits_hold_the_token(dtype: torch.dtype, pieces: int, size: float) -> None:
    x = (torch.rand(400, 19, generator=seeded(5), dtype=torch.float64) * 2 - 1).to(dtype) * size
    x[0] = size
    x[1] = -size
    digits, unit = split_tokens(x, pieces)
    whole = sum(digits[p].to(torch.int64) << (8 * (pieces - 1 - p)) for p in range(pieces))
    assert isinstance(whole, Tensor)
    error = (whole.double() * unit.double() - x.double()).abs()
    floor = 2.0**-120 if dtype == torch.float32 else 0.0
    allowed = 2.0 ** (2 - 8 * pieces) * x.double().abs().amax(dim=1, keepdim=True) + floor * 2.0 ** (2 - 8 * pieces)
    if dtype == torch.float32:
        assert bool((error <= allowed.clamp_min(2.0 ** (-100 + 2 - 8 * pieces))).all())
    else:
        assert bool((error <= allowed).all())


def wide_product(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, codes, and their wide product."""
    x = torch.randn(64, 300, generator=seeded(6), dtype=dtype)
    codes = torch.randint(-127, 128, (50, 300), dtype=torch.int8, generator=seeded(7))
    sums, unit = wide_matmul(x, codes, pieces_for(dtype))
    return x, codes, sums * unit


def test_wide_product_of_float64_is_that_of_exact_rational_arithmetic() -> None:
    x, codes, product = wide_product(torch.float64)
    for row, column in ((0, 0), (3, 7), (63, 49)):
        true = sum(Fraction(float(a)) * int(b) for a, b in zip(x[row], codes[column], strict=True))
        size = float(x[row].abs() @ codes[column].double().abs())
        assert abs(float(Fraction(float(product[row, column])) - true)) <= 4 * torch.finfo(torch.float64).eps * size


def test_wide_product_of_float32_is_that_of_float64() -> None:
    x, codes, product = wide_product(torch.float32)
    exact = x.double() @ codes.double().T
    error = torch.linalg.vector_norm(product.double() - exact)
    size = torch.linalg.vector_norm(x.double().abs() @ codes.double().abs().T)
    assert float(error / size) <= torch.finfo(torch.float32).eps


def test_no_features_and_no_tokens() -> None:
    for shape in ((0, 5), (3, 0)):
        codes, scale, offset = quantize_tokens(torch.zeros(shape))
        assert codes.shape == shape
        assert scale.shape == (shape[0], 1)
        assert offset is not None
