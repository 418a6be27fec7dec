"""Shared by all tests: matrices with a known answer, and the one judge that every layer faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["assert_matches_dense", "assert_same_state", "eps", "matrix_with_spectrum", "seeded"]


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator of its own, so that one test's draws never move another's."""
    return torch.Generator().manual_seed(seed)


def eps(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of this dtype."""
    return torch.finfo(dtype).eps


def matrix_with_spectrum(
    m: int, n: int, sigma: Sequence[float] | Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """(m, n) float64 with exactly these singular values (to eps), in random orthonormal bases.

    Args:
        sigma: at most min(m, n) values, in any order; missing ones are 0.
    """
    values = torch.as_tensor(sigma, dtype=torch.float64)
    assert values.ndim == 1
    assert values.numel() <= min(m, n)
    generator = seeded() if generator is None else generator
    left: Tensor = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64, generator=generator))[0]
    right: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    k = values.numel()
    return (left[:, :k] * values) @ right[:, :k].T


def assert_matches_dense(
    layer: Callable[[Tensor], Tensor] | Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    extra: Tensor | float = 0.0,
    safety: float = 4.0,
) -> None:
    """The layer's output is ``inputs @ weightᵀ + bias`` in float64, up to rounding in the output's dtype.

    The tolerance is per element: ``safety · eps · (√in + 2) · (|x| @ magnitudeᵀ + |b|) + extra``. √in is what rounding
    errors of a sum come to in practice; cancellation is paid for by the magnitudes.

    Args:
        layer: a module (or function), or its output.
        inputs: (..., in).
        weight: (out, in), the dense reference.
        magnitude: (out, in), not negative; default |weight|. For factors pass ``left.abs() @ right.abs()``.
        extra: absolute allowance on top, for a layer whose arithmetic is meant to differ (rounded activations).
    """
    actual = layer if isinstance(layer, Tensor) else layer(inputs)
    x, w = inputs.detach().double(), weight.detach().double()
    expected = x @ w.T
    size = x.abs() @ (w.abs() if magnitude is None else magnitude.detach().double()).T
    if bias is not None:
        expected = expected + bias.detach().double()
        size = size + bias.detach().double().abs()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), "non-finite output"
    tolerance = safety * eps(actual.dtype) * (x.shape[-1] ** 0.5 + 2.0) * size + extra
    excess = (actual.detach().double() - expected).abs() - tolerance
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0.0, f"largest error is {worst:.3e} above the tolerance of {float(tolerance.max()):.3e}"


def assert_same_state(actual: nn.Module | Mapping[str, Tensor], expected: nn.Module | Mapping[str, Tensor]) -> None:
    """Two models, or two maps of tensors, hold the same names, dtypes, shapes and bits; and some do."""
    found = actual.state_dict() if isinstance(actual, nn.Module) else actual
    wanted = expected.state_dict() if isinstance(expected, nn.Module) else expected
    assert wanted, "nothing to compare"
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
