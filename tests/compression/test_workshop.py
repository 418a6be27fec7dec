"""What a workshop predicts is what it builds: bytes to the byte, errors to a few per cent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.compression.working_copy import Bench
from lowrank.compression.workshop import Choice, Workshop
from lowrank.layers import CompressedLayer
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets.survey import survey


def linear_shop(
    out: int, features: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, data: bool = True
) -> Workshop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, out, bias=bias).to(dtype))
    rows = torch.randn(300, features) @ torch.diag(torch.logspace(0, -1, features)) + 0.3
    return Workshop(survey(model).targets[0], InputStatistics.from_samples(rows) if data else None, None)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_predicted_bytes_are_built_bytes(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    shop = linear_shop(*shape, bias=bias, dtype=dtype)
    for choice in shop.choices(("int8", "lowrank", "lowrank-int8"), "auto"):
        layer = shop.build(choice)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == shop.bytes(choice) < shop.bytes(Choice("dense")), choice
        assert layer.format == choice.format and layer.rank == choice.rank


@pytest.mark.parametrize("table", [(300, 24), (20, 32)])
def test_embeddings_in_every_format(table: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(*table))
    counts = TokenCounts(table[0])
    counts.update(torch.arange(table[0]).repeat(3))
    shop = Workshop(survey(model).targets[0], None, counts)
    choices = shop.choices(("int8", "lowrank", "lowrank-int8"), "auto")
    assert {choice.format for choice in choices} == {"int8", "lowrank", "lowrank-int8"}
    for choice in choices:
        layer = shop.build(choice)["0"]
        assert isinstance(layer, CompressedLayer)
        assert layer.stored_bytes == shop.bytes(choice), choice
        expected = layer.dense_weight()[:5]
        torch.testing.assert_close(layer(torch.arange(5)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [True, False])
def test_predicted_rounding_of_factors_is_that_of_the_built_layer(data: bool) -> None:
    shop = linear_shop(64, 96, data=data)
    for rank in (8, 24, 38):
        kept = shop.curve.factors(rank)
        built = shop.build(Choice("lowrank-int8", rank, 8, "float"))["0"]
        assert isinstance(built, CompressedLayer)
        difference = kept.left @ kept.right - built.dense_weight().double()
        measured = shop._norm(difference) / shop.energy
        assert 0.7 * measured <= float(shop.factor_rounding[rank]) <= 1.4 * measured


def test_the_curve_is_the_error_of_the_built_layer() -> None:
    shop = linear_shop(64, 96)
    for rank in (8, 24, 38):
        built = shop.build(Choice("lowrank", rank))["0"]
        assert isinstance(built, CompressedLayer)
        # The ridge moves the curve a little from the error without it.
        assert abs(shop.error_of(built.dense_weight())[1] - float(shop.curve.errors[rank])) <= 0.02


def test_layers_are_built_once_and_dropped_when_no_longer_wanted() -> None:
    shop = linear_shop(40, 64)
    one, other = Choice("lowrank", 4), Choice("int8", None, 8, "int8")
    assert shop.build(one) is shop.build(one)
    kept = shop.build(other)
    shop.keep_only(other)
    assert shop.build(other) is kept
    assert list(shop._built) == [other]


def test_small_layers_offer_nothing_that_is_no_smaller() -> None:
    shop = linear_shop(2, 2, bias=False)
    assert all(shop.bytes(choice) < 16 for choice in shop.choices(("int8", "lowrank", "lowrank-int8"), "auto"))
    assert linear_shop(1, 1).choices(("int8", "lowrank", "lowrank-int8"), "auto") == []


def test_the_bench_leaves_the_original_alone_and_takes_layers_down_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    shops = [Workshop(target, None, None) for target in survey(model).targets]
    bench = Bench(model, shops)
    x = torch.randn(3, 40)
    bench.install("1", Choice("lowrank", 3))
    assert isinstance(bench.model[1], CompressedLayer) and isinstance(model[1], nn.Linear)  # type: ignore[index]
    assert bench.model[0].weight is model[0].weight  # type: ignore[index]
    bench.install("1", Choice("dense"))
    assert torch.equal(bench.model(x), model(x))
    released = bench.release()
    assert released[0].weight is not model[0].weight  # type: ignore[index]


def gradient_moment(size: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (root * torch.logspace(0, -2, size, dtype=torch.float64)) @ root.T / size


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_with_gradients_the_curve_is_what_the_built_layer_costs_the_output(shape: tuple[int, int]) -> None:
    plain = linear_shop(*shape)
    gradients = gradient_moment(shape[0])
    gradients = gradients @ gradients.T
    shop = Workshop(plain.target, plain.inputs, None, gradients=gradients)
    assert plain.inputs is not None
    moment = plain.inputs.moment(centred=True)
    weight = shop.weight.double()

    def cost(matrix: torch.Tensor) -> float:
        return float(torch.trace(gradients @ matrix @ moment @ matrix.T))

    for rank in (4, 12, 20):
        choice = Choice("lowrank", rank)
        layers = [one.build(choice)["0"] for one in (shop, plain)]
        costs = [cost(weight - layer.dense_weight().detach().double()) / cost(weight) for layer in layers]
        # The ridges of the two metrics move the curve a little.
        assert costs[0] == pytest.approx(shop.truncation(choice), rel=0.1, abs=2e-3)
        assert costs[0] < 0.9 * costs[1]
        # The report's errors stay those of the layer's own outputs, of which the plain factors are the best.
        assert plain.errors_of(layers[1])[1] < shop.errors_of(layers[0])[1]  # type: ignore[operator]
        assert shop.errors_of(layers[0])[1] == plain.errors_of(layers[0])[1]
        rounded = shop.build(Choice("lowrank-int8", rank, 8, "float"))["0"]
        measured = cost(layers[0].dense_weight().detach().double() - rounded.dense_weight().double()) / cost(weight)
        assert 0.5 * measured <= shop.rounding_of_factors(choice) <= 2.0 * measured
    whole = shop.build(Choice("int8", None, 8, "float"))["0"]
    assert shop.rounding == pytest.approx(cost(weight - whole.dense_weight().double()) / cost(weight), rel=0.05)
    full = shop.factors(min(shape))
    torch.testing.assert_close(full.left @ full.right, weight, rtol=1e-9, atol=1e-9)
