"""Factors of convolutions: errors are what is measured on the patches, at least as good as the plain SVD, and sharp."""

from __future__ import annotations

import math

import pytest
import torch
from conv_models import conv_of, correlated_images, image_for, reference
from helpers import seeded
from torch import Tensor, nn

from lowrank.errors import CalibrationError, NumericsError, RankError, UsageError
from lowrank.numerics.conv_factors import ConvFactors, compose, factorize_conv
from lowrank.numerics.convolutions import ConvGeometry, patches
from lowrank.numerics.factors import factorize
from lowrank.numerics.moments import InputStatistics


def kernel_of(factors: ConvFactors, groups: int = 1) -> Tensor:
    return compose(factors.first, factors.second, groups)


def statistics_of(conv: nn.Module, images: Tensor, groups: int = 1) -> InputStatistics:
    rows = patches(images, ConvGeometry.of(conv)).flatten(0, 1)
    statistics = InputStatistics(rows.shape[1], blocks=groups)
    statistics.update(rows)
    return statistics


def measured(conv: nn.Module, kernel: Tensor, images: Tensor, shift: Tensor | None) -> float:
    """Relative output error over all positions, the mean taken out of the reference where the bias was shifted."""
    expected = reference(images, conv.weight, None, conv).transpose(0, 1).flatten(1)
    actual = reference(images, kernel, shift, conv).transpose(0, 1).flatten(1)
    centre = expected.mean(dim=1, keepdim=True) if shift is not None else 0.0
    return float((actual - expected).norm() / (expected - centre).norm())


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3, (5, 3), (2, 4)])
def test_plain_errors_are_exact_and_full_rank_is_the_kernel(scheme: str, groups: int, kernel: object) -> None:
    weight = conv_of(2, (4, 8), kernel, groups=groups, dtype=torch.float64).weight.detach()
    curve = factorize_conv(weight, scheme=scheme, groups=groups)
    _, inputs, height, width = weight.shape
    outputs = 8 // groups
    sides = (inputs * height, outputs * width) if scheme == "spatial" else (inputs * height * width, outputs)
    assert curve.max_rank == min(sides)
    assert (curve.method, curve.scheme) == ("svd", scheme)
    assert curve.energy == pytest.approx(float(weight.square().sum()), rel=1e-12)
    for rank in range(1, curve.max_rank + 1):
        factors = curve.factors(rank)
        assert factors.rank == rank
        assert factors.bias_shift is None
        assert factors.first.shape[:2] == (rank * groups, inputs)
        assert factors.second.shape[:2] == (8, rank)
        error = float((kernel_of(factors, groups) - weight).norm() / weight.norm())
        assert error == pytest.approx(float(curve.errors[rank]), abs=1e-13)
    assert curve.errors[-1] < 1e-14
    assert curve.rank_for_error(0.0) <= curve.max_rank
    assert curve.rank_for_error(float(curve.errors[1])) == 1


def test_channel_form_is_the_linear_case() -> None:
    conv = conv_of(2, (4, 8), 3, padding=1, dtype=torch.float64)
    statistics = statistics_of(conv, correlated_images(4))
    ours, linear = (
        factorize_conv(conv.weight, statistics, ridge=1e-3),
        factorize(conv.weight.flatten(1), statistics, ridge=1e-3),
    )
    assert torch.equal(ours.errors, linear.errors)
    found, expected = ours.factors(3), linear.factors(3)
    assert torch.equal(found.first.flatten(1), expected.right)
    assert torch.equal(found.second.flatten(1), expected.left)
    assert found.bias_shift is not None
    assert expected.bias_shift is not None
    assert torch.equal(found.bias_shift, expected.bias_shift)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_errors_are_those_of_the_calibration_outputs(scheme: str, groups: int, bias: bool) -> None:
    conv = conv_of(2, (4, 8), (3, 5), stride=(1, 2), padding=(1, 2), groups=groups, dtype=torch.float64)
    images = correlated_images(4)
    statistics = statistics_of(conv, images, groups)
    curve = factorize_conv(conv.weight, statistics, scheme=scheme, groups=groups, shift_bias=bias)
    plain = factorize_conv(conv.weight, scheme=scheme, groups=groups)
    assert curve.method == "output"
    means = statistics.mean.unflatten(0, (groups, -1))
    for rank in range(1, curve.max_rank + 1):
        factors = curve.factors(rank)
        assert (factors.bias_shift is not None) == bias
        error = measured(conv, kernel_of(factors, groups), images, factors.bias_shift)
        known = float(curve.errors[rank])
        # The spatial form refines the rank that is asked for; its curve says what nested factors reach.
        assert error <= known + 1e-7
        if scheme == "channel":
            assert error == pytest.approx(known, abs=1e-7)
        else:
            assert error >= 0.8 * known - 1e-7
        other = kernel_of(plain.factors(rank), groups)
        lost = (conv.weight.detach() - other).flatten(1).unflatten(0, (groups, -1))
        shift = torch.einsum("gof,gf->go", lost, means).flatten() if bias else None
        assert error <= measured(conv, other, images, shift) * (1 + 1e-9) + 1e-9


