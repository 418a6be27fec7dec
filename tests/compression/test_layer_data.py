"""What is predicted of a target is what is built: bytes to the byte, errors to a few per cent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.compression.formats import DENSE, INT8, LOWRANK, LOWRANK_INT8, Request, format_of
from lowrank.compression.layer_data import LayerData
from lowrank.compression.probes import smaller_specs, stored_bytes
from lowrank.compression.working_copy import WorkingCopy
from lowrank.layers import CompressedLayer
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets.survey import survey


def build(data: LayerData, spec: LayerSpec) -> dict[str, nn.Module]:
    """The layers that the spec makes of a target."""
    return format_of(spec).build(data, spec)


def linear_data(
    out: int, features: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, data: bool = True
) -> LayerData:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, out, bias=bias).to(dtype))
    rows = torch.randn(300, features) @ torch.diag(torch.logspace(0, -1, features)) + 0.3
    return LayerData(survey(model).targets[0], InputStatistics.from_samples(rows) if data else None, None)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_predicted_bytes_are_built_bytes(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    layer_data = linear_data(*shape, bias=bias, dtype=dtype)
    specs = smaller_specs(layer_data, ("int8", "lowrank", "lowrank-int8"), Request("auto"))
    assert {spec.format for spec in specs} == {"int8", "lowrank", "lowrank-int8"}
    for spec in specs:
        layer = build(layer_data, spec)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == stored_bytes(layer_data, spec) < stored_bytes(layer_data, DENSE), spec
        assert layer.format == spec.format and layer.rank == spec.rank


@pytest.mark.parametrize("table", [(300, 24), (20, 32)])
def test_embeddings_in_every_format(table: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(*table))
    counts = TokenCounts(table[0])
    counts.update(torch.arange(table[0]).repeat(3))
    layer_data = LayerData(survey(model).targets[0], None, counts)
    specs = smaller_specs(layer_data, ("int8", "lowrank", "lowrank-int8"), Request("auto"))
    assert {spec.format for spec in specs} == {"int8", "lowrank", "lowrank-int8"}
    for spec in specs:
        layer = build(layer_data, spec)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == stored_bytes(layer_data, spec), spec
        expected = layer.dense_weight()[:5]
        torch.testing.assert_close(layer(torch.arange(5)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [True, False])
def test_predicted_rounding_of_factors_is_that_of_the_built_layer(data: bool) -> None:
    layer_data = linear_data(64, 96, data=data)
    for rank in (8, 24, 38):
        kept = layer_data.curve(None).factors(rank)
        built = build(layer_data, LOWRANK_INT8.spec(rank, None, "float"))["0"]
        assert isinstance(built, CompressedLayer)
        difference = kept.left @ kept.right - built.dense_weight().double()
        measured = layer_data.squared_norm(difference) / layer_data.energy
        assert 0.7 * measured <= LOWRANK_INT8.rounding(layer_data, LOWRANK_INT8.spec(rank, None)) <= 1.4 * measured


def test_the_curve_is_the_error_of_the_built_layer() -> None:
    layer_data = linear_data(64, 96)
    for rank in (8, 24, 38):
        built = build(layer_data, LOWRANK.spec(rank, None))["0"]
        assert isinstance(built, CompressedLayer)
        # The ridge moves the curve a little from the error without it.
        assert abs(layer_data.error_of(built.dense_weight())[1] - float(layer_data.curve(None).errors[rank])) <= 0.02


def test_layers_are_built_once_and_dropped_when_no_longer_wanted() -> None:
    layer_data = linear_data(40, 64)
    copied = WorkingCopy(nn.Sequential(layer_data.target.owner), [layer_data])
    one, other = LOWRANK.spec(4, None), INT8.spec("int8")
    assert copied.build("0", one) is copied.build("0", one)
    kept = copied.build("0", other)
    copied.install("0", other)
    copied.release()
    assert copied.build("0", other) is kept
    assert list(copied._built["0"]) == [other]


def test_small_layers_offer_nothing_that_is_no_smaller() -> None:
    layer_data = linear_data(2, 2, bias=False)
    assert all(
        stored_bytes(layer_data, spec) < 16
        for spec in smaller_specs(layer_data, ("int8", "lowrank", "lowrank-int8"), Request("auto"))
    )
    assert smaller_specs(linear_data(1, 1), ("int8", "lowrank", "lowrank-int8"), Request("auto")) == []


def test_the_working_copy_leaves_the_original_alone_and_takes_layers_down_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    layers = [LayerData(target, None, None) for target in survey(model).targets]
    copied = WorkingCopy(model, layers)
    x = torch.randn(3, 40)
    copied.install("1", LOWRANK.spec(3, None))
    assert isinstance(copied.model[1], CompressedLayer) and isinstance(model[1], nn.Linear)  # type: ignore[index]
    assert copied.model[0].weight is model[0].weight  # type: ignore[index]
    copied.install("1", DENSE)
    assert torch.equal(copied.model(x), model(x))
    released = copied.release()
    assert released[0].weight is not model[0].weight  # type: ignore[index]


def gradient_moment(size: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (root * torch.logspace(0, -2, size, dtype=torch.float64)) @ root.T / size


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_with_gradients_the_curve_is_what_the_built_layer_costs_the_output(shape: tuple[int, int]) -> None:
    plain = linear_data(*shape)
    gradients = gradient_moment(shape[0])
    gradients = gradients @ gradients.T
    layer_data = LayerData(plain.target, plain.inputs, None, gradients=gradients)
    assert plain.inputs is not None
    moment = plain.inputs.moment(centred=True)
    weight = layer_data.weight.double()

    def cost(matrix: torch.Tensor) -> float:
        return float(torch.trace(gradients @ matrix @ moment @ matrix.T))

    for rank in (4, 12, 20):
        spec = LOWRANK.spec(rank, None)
        layers = [build(one, spec)["0"] for one in (layer_data, plain)]
        costs = [cost(weight - layer.dense_weight().detach().double()) / cost(weight) for layer in layers]
        # The ridges of the two metrics move the curve a little.
        assert costs[0] == pytest.approx(LOWRANK.local_error(layer_data, spec), rel=0.1, abs=2e-3)
        assert costs[0] < 0.9 * costs[1]
        # The report's errors stay those of the layer's own outputs, of which the plain factors are the best.
        assert plain.errors_of(layers[1])[1] < layer_data.errors_of(layers[0])[1]  # type: ignore[operator]
        assert layer_data.errors_of(layers[0])[1] == plain.errors_of(layers[0])[1]
        rounded = build(layer_data, LOWRANK_INT8.spec(rank, None, "float"))["0"]
        measured = cost(layers[0].dense_weight().detach().double() - rounded.dense_weight().double()) / cost(weight)
        assert 0.5 * measured <= LOWRANK_INT8.rounding(layer_data, spec) <= 2.0 * measured
    whole = build(layer_data, INT8.spec("float"))["0"]
    assert INT8.local_error(layer_data, INT8.reference_spec(layer_data)) == pytest.approx(
        cost(weight - whole.dense_weight().double()) / cost(weight), rel=0.05
    )
    full = layer_data.factors(None, min(shape))
    torch.testing.assert_close(full.left @ full.right, weight, rtol=1e-9, atol=1e-9)
