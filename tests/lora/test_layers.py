"""Every base kind in every dtype with an adapter, against a dense float64 reference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import seeded
from lora_bases import BASES, DTYPES, INTEGER, RANK, adapted, build, close, inputs, only_layer, product, randomise
from lora_models import random_adapter, rows, two_linear
from torch import nn

import lowrank
from lowrank.lora.adapters import lora_layers
from lowrank.lora.bases import base_bias, base_weight, exact_weight
from lowrank.lora.model import set_form

# One of each forward; compiling takes a second each.
COMPILED = (
    "linear",
    "Conv1D",
    "conv2d",
    "embedding",
    "lowrank",
    "lowrank-int8",
    "int8",
    "int8-conv2d",
    "lowrank-int8-conv1d",
)
KINDS = pytest.mark.parametrize("kind", BASES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@KINDS
@ALL_DTYPES
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"learnable_scale": True}], ids=["plain", "dora", "scale"])
def test_adding_an_adapter_changes_no_bit(kind: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    base = build(kind, dtype)
    x = inputs(kind, dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=RANK, target_modules=["0"], **options))
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    assert lora_layers(base) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@KINDS
@ALL_DTYPES
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_the_output_is_that_of_the_sum(kind: str, dtype: torch.dtype, rslora: bool) -> None:
    model = adapted(kind, dtype, use_rslora=rslora)
    layer, x = only_layer(model), inputs(kind, dtype)
    scaling = 6 / RANK**0.5 if rslora else 6 / RANK
    left, right = (side.detach().double() for side in layer.pair("default"))
    shape = base_weight(layer.base_layer).shape
    with torch.no_grad():
        expected = layer.base_layer(x).double() + product(kind, x, (scaling * left @ right).view(shape))
        actual = model(x)
    assert actual.dtype == layer.base_layer(x).dtype
    close(actual, expected, dtype)


@KINDS
@ALL_DTYPES
def test_dora_is_the_weight_of_learned_norms(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype, use_dora=True)
    layer, x = only_layer(model), inputs(kind, dtype)
    left, right = (side.detach().double() for side in layer.pair("default"))
    weight = exact_weight(layer.base_layer)
    direction = weight + (2.0 * left @ right).view(weight.shape)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().flatten()
    share = magnitude / direction.flatten(1).norm(dim=1)
    over = share.view(-1, *[1] * (weight.ndim - 1))
    bias = base_bias(layer.base_layer)
    with torch.no_grad():
        # What the base itself makes of its weight (rounded activations included) is scaled; the rest is exact.
        plain = layer.base_layer(x).double()
        outputs = (-1, *[1] * (weight.ndim - 2))
        shift = 0.0 if bias is None else bias.double().view(outputs)
        expected = share.view(outputs) * (plain - shift) + shift + product(kind, x, over * (direction - weight))
        close(model(x), expected, dtype, safety=64)


@KINDS
@ALL_DTYPES
def test_a_training_step_moves_the_adapter_alone(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype).train()
    base = only_layer(model).base_layer
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    x = inputs(kind, dtype)
    x.requires_grad_(x.is_floating_point())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and bool(p.grad.any()) for p in only_layer(model).adapter_parameters("default"))
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    if x.is_floating_point():
        assert x.grad is not None and bool(x.grad.any())


@KINDS
@ALL_DTYPES
def test_an_adapter_saved_and_loaded_gives_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(kind, dtype)
    model = adapted(kind, dtype, use_dora=True)
    lowrank.save_adapter(model, tmp_path / "adapter")
    loaded = lowrank.load_adapter(base, tmp_path / "adapter")
    x = inputs(kind, dtype)
    with torch.no_grad():
        assert not torch.equal(model(x), base(x))
        assert torch.equal(loaded(x), model(x))


@KINDS
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_both_forms_agree(kind: str, dora: bool) -> None:
    model = adapted(kind, torch.float64, use_dora=dora)
    x = inputs(kind, torch.float64)
    separate = model(x)
    gradients = torch.autograd.grad(separate.sum(), only_layer(model).adapter_parameters("default"))
    set_form(model, "merged")
    assert only_layer(model).form == ("separate" if kind in INTEGER else "merged")
    together = model(x)
    close(together, separate, torch.float64, safety=64)
    again = torch.autograd.grad(together.sum(), only_layer(model).adapter_parameters("default"))
    for one, other in zip(again, gradients, strict=True):
        close(one, other, torch.float64, safety=256)


@pytest.mark.parametrize("kind", [kind for kind in BASES if "int8" not in kind or "weight-only" in kind])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_gradients_are_those_of_finite_differences(kind: str, dora: bool) -> None:
    # DoRA takes the norm as a constant (Liu et al. 2024, section 4.3), so only its magnitude's gradient is the derivative.
    model = adapted(kind, torch.float64, use_dora=dora)
    layer, x = only_layer(model), inputs(kind, torch.float64)
    parameters = layer.adapter_parameters("default")
    if dora:
        parameters = [layer.lora_magnitude_vector["default"].weight]

    def output(*_: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(x)
        return result

    assert torch.autograd.gradcheck(output, tuple(parameters), fast_mode=True)


def test_gradients_pass_integer_bases_to_earlier_layers() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    small = copy.deepcopy(dense)
    small[2] = lowrank.QuantizedLinear.from_linear(dense[2], activations="float")
    small[4] = lowrank.QuantizedLowRankLayer.from_linear(dense[4], rank=4, activations="float")
    model = lowrank.add_lora(small, lowrank.LoRAConfig(r=2))
    randomise(model)
    # The same network with the rounded weights as floats is the reference.
    reference = copy.deepcopy(model).double()
    for name, part in ((("2"), small[2]), ("4", small[4])):
        weights = nn.Linear(8, part.out_features, dtype=torch.float64)
        with torch.no_grad():
            weights.weight.copy_(part.dense_weight())
            weights.bias.copy_(part.bias)
        lora_layers(reference)[name].base_layer = weights
    x = torch.randn(5, 6, generator=seeded())
    model(x).square().sum().backward()
    reference(x.double()).square().sum().backward()
    expected = dict(reference.named_parameters())
    seen = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected[name].grad, torch.float32, safety=64)  # type: ignore[arg-type]
            seen += 1
    assert seen == 6


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    model = adapted("linear", torch.float64, lora_dropout=0.5)
    x = inputs("linear", torch.float64)
    calm = model(x)
    assert torch.equal(calm, model(x))
    model.train()
    draws = torch.stack([model(x).detach() for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    # Inverted dropout keeps the mean; 4000 draws bring the standard error below 0.05 here.
    torch.testing.assert_close(draws.mean(dim=0), calm, rtol=0.0, atol=5 * float(draws.std(dim=0).max()) / 4000**0.5)
    set_form(model, "merged")
    with pytest.raises(lowrank.UsageError, match="lora_dropout=0"):
        model(x)


def test_a_learned_scale_trains_and_is_folded_where_saved(tmp_path: Path) -> None:
    model = adapted("linear", torch.float64, learnable_scale=True)
    layer, x = only_layer(model), inputs("linear", torch.float64)
    with torch.no_grad():
        layer.lora_scale["default"].fill_(1.7)
    model(x).square().mean().backward()
    gradient = layer.lora_scale["default"].grad
    assert gradient is not None and gradient.item() != 0.0
    lowrank.save_adapter(model, tmp_path / "adapter")
    loaded = lowrank.load_adapter(build("linear", torch.float64), tmp_path / "adapter")
    assert only_layer(loaded).lora_scale["default"].item() == 1.0
    close(loaded(x), model(x), torch.float64)


def test_padding_rows_of_an_embedding_get_no_adapter_gradient() -> None:
    model = lowrank.add_lora(
        nn.Sequential(nn.Embedding(5, 4, padding_idx=1)), lowrank.LoRAConfig(r=2, target_modules=["0"])
    )
    model(torch.tensor([0, 1, 1])).sum().backward()
    gradient = only_layer(model).adapter_parameters("default")[0].grad
    assert gradient is not None
    assert gradient[:, 0].any() and not gradient[:, 1].any()


@pytest.mark.parametrize(
    ("sizes", "rank", "expected"),
    [
        ([(64, 10)], 4, (296, 946)),
        ([(768, 768)], 16, (24_576, 768 * 768 + 768 + 24_576)),
        ([(768, 768)] * 12, 8, (12 * 8 * (768 + 768), 12 * (768 * 769 + 8 * 1536))),
        ([(30, 70), (70, 20)], 5, (5 * (30 + 70) + 5 * (70 + 20), 30 * 70 + 70 + 70 * 20 + 20 + 500 + 450)),
    ],
)
def test_classic_counts(sizes: list[tuple[int, int]], rank: int, expected: tuple[int, int]) -> None:
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    assert lowrank.trainable_parameters(lowrank.add_lora(model, lowrank.LoRAConfig(r=rank))) == expected


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapted_layer_compiles_without_a_graph_break(kind: str) -> None:
    torch.compiler.reset()
    model = adapted(kind, use_dora=kind in ("linear", "lowrank", "int8", "conv2d", "embedding"))
    x = inputs(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outcome = compiled(x)
    close(outcome, model(x), torch.float32)
    wanted = torch.autograd.grad(model(x).sum(), only_layer(model).adapter_parameters("default"))
    found = torch.autograd.grad(outcome.sum(), only_layer(model).adapter_parameters("default"))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, torch.float32, safety=64)


@KINDS
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model = adapted(kind, lora_dropout=0.25).train()
    x, parameters = inputs(kind), only_layer(model).adapter_parameters("default")
    torch.manual_seed(3)
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), parameters)  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(again, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dora_with_dropout_trains_over_half_precision(dtype: torch.dtype) -> None:
    adapted = lowrank.add_lora(two_linear(dtype=dtype), random_adapter("0", use_dora=True, lora_dropout=0.2)).train()
    out = adapted(rows(dtype))
    assert out.dtype is dtype
    out.float().square().sum().backward()
    assert bool(adapted[0].lora_A["default"].weight.grad.isfinite().all())