def test_spatial_form_gains_by_the_metric() -> None:
    conv = conv_of(2, (8, 8), 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=seeded(2), dtype=torch.float64))
    statistics = statistics_of(conv, correlated_images(8))
    moment = statistics.moment(centred=True)
    curve, plain = (factorize_conv(conv.weight, given, scheme="spatial") for given in (statistics, None))

    def error(kernel: Tensor) -> float:
        lost = (conv.weight.detach() - kernel).flatten(1)
        return math.sqrt(float(((lost @ moment) * lost).sum()) / curve.energy)

    for rank in (2, 4, 8, 16):
        fitted = error(kernel_of(curve.factors(rank)))
        assert fitted < 0.9 * error(kernel_of(plain.factors(rank)))
        # Refining is worth something, and the curve is the error of what is not refined.
        assert fitted < float(curve.errors[rank]) < 1.3 * fitted


def test_second_kernel_is_the_least_squares_fit() -> None:
    conv = conv_of(2, (4, 8), 3, padding=1, dtype=torch.float64)
    statistics = statistics_of(conv, correlated_images(4))
    factors = factorize_conv(conv.weight, statistics, scheme="spatial", shift_bias=False).factors(3)
    rows = patches(correlated_images(4), ConvGeometry.of(conv)).flatten(0, 1)
    wanted = rows @ conv.weight.detach().flatten(1).T
    # Outputs are linear in the second kernel: columns are the first's responses at each offset along the width.
    first = factors.first.flatten(1)
    offsets = rows.unflatten(1, (4, 3, 3)).permute(0, 3, 1, 2).flatten(2)
    design = (offsets @ first.T).flatten(1)
    best = torch.linalg.lstsq(design, wanted).solution
    floor = float((design @ best - wanted).norm() / wanted.norm())
    reached = float((rows @ (kernel_of(factors) - conv.weight.detach()).flatten(1).T).norm() / wanted.norm())
    assert reached == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_few_patches_leave_a_singular_moment(scheme: str) -> None:
    conv = conv_of(2, (4, 8), 3, dtype=torch.float64)
    statistics = InputStatistics.from_samples(torch.randn(5, 36, generator=seeded(5)))
    curve = factorize_conv(conv.weight, statistics, scheme=scheme)
    for rank in (1, 4, curve.max_rank):
        factors = curve.factors(rank)
        assert bool(torch.isfinite(factors.first).all())
        assert bool(torch.isfinite(factors.second).all())
    full = kernel_of(curve.factors(curve.max_rank))
    torch.testing.assert_close(full, conv.weight.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_constant_patches_and_zero_kernels(scheme: str) -> None:
    conv = conv_of(2, (2, 3), 3, dtype=torch.float64)
    constant = InputStatistics.from_samples(torch.ones(10, 18))
    curve = factorize_conv(conv.weight, constant, scheme=scheme)
    # Nothing varies: with the mean in the bias every rank is exact on the patches that were seen.
    assert float(curve.errors[1]) == 0.0
    factors = curve.factors(1)
    assert factors.bias_shift is not None
    lost = (conv.weight.detach() - kernel_of(factors)).flatten(1).sum(dim=1)
    torch.testing.assert_close(factors.bias_shift, lost)
    zero = factorize_conv(torch.zeros(3, 2, 3, 3), constant, scheme=scheme)
    assert float(kernel_of(zero.factors(1)).abs().max()) == 0.0


@pytest.mark.parametrize("size", [1e-37, 1e37])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_scale_changes_nothing(scheme: str, size: float) -> None:
    weight = conv_of(2, (4, 6), 3, dtype=torch.float64).weight.detach()
    statistics = InputStatistics.from_samples(torch.randn(500, 36, generator=seeded(5)))
    one = factorize_conv(weight, statistics, scheme=scheme).errors
    torch.testing.assert_close(
        factorize_conv(weight * size, statistics, scheme=scheme).errors, one, rtol=1e-7, atol=1e-9
    )


def test_one_dimension_has_the_channel_form_only() -> None:
    conv = conv_of(1, (4, 8), 5, dtype=torch.float64)
    factors = factorize_conv(conv.weight).factors(2)
    assert factors.first.shape == (2, 4, 5)
    assert factors.second.shape == (8, 2, 1)
    torch.testing.assert_close(
        kernel_of(factorize_conv(conv.weight).factors(8)), conv.weight.detach(), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(UsageError, match="two dimensions"):
        factorize_conv(conv.weight, scheme="spatial")


def test_bad_arguments_are_named() -> None:
    weight = torch.randn(6, 2, 3, 3, generator=seeded())
    with pytest.raises(UsageError, match="scheme"):
        factorize_conv(weight, scheme="tucker")
    with pytest.raises(RankError, match="multiple of 4 groups"):
        factorize_conv(weight, groups=4)
    with pytest.raises(RankError, match="shape"):
        factorize_conv(weight[:, :0])
    with pytest.raises(CalibrationError, match="patches have 36"):
        factorize_conv(weight, InputStatistics.from_samples(torch.ones(2, 18)), groups=2)
    for rank in (0, 7, 2.0, True):
        with pytest.raises(RankError):
            factorize_conv(weight).factors(rank)  # type: ignore[arg-type]
    weight[1, 0, 2, 1] = math.nan
    for scheme in ("channel", "spatial"):
        with pytest.raises(NumericsError):
            factorize_conv(weight, scheme=scheme)


def test_same_input_same_bytes() -> None:
    conv = conv_of(2, (4, 8), 3, padding=1)
    statistics = statistics_of(conv, image_for(conv, 20))
    one, other = (factorize_conv(conv.weight, statistics, scheme="spatial").factors(5) for _ in range(2))
    assert torch.equal(one.first, other.first)
    assert torch.equal(one.second, other.second)
