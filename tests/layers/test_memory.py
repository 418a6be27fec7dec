"""What layers derive from their codes is tied to the memory of these: moved, shared or freed, the right numbers are multiplied."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedLinear,
    QuantizedLowRankConv2d,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    QuantizedLSTM,
    QuantizedMultiheadAttention,
    SVDCompressedLinear,
)

_Made = tuple[CompressedLayer, Tensor]


def _linear(activations: str) -> _Made:
    return QuantizedLinear.from_linear(nn.Linear(96, 64), activations=activations), torch.randn(3, 96)


def _low_rank(activations: str) -> _Made:
    made = QuantizedLowRankLayer.from_linear(nn.Linear(96, 64), rank=16, activations=activations)
    return made, torch.randn(3, 96)


def _conv(activations: str) -> _Made:
    made = QuantizedConv2d.from_conv2d(nn.Conv2d(8, 12, 3), activations=activations)
    return made, torch.randn(2, 8, 9, 9)


def _low_rank_conv(activations: str) -> _Made:
    made = QuantizedLowRankConv2d.from_conv2d(nn.Conv2d(8, 12, 3), rank=6, activations=activations)
    return made, torch.randn(2, 8, 9, 9)


def _recurrent(kind: type[QuantizedLSTM] | type[QuantizedGRU], dense: type[nn.RNNBase]) -> _Made:
    return kind.from_module(dense(8, 12, num_layers=2)), torch.randn(5, 2, 8)


LAYERS: dict[str, Callable[[], _Made]] = {
    "linear": lambda: _linear("int8"),
    "weight-only linear": lambda: _linear("float"),
    "low-rank int8 linear": lambda: _low_rank("int8"),
    "weight-only low-rank linear": lambda: _low_rank("float"),
    "low-rank linear": lambda: (SVDCompressedLinear.from_linear(nn.Linear(96, 64), rank=16), torch.randn(3, 96)),
    "conv": lambda: _conv("int8"),
    "weight-only conv": lambda: _conv("float"),
    "conv of lines": lambda: (QuantizedConv1d.from_conv1d(nn.Conv1d(8, 12, 3)), torch.randn(2, 8, 20)),
    "low-rank int8 conv": lambda: _low_rank_conv("int8"),
    "weight-only low-rank conv": lambda: _low_rank_conv("float"),
    "table": lambda: (QuantizedEmbedding.from_embedding(nn.Embedding(30, 16)), torch.arange(30)),
    "low-rank table": lambda: (LowRankEmbedding.from_embedding(nn.Embedding(30, 16), rank=4), torch.arange(30)),
    "low-rank int8 table": lambda: (
        QuantizedLowRankEmbedding.from_embedding(nn.Embedding(30, 16), rank=4),
        torch.arange(30),
    ),
    "LSTM": lambda: _recurrent(QuantizedLSTM, nn.LSTM),
    "GRU": lambda: _recurrent(QuantizedGRU, nn.GRU),
    "attention": lambda: (
        QuantizedMultiheadAttention.from_module(nn.MultiheadAttention(32, 4)),
        torch.randn(5, 2, 32),
    ),
}


def ran(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = layer(x, x, x) if isinstance(layer, QuantizedMultiheadAttention) else layer(x)
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def fresh(layer: CompressedLayer) -> CompressedLayer:
    """A layer of the same numbers that has derived nothing yet."""
    made = type(layer).from_config(layer.config())
    made.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    return made.eval()


def of_other_numbers(layer: CompressedLayer) -> dict[str, Tensor]:
    """Other values for every tensor: codes turned round, floats doubled."""
    return {
        name: tensor.flip(0).clone() if tensor.dtype == torch.int8 else tensor * 2
        for name, tensor in layer.state_dict().items()
    }


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def assigned(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    for name, tensor in tensors_of(layer).items():
        tensor.data = values[name]


def freed_and_assigned(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    for name, tensor in tensors_of(layer).items():
        # The allocator is likely to give the address that was let go to the next tensor of the size.
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        tensor.data = values[name].clone()


def copied(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors_of(layer).items():
            tensor.copy_(values[name])


def emptied_and_loaded(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    layer.to_empty(device="cpu")
    layer.load_state_dict(values)


def loaded_by_assignment(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    layer.load_state_dict(values, assign=True)


def shared_and_written(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    layer.share_memory()
    copied(layer, values)


def swapped(layer: CompressedLayer, values: dict[str, Tensor]) -> None:
    named = tensors_of(layer)
    for name, tensor in named.items():
        other = values[name].clone()
        other = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
        torch.utils.swap_tensors(tensor, other)


WAYS = (assigned, freed_and_assigned, copied, emptied_and_loaded, loaded_by_assignment, shared_and_written, swapped)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_given_other_numbers_multiplies_by_these(
    kind: str, way: Callable[[CompressedLayer, dict[str, Tensor]], None]
) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    layer.eval()
    values, before = of_other_numbers(layer), ran(layer, x)
    way(layer, values)
    after = ran(layer, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, ran(fresh(layer), x))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, values[name]), name


def _moved(layer: CompressedLayer) -> None:
    layer._apply(lambda tensor: tensor.clone())


def _shared(layer: CompressedLayer) -> None:
    layer.share_memory()


def _each_shared(layer: CompressedLayer) -> None:
    for tensor in tensors_of(layer).values():
        tensor.share_memory_()


@pytest.mark.parametrize("move", [_moved, _shared, _each_shared])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_whose_numbers_move_answers_as_before(kind: str, move: Callable[[CompressedLayer], None]) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    layer.eval()
    before = ran(layer, x)
    move(layer)
    # What was let go is filled again, so that whoever still reads there is found out.
    filled = [torch.full((n,), -1, dtype=torch.int8) for n in (12, 48, 256, 864, 1024, 6144) for _ in range(8)]
    assert torch.equal(ran(layer, x), before)
    assert all(bool((tensor == -1).all()) for tensor in filled)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_an_address_that_comes_back_is_not_taken_for_the_memory_that_had_it(activations: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 256), torch.randn(4, 256)
    for _ in range(20):
        layer = QuantizedLinear.from_linear(linear, activations=activations)
        ran(layer, x)
        turned = layer.codes.flip(0)
        layer.codes.data = torch.empty(0, dtype=torch.int8)
        layer.codes.data = turned.clone()
        assert torch.equal(ran(layer, x), ran(fresh(layer), x))


def _answers(model: nn.Module, inputs: list[Tensor], queue: object) -> None:
    with torch.no_grad():
        # Numbers, not tensors: a tensor's memory would have to outlive this process.
        queue.put([ran(layer, x).tolist() for layer, x in zip(model, inputs, strict=True)])  # type: ignore[attr-defined, arg-type]


def test_layers_sent_to_a_spawned_process_are_right_there_and_here() -> None:
    torch.manual_seed(0)
    made = [build() for build in LAYERS.values()]
    model, inputs = nn.ModuleList(layer for layer, _ in made).eval().requires_grad_(False), [x for _, x in made]
    before = [ran(layer, x) for layer, x in zip(model, inputs, strict=True)]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_answers, args=(model, inputs, queue))
    process.start()
    there = queue.get()
    process.join()
    assert process.exitcode == 0
    for kind, layer, x, wanted, found in zip(LAYERS, model, inputs, before, there, strict=True):
        torch.testing.assert_close(torch.tensor(found), wanted, msg=kind)
        assert torch.equal(ran(layer, x), wanted), kind


@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_does_not_read_the_memory_of_its_original(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    layer.eval()
    before = ran(layer, x)
    other = copy.deepcopy(layer)
    copied(layer, of_other_numbers(layer))
    assert torch.equal(ran(other, x), before)
