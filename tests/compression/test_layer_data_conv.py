"""What is predicted of a convolution is what is built: bytes to the byte, errors in the norm of the patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_models import with_falling_spectra
from helpers import seeded
from torch import nn
from torch.nn import functional as F

from lowrank.calibration.inputs import collect_statistics
from lowrank.compression.formats import DENSE, INT8, LOWRANK, LOWRANK_INT8, Request, format_of
from lowrank.compression.layer_data import LayerData
from lowrank.compression.probes import smaller_specs, stored_bytes
from lowrank.layers import CompressedLayer
from lowrank.layers.spec import LayerSpec
from lowrank.targets.survey import survey

FORMATS = ("int8", "lowrank", "lowrank-int8")


def build(data: LayerData, spec: LayerSpec) -> dict[str, nn.Module]:
    """The layers that the spec makes of a target."""
    return format_of(spec).build(data, spec)


def data_of(conv: nn.Module, *, data: bool = True) -> LayerData:
    """The convolution with smooth inputs of mean 0.3 in front of it."""
    model = with_falling_spectra(nn.Sequential(conv))
    target = survey(model).targets[0]
    flat = isinstance(conv, nn.Conv1d)
    noise = torch.randn(24, conv.in_channels, *([18] if flat else [18, 18]), generator=seeded(1))  # type: ignore[arg-type]
    smooth = F.avg_pool1d(noise, 3, 1) if flat else F.avg_pool2d(noise, 3, 1)
    dtype = next(model.parameters()).dtype
    batches = [(2.0 * smooth + 0.3).to(dtype)]
    statistics = collect_statistics(model, batches, {"0": model[0]})["0"] if data else None  # type: ignore[index]
    return LayerData(target, statistics, None)  # type: ignore[arg-type]


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
    layer_data = data_of(kind(16, 32, bias=bias, dtype=dtype, **options))
    specs = smaller_specs(layer_data, FORMATS, Request("auto"))
    assert {"int8"} <= {spec.format for spec in specs}
    for spec in specs:
        layer = build(layer_data, spec)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == stored_bytes(layer_data, spec) < stored_bytes(layer_data, DENSE), spec
        assert (layer.format, layer.rank) == (spec.format, spec.rank)
        assert getattr(layer, "scheme", None) == spec.scheme
        assert tuple(layer.shape) == layer_data.target.shape == tuple(layer.dense_weight().shape)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_the_curve_is_the_error_of_the_built_layer(case: tuple[str, dict[str, Any], Any], data: bool) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    layer_data = data_of(kind(16, 32, **options), data=data)
    seen = 0
    for spec in LOWRANK.by_size(layer_data)[::4]:
        layer = build(layer_data, spec)["0"]
        assert isinstance(layer, CompressedLayer)
        measured = layer_data.error_of(layer.dense_weight())[1 if data else 0]
        # The ridge moves the curve a little from the error without it.
        assert abs(measured - LOWRANK.local_error(layer_data, spec) ** 0.5) <= 0.02, spec
        seen += 1
    assert seen or case[0] == "depthwise"


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_predicted_rounding_is_that_of_the_built_layer(case: tuple[str, dict[str, Any], Any], data: bool) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    layer_data = data_of(kind(16, 32, **options), data=data)
    whole = build(layer_data, INT8.spec("float"))["0"]
    assert isinstance(whole, CompressedLayer)
    measured = layer_data.error_of(whole.dense_weight())[1 if data else 0] ** 2
    assert INT8.local_error(layer_data, INT8.reference_spec(layer_data)) == pytest.approx(measured, rel=1e-3)
    for scheme in layer_data.schemes:
        for rank in LOWRANK_INT8.ranks(layer_data, scheme)[2::6]:
            thin = build(layer_data, LOWRANK.spec(rank, scheme))["0"]
            rounded = build(layer_data, LOWRANK_INT8.spec(rank, scheme, "float"))["0"]
            assert isinstance(thin, CompressedLayer) and isinstance(rounded, CompressedLayer)
            difference = (thin.dense_weight().detach().double() - rounded.dense_weight().double()).flatten(1)
            measured = layer_data.squared_norm(difference) / layer_data.energy
            predicted = LOWRANK_INT8.rounding(layer_data, LOWRANK_INT8.spec(rank, scheme, "float"))
            assert 0.5 * measured <= predicted <= 2.0 * measured, (scheme, rank)


def test_the_error_in_the_metric_of_the_patches_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=False, groups=2)
    model = with_falling_spectra(nn.Sequential(conv)).double()
    x = torch.randn(6, 8, 10, 10, generator=seeded(), dtype=torch.float64)
    statistics = collect_statistics(model, [x], {"0": conv})["0"]
    layer_data = LayerData(survey(model).targets[0], statistics, None)  # type: ignore[arg-type]
    other = conv.weight.detach() + 0.01 * torch.randn(conv.weight.shape, generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        expected = conv(x)
        found = F.conv2d(x, other, padding=1, groups=2)
    measured = float((found - expected).norm() / expected.norm())
    assert layer_data.error_of(other)[1] == pytest.approx(measured, rel=1e-9)


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
        layer_data = LayerData(survey(nn.Sequential(conv)).targets[0], None, None)
        good = [spec for spec in LOWRANK.by_size(layer_data) if LOWRANK.local_error(layer_data, spec) <= 1e-4]
        assert good[0].scheme == wanted and good[0].rank == 3
        sizes = [stored_bytes(layer_data, spec) for spec in LOWRANK.by_size(layer_data)]
        errors = [LOWRANK.local_error(layer_data, spec) for spec in LOWRANK.by_size(layer_data)]
        assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_kernels_without_two_sides_have_one_scheme() -> None:
    assert data_of(nn.Conv2d(4, 4, 1)).schemes == ("channel",)
    assert data_of(nn.Conv2d(4, 4, (3, 1))).schemes == ("channel",)
    assert data_of(nn.Conv1d(4, 4, 3)).schemes == ("channel",)
    assert data_of(nn.Conv2d(4, 4, 3)).schemes == ("channel", "spatial")


@pytest.mark.parametrize("case", convolutions(), ids=lambda case: case[0])
def test_with_gradients_the_curve_is_what_the_built_layer_costs_the_output(
    case: tuple[str, dict[str, Any], Any],
) -> None:
    _, options, kind = case
    torch.manual_seed(0)
    plain = data_of(kind(16, 32, **options))
    root = torch.randn(32, 32, generator=seeded(7), dtype=torch.float64)
    gradients = root @ torch.diag(torch.logspace(0, -3, 32, dtype=torch.float64)) @ root.T
    layer_data = LayerData(plain.target, plain.inputs, None, gradients=gradients)
    blocks = torch.block_diag(
        *(
            gradients[at : at + 32 // layer_data.blocks, at : at + 32 // layer_data.blocks]
            for at in range(0, 32, 32 // layer_data.blocks)
        )
    )
    values, vectors = torch.linalg.eigh(blocks)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    kernel = layer_data.weight.double().flatten(1)

    def cost(matrix: torch.Tensor) -> float:
        return plain.squared_norm(half @ matrix)

    seen = 0
    for spec in LOWRANK.by_size(layer_data)[1::5]:
        layer = build(layer_data, spec)["0"]
        measured = cost(kernel - layer.dense_weight().detach().double().flatten(1)) / cost(kernel)
        assert measured == pytest.approx(LOWRANK.local_error(layer_data, spec), rel=0.15, abs=3e-3), spec
        rounded = build(layer_data, LOWRANK_INT8.spec(spec.rank, spec.scheme, "float"))["0"]
        lost = cost((layer.dense_weight().detach().double() - rounded.dense_weight().double()).flatten(1)) / cost(
            kernel
        )
        assert 0.4 * lost <= LOWRANK_INT8.rounding(layer_data, spec) <= 2.5 * lost, spec
        seen += 1
    assert seen or case[0] == "depthwise"
