"""Corrections for compressed layers before: what least squares says, and only where held-out tokens agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.feedback import gptq
from lowrank.numerics.grids import Grid, dequantize_groups
from lowrank.numerics.propagation import Propagated, choose_propagation, propagated_aim, qronos


def pairs(count: int, seed: int, *, bent: float = 0.4, features: int = 30) -> tuple[Tensor, Tensor]:
    """Inputs, and what a compressed prefix makes of them: a linear change, and noise that nothing can undo."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=torch.Generator().manual_seed(77))
    x = torch.randn(count, features, dtype=torch.float64, generator=generator) @ mixing
    noise = torch.randn(count, features, dtype=torch.float64, generator=generator)
    change = torch.randn(features, features, dtype=torch.float64, generator=torch.Generator().manual_seed(78))
    return x, x + bent * x @ change / features**0.5 + noise


def seen(x: Tensor, other: Tensor) -> Propagated:
    return Propagated(other.T @ other / len(x), x.T @ other / len(x))


def weights() -> Tensor:
    return torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def lost(weight: Tensor, made: Tensor, x: Tensor, other: Tensor) -> float:
    return float((x @ weight.T - other @ made.T).square().sum() / len(x))


def test_the_aim_is_the_least_squares_solution_and_a_ridge_draws_it_to_the_weight() -> None:
    weight, (x, other) = weights(), pairs(500, 1)
    inputs = seen(x, other)
    expected = torch.linalg.lstsq(other, x @ weight.T).solution.T
    torch.testing.assert_close(propagated_aim(weight, inputs, 0.0), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(propagated_aim(weight, inputs, 1e9), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(propagated_aim(weight, seen(x, x), 0.1), weight)
    nothing = Propagated(torch.zeros(30, 30).double(), torch.zeros(30, 30).double())
    assert torch.equal(propagated_aim(weight, nothing, 0.1), weight)
    # Two inputs that are always equal, and no ridge.
    x[:, 1], other[:, 1] = x[:, 0], other[:, 0]
    aim = propagated_aim(weight, seen(x, other), 0.0)
    assert bool(torch.isfinite(aim).all())


def test_the_cost_is_the_error_up_to_a_constant() -> None:
    weight, (x, other) = weights(), pairs(300, 2)
    made = weight + 0.1
    constant = float((x @ weight.T).square().sum() / len(x))
    assert seen(x, other).cost(weight, made) + constant == pytest.approx(lost(weight, made, x, other))


def test_correcting_helps_where_tokens_are_plenty() -> None:
    weight, grid = weights(), Grid(4, 15)
    x, other = pairs(4000, 1)
    new = pairs(1000, 3)
    made = dequantize_groups(*qronos(weight, grid, seen(x, other), ridge=0.03), grid, torch.float64)
    plain = dequantize_groups(*gptq(weight, grid, seen(x, other).moment), grid, torch.float64)
    assert lost(weight, made, *new) < 0.6 * lost(weight, plain, *new)
    ridge, rounded = choose_propagation(weight, grid, seen(x, other), seen(*new))
    chosen = dequantize_groups(*rounded, grid, torch.float64)
    assert ridge is not None and lost(weight, chosen, *new) <= lost(weight, made, *new)


def test_on_thin_data_it_is_left_out() -> None:
    """Noise alone, and hardly more tokens than inputs: a correction learns what will not come again."""
    weight, grid = weights(), Grid(4, 15)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2031, 30, dtype=torch.float64, generator=generator)
    other = x + torch.randn(2031, 30, dtype=torch.float64, generator=generator) * 0.2
    ridge, rounded = choose_propagation(
        weight, grid, seen(x[:31], other[:31]), seen(x[31:], other[31:]), ridges=(1e-6,)
    )
    assert ridge is None
    assert torch.equal(rounded.codes, gptq(weight, grid, seen(x[:31], other[:31]).moment).codes)


def test_moments_of_another_size_or_not_finite_are_refused() -> None:
    weight, inputs = weights(), seen(*pairs(100, 1))
    with pytest.raises(RankError, match=r"cross: must be \(30, 30\).*got \(29, 30\)"):
        propagated_aim(weight, Propagated(inputs.moment, inputs.cross[1:]), 0.1)
    inputs.cross[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="cross"):
        qronos(weight, Grid(4), inputs, ridge=0.1)
