"""What the workshop of a convolution predicts is what it builds: bytes to the byte, errors in the metric of the patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_models import with_falling_spectra
from helpers import seeded
from torch import nn
from torch.nn import functional as F

from lowrank.calibration.inputs import collect_statistics
from lowrank.compression.workshop import Choice
from lowrank.compression.workshop_conv import ConvWorkshop
from lowrank.layers import CompressedLayer
from lowrank.targets.survey import survey

FORMATS = ("int8", "lowrank", "lowrank-int8")


def shop_of(conv: nn.Module, *, data: bool = True) -> ConvWorkshop:
    """The convolution with smooth inputs of mean 0.3 in front of it."""
    model = with_falling_spectra(nn.Sequential(conv))
    target = survey(model).targets[0]
    flat = isinstance(conv, nn.Conv1d)
    noise = torch.randn(24, conv.in_channels, *([18] if flat else [18, 18]), generator=seeded(1))  # type: ignore[arg-type]
    smooth = F.avg_pool1d(noise, 3, 1) if flat else F.avg_pool2d(noise, 3, 1)
    dtype = next(model.parameters()).dtype
    batches = [(2.0 * smooth + 0.3).to(dtype)]
    statistics = collect_statistics(model, batches, {"0": model[0]})["0"] if data else None  # type: ignore[index]
    return ConvWorkshop(target, statistics, None)  # type: ignore[arg-type]


def convolutions() -> list[tuple[str, dict[str, Any], type[nn.Module]]]:
    return [
        ("square", {"kernel_size": 3, "padding": 1}, nn.Conv2d),
        ("oblong", {"kernel_size": (5, 2), "stride": 2}, nn.Conv2d),
        ("point", {"kernel_size": 1}, nn.Conv2d),
        ("tall", {"kernel_size": (3, 1)}, nn.Conv2d),
        ("groups", {"kernel_size": 3, "groups": 4}, nn.Conv2d),
        ("depthwise", {"kernel_size": 5, "groups": 16}, nn.Conv2d),
        ("text", {"kernel_size": 5, "dilation": 2}, nn.Conv1d),
        ("text groups", {"kernel_size": 3, "groups": 2}, nn.Conv1d),
    ]


@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_built_bytes(case: tuple[str, dict[str, Any], Any], bias: bool, dtype: torch.dtype) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    shop = shop_of(kind(16, 32, bias=bias, dtype=dtype, **options))
    choices = shop.choices(FORMATS, "auto")
    assert {"int8"} <= {choice.format for choice in choices}
    for choice in choices:
        layer = shop.build(choice)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == shop.bytes(choice) < shop.bytes(Choice("dense")), choice
        assert (layer.format, layer.rank) == (choice.format, choice.rank)
        assert getattr(layer, "scheme", None) == choice.scheme
        assert tuple(layer.shape) == shop.target.shape == tuple(layer.dense_weight().shape)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_the_curve_is_the_error_of_the_built_layer(case: tuple[str, dict[str, Any], Any], data: bool) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    shop = shop_of(kind(16, 32, **options), data=data)
    seen = 0
    for choice in shop.by_size("lowrank")[::4]:
        layer = shop.build(choice)["0"]
        assert isinstance(layer, CompressedLayer)
        measured = shop.error_of(layer.dense_weight())[1 if data else 0]
        # The ridge moves the curve a little from the error without it.
        assert abs(measured - shop.truncation(choice) ** 0.5) <= 0.02, choice
        seen += 1
    assert seen or case[0] == "depthwise"


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_predicted_rounding_is_that_of_the_built_layer(case: tuple[str, dict[str, Any], Any], data: bool) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    shop = shop_of(kind(16, 32, **options), data=data)
    whole = shop.build(Choice("int8", None, 8, "float"))["0"]
    assert isinstance(whole, CompressedLayer)
    measured = shop.error_of(whole.dense_weight())[1 if data else 0] ** 2
    assert shop.rounding == pytest.approx(measured, rel=1e-3)
    for scheme in shop.schemes:
        for rank in shop.ranks("lowrank-int8", scheme)[2::6]:
            thin = shop.build(Choice("lowrank", rank, scheme=scheme))["0"]
            rounded = shop.build(Choice("lowrank-int8", rank, 8, "float", scheme))["0"]
            assert isinstance(thin, CompressedLayer) and isinstance(rounded, CompressedLayer)
            difference = (thin.dense_weight().detach().double() - rounded.dense_weight().double()).flatten(1)
            measured = shop._norm(difference) / shop.energy
            predicted = shop.rounding_of_factors(Choice("lowrank-int8", rank, 8, "float", scheme))
            assert 0.5 * measured <= predicted <= 2.0 * measured, (scheme, rank)


def test_the_error_in_the_metric_of_the_patches_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=False, groups=2)
    model = with_falling_spectra(nn.Sequential(conv)).double()
    x = torch.randn(6, 8, 10, 10, generator=seeded(), dtype=torch.float64)
    statistics = collect_statistics(model, [x], {"0": conv})["0"]
    shop = ConvWorkshop(survey(model).targets[0], statistics, None)  # type: ignore[arg-type]
    other = conv.weight.detach() + 0.01 * torch.randn(conv.weight.shape, generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        expected = conv(x)
        found = F.conv2d(x, other, padding=1, groups=2)
    measured = float((found - expected).norm() / expected.norm())
    assert shop.error_of(other)[1] == pytest.approx(measured, rel=1e-9)


def test_both_schemes_are_offered_where_each_is_the_better_one() -> None:
    generator = seeded()
    separable = torch.einsum(
        "pia,opb->oiab",
        torch.randn(3, 16, 3, generator=generator),
        torch.randn(32, 3, 3, generator=generator),
    )
    few = torch.einsum(
        "op,piab->oiab", torch.randn(32, 3, generator=generator), torch.randn(3, 16, 3, 3, generator=generator)
    )
    for kernel, wanted in ((separable, "spatial"), (few, "channel")):
        conv = nn.Conv2d(16, 32, 3)
        conv.weight = nn.Parameter(kernel + 1e-3 * torch.randn(kernel.shape, generator=generator))
        shop = ConvWorkshop(survey(nn.Sequential(conv)).targets[0], None, None)
        good = [choice for choice in shop.by_size("lowrank") if shop.truncation(choice) <= 1e-4]
        assert good[0].scheme == wanted and good[0].rank == 3
        sizes = [shop.bytes(choice) for choice in shop.by_size("lowrank")]
        errors = [shop.truncation(choice) for choice in shop.by_size("lowrank")]
        assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_kernels_without_two_sides_have_one_scheme() -> None:
    assert shop_of(nn.Conv2d(4, 4, 1)).schemes == ("channel",)
    assert shop_of(nn.Conv2d(4, 4, (3, 1))).schemes == ("channel",)
    assert shop_of(nn.Conv1d(4, 4, 3)).schemes == ("channel",)
    assert shop_of(nn.Conv2d(4, 4, 3)).schemes == ("channel", "spatial")


@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_with_gradients_the_curve_is_what_the_built_layer_costs_the_output(
    case: tuple[str, dict[str, Any], Any],
) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    plain = shop_of(kind(16, 32, **options))
    root = torch.randn(32, 32, generator=seeded(7), dtype=torch.float64)
    gradients = root @ torch.diag(torch.logspace(0, -3, 32, dtype=torch.float64)) @ root.T
    shop = ConvWorkshop(plain.target, plain.inputs, None, gradients=gradients)
    blocks = torch.block_diag(
        *(gradients[at : at + 32 // shop.groups, at : at + 32 // shop.groups] for at in range(0, 32, 32 // shop.groups))
    )
    values, vectors = torch.linalg.eigh(blocks)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    kernel = shop.kernel.double().flatten(1)

    def cost(matrix: torch.Tensor) -> float:
        return plain._norm(half @ matrix)

    seen = 0
    for choice in shop.by_size("lowrank")[1::5]:
        layer = shop.build(choice)["0"]
        measured = cost(kernel - layer.dense_weight().detach().double().flatten(1)) / cost(kernel)
        assert measured == pytest.approx(shop.truncation(choice), rel=0.15, abs=3e-3), choice
        rounded = shop.build(replace(choice, format="lowrank-int8", bits=8, activations="float"))["0"]
        lost = cost((layer.dense_weight().detach().double() - rounded.dense_weight().double()).flatten(1)) / cost(
            kernel
        )
        assert 0.4 * lost <= shop.rounding_of_factors(choice) <= 2.5 * lost, choice
        seen += 1
    assert seen or case[0] == "depthwise"
