"""Where an adapter starts: at random as PEFT, from singular vectors, or from what compression removed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import matrix_with_spectrum, seeded
from lora_bases import close, only_layer
from lora_models import random_adapter, rows, two_linear
from torch import Tensor, nn

import lowrank
from lowrank.lora.adapters import lora_layers
from lowrank.lora.bases import exact_weight
from lowrank.numerics.moments import InputStatistics, TokenCounts


def dense(out: int = 10, width: int = 12, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    linear = nn.Linear(width, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix_with_spectrum(out, width, [2.0**-k for k in range(min(out, width))]))
    return nn.Sequential(linear)


def delta(model: nn.Module) -> Tensor:
    change = only_layer(model).change()
    return change.left @ change.right


def tokens(width: int = 12, count: int = 500) -> Tensor:
    """Correlated, and not centred."""
    mix = torch.randn(width, width, generator=seeded(1), dtype=torch.float64) * 2.0 ** -torch.arange(width)
    return torch.randn(count, width, generator=seeded(2), dtype=torch.float64) @ mix.T + 0.7


def test_random_starts_have_their_distribution() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(400, 300))
    down = lora_layers(lowrank.add_lora(wide, lowrank.LoRAConfig(r=100)))["0"].pair("default")[1].detach()
    bound = 1.0 / math.sqrt(400)
    # Kaiming with a = √5 is uniform in ±1/√in; 40,000 draws come within a thousandth of the ends.
    assert 0.999 * bound < float(down.abs().max()) <= bound
    assert float(down.std()) == pytest.approx(bound / math.sqrt(3.0), rel=0.02)
    config = lowrank.LoRAConfig(r=100, init_lora_weights="gaussian")
    up, down = (side.detach() for side in lora_layers(lowrank.add_lora(wide, config))["0"].pair("default"))
    assert float(down.std()) == pytest.approx(0.01, rel=0.02) and float(down.abs().max()) > 0.03
    assert not up.any()
    both = lora_layers(lowrank.add_lora(wide, lowrank.LoRAConfig(r=4, init_lora_weights=False)))["0"].pair("default")
    assert all(bool(side.detach().any()) for side in both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [4, -3])
def test_pissa_splits_the_weight(dtype: torch.dtype, alpha: int) -> None:
    base = dense(dtype=dtype)
    before = base[0].weight.detach().clone()
    config = lowrank.LoRAConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa")
    model = lowrank.add_lora(base, config)
    assert torch.equal(base[0].weight, before)
    u, s, v = torch.linalg.svd(before.double(), full_matrices=False)
    close(delta(model), (u[:, :4] * s[:4]) @ v[:4], torch.float32 if dtype != torch.float64 else dtype)
    close(exact_weight(only_layer(model).base_layer) + delta(model), before, dtype)
    x = torch.randn(5, 12, generator=seeded(), dtype=torch.float64).to(dtype)
    close(model(x), base(x), dtype)


def test_pissa_is_refused_by_name_where_there_is_no_dense_weight() -> None:
    config = lowrank.LoRAConfig(r=2, init_lora_weights="pissa", target_modules=["0"])
    for base in (
        lowrank.QuantizedLinear.from_linear(dense()[0]),
        lowrank.QuantizedLowRankLayer.from_linear(dense()[0], rank=4),
        lowrank.SVDCompressedLinear.from_linear(dense()[0], rank=4),
        nn.Embedding(4, 4),
    ):
        with pytest.raises(lowrank.AdapterError, match=f'layer 0: .*"pissa".*{type(base).__name__}.*"residual"'):
            lowrank.add_lora(nn.Sequential(base), config)


def test_pissa_on_a_tied_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    config = lowrank.LoRAConfig(r=2, init_lora_weights="pissa", target_modules=["1"])
    with pytest.raises(lowrank.AdapterError, match="layer 1: its weight is tied"):
        lowrank.add_lora(model, config)


COMPRESSED = {
    "lowrank": lambda linear: lowrank.SVDCompressedLinear.from_linear(linear, rank=4),
    "lowrank-int8": lambda linear: lowrank.QuantizedLowRankLayer.from_linear(linear, rank=4, activations="float"),
    "int8": lambda linear: lowrank.QuantizedLinear.from_linear(linear, bits=3, activations="float"),
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("rslora", [False, True])
def test_residual_without_data_is_the_best_fit_of_what_is_missing(kind: str, rslora: bool) -> None:
    original = dense()
    small = nn.Sequential(COMPRESSED[kind](original[0]))
    config = lowrank.LoRAConfig(r=3, lora_alpha=5, use_rslora=rslora, init_lora_weights="residual")
    model = lowrank.add_lora(small, config, original=original)
    missing = original[0].weight.detach() - exact_weight(small[0])
    values = torch.linalg.svdvals(missing)
    assert float((missing - delta(model)).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-9)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_residual_with_data_minimises_the_output_error(kind: str) -> None:
    original = dense()
    x = tokens()
    statistics = InputStatistics.from_samples(x)
    linear = original[0]
    small: Any
    if kind == "lowrank":  # with a shift of the bias
        small = lowrank.SVDCompressedLinear.from_linear(linear, rank=4, statistics=statistics)
        assert not torch.equal(small.bias, linear.bias)
    else:
        small = COMPRESSED[kind](linear)
    config = lowrank.LoRAConfig(r=2, lora_alpha=4, init_lora_weights="residual")
    found = lowrank.add_lora(nn.Sequential(small), config, original=original, statistics={"0": statistics})
    blind = lowrank.add_lora(nn.Sequential(small), config, original=original)

    def error(change: Tensor) -> float:
        wrong = x @ (linear.weight - exact_weight(small) - change).T + linear.bias - small.bias
        return float(wrong.detach().square().mean())

    # An independent optimum: least squares on the tokens, then the best rank 2 of its outputs (reduced-rank regression).
    target = (x @ (linear.weight - exact_weight(small)).T + linear.bias - small.bias).detach()
    full = torch.linalg.lstsq(x, target).solution
    directions = torch.linalg.svd(x @ full, full_matrices=False)[2][:2]
    best = error((full @ directions.T @ directions).T)
    assert error(delta(found)) == pytest.approx(best, rel=1e-4)
    assert error(delta(found)) < error(torch.zeros_like(linear.weight))
    assert error(delta(found)) < 0.999 * error(delta(blind))


def test_residual_of_an_embedding_counts_look_ups() -> None:
    original = nn.Sequential(nn.Embedding(9, 6, dtype=torch.float64))
    small = nn.Sequential(lowrank.LowRankEmbedding.from_embedding(original[0], rank=2))
    counts = TokenCounts(9)
    counts.update(torch.tensor([0, 0, 0, 0, 0, 3, 3, 3, 3, 4]))
    config = lowrank.LoRAConfig(r=2, init_lora_weights="residual", target_modules=["0"])
    model = lowrank.add_lora(small, config, original=original, statistics={"0": counts})
    missing = original[0].weight.detach() - exact_weight(small[0]).T
    rows = counts.counts.double().sqrt()[:, None]
    values = torch.linalg.svdvals(rows * missing)
    assert float((rows * (missing - delta(model).T)).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-9)


def test_residual_leaves_what_was_not_compressed_alone() -> None:
    original = nn.Sequential(dense()[0], dense()[0])
    small = copy.deepcopy(original)
    small[1] = lowrank.SVDCompressedLinear.from_linear(original[1], rank=4)
    config = lowrank.LoRAConfig(r=3, init_lora_weights="residual", target_modules=["0", "1"])
    layers = lora_layers(lowrank.add_lora(small, config, original=original))
    assert not layers["0"].pair("default")[0].detach().any()
    assert layers["1"].pair("default")[0].detach().any()


def test_residual_of_more_rank_than_there_is_pads_with_nothing() -> None:
    original = dense()
    small = nn.Sequential(lowrank.SVDCompressedLinear.from_linear(original[0], rank=4))
    with pytest.warns(UserWarning, match="over min"):
        model = lowrank.add_lora(small, lowrank.LoRAConfig(r=11, init_lora_weights="residual"), original=original)
    close(exact_weight(small[0]) + delta(model), original[0].weight, torch.float64)
    assert not only_layer(model).pair("default")[0].detach()[:, 10:].any()
    assert only_layer(model).pair("default")[1].detach()[10:].any()


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (None, "needs original="),
        (nn.Sequential(nn.Linear(3, 3)), r"layer 0: the original's weight is \(3, 3\)"),
        (nn.Sequential(nn.ReLU()), "layer 0: its original must be a dense linear, got a ReLU"),
        (nn.ModuleDict(), "original: has no module 0"),
    ],
)
def test_an_original_that_does_not_fit(original: nn.Module | None, message: str) -> None:
    small = nn.Sequential(lowrank.SVDCompressedLinear.from_linear(dense()[0], rank=4))
    with pytest.raises(lowrank.LowRankError, match=message):
        lowrank.add_lora(small, lowrank.LoRAConfig(r=2, init_lora_weights="residual"), original=original)


def test_alpha_zero_cannot_carry_a_residual() -> None:
    small = nn.Sequential(lowrank.SVDCompressedLinear.from_linear(dense()[0], rank=4))
    config = lowrank.LoRAConfig(r=2, lora_alpha=0, init_lora_weights="residual")
    with pytest.raises(lowrank.AdapterError, match="lora_alpha = 0"):
        lowrank.add_lora(small, config, original=dense())


@pytest.mark.parametrize("statistics", [False, True])
def test_residual_of_a_convolution_is_fitted_on_patches(statistics: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False, dtype=torch.float64))
    small = nn.Sequential(lowrank.SVDCompressedConv2d.from_conv2d(original[0], rank=3, scheme="spatial"))
    images = tokens(3 * 6 * 6, 40).view(40, 3, 6, 6)
    found = lowrank.collect_statistics(original, [images], {"0": original[0]}) if statistics else None
    config = lowrank.LoRAConfig(r=3, init_lora_weights="residual", target_modules=["0"])
    model = lowrank.add_lora(small, config, original=original, statistics=found)
    missing = (original[0].weight.detach() - exact_weight(small[0])).flatten(1)
    if found is None:
        values = torch.linalg.svdvals(missing)
        assert float((missing - delta(model)).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-9)
        return
    wanted, before, after = original(images), small(images), model(images)
    # Every patch was seen: the best rank 3 in the outputs' mean square.
    rows = (wanted - before).detach().movedim(1, -1).reshape(-1, 8)
    values = torch.linalg.svdvals(rows)
    assert float((wanted - after).detach().norm()) == pytest.approx(float(values[3:].norm()), rel=1e-6)


def test_groups_have_no_weight_to_fit_or_to_take_norms_of() -> None:
    original = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    small = nn.Sequential(lowrank.QuantizedConv1d.from_conv1d(original[0]))
    arguments: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    with pytest.raises(lowrank.AdapterError, match='layer 0: init_lora_weights="residual"'):
        lowrank.add_lora(small, lowrank.LoRAConfig(init_lora_weights="residual", **arguments), original=original)
    with pytest.raises(lowrank.AdapterError, match=r"layer 0: groups=2.*use_dora=False"):
        lowrank.add_lora(small, lowrank.LoRAConfig(use_dora=True, **arguments))


def test_pissa_under_an_adapter_that_is_there_is_refused() -> None:
    adapted = lowrank.add_lora(two_linear(), random_adapter("0"), "first")
    with torch.no_grad():
        before = adapted(rows())
    with pytest.raises(lowrank.AdapterError, match=r"pissa.*first"):
        lowrank.add_lora(
            adapted, lowrank.LoRAConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), "second", inplace=True
        )
    with torch.no_grad():
        assert torch.equal(adapted(rows()), before)
