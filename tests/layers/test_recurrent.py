"""Recurrent layers with int8 weights against torch's own modules of the rounded weights, in float64."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import eps, seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from lowrank.errors import CheckpointError, NumericsError, RankError, UsageError
from lowrank.layers import LAYER_KINDS, RECURRENT, QuantizedRecurrent, check_scales

STEPS, BATCH, INPUT, HIDDEN = 7, 3, 10, 12
SEQUENCES = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


def module_of(kind: type[nn.Module], seed: int = 0, **options: Any) -> nn.Module:
    module: nn.Module = kind(INPUT, HIDDEN, **options)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def rounded(module: nn.Module, **kwargs: Any) -> Any:
    return RECURRENT[type(module)].from_module(module, **kwargs)


def states_of(kind: type[nn.Module], *shape: int, sizes: tuple[int, int] = (HIDDEN, HIDDEN), seed: int = 9) -> Any:
    generator = seeded(seed)
    states = tuple(torch.randn(*shape, size, generator=generator) for size in sizes)
    return states if "LSTM" in kind.__name__ else states[0]


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in tensors_in(item)]


def to_double(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(torch.float64)
    return tuple(to_double(item) for item in value)


def assert_same(layer: QuantizedRecurrent, *inputs: Any) -> None:
    """The layer and the dense module of its weights: equal bits in float32, eps away from float64."""
    # Frozen: torch folds batches of a 3-d product differently for a weight that requires gradients.
    dense = layer.dequantize().requires_grad_(False)
    with torch.no_grad():
        ours, same, exact = layer(*inputs), dense(*inputs), copy.deepcopy(dense).double()(*map(to_double, inputs))
    assert type(ours) is type(same)
    found, equal, expected = tensors_in(ours), tensors_in(same), tensors_in(exact)
    assert len(found) == len(equal) == len(expected)
    # States stay below 1 (LSTM cells and ReLU: below the number of steps); each step adds a few roundings of sums.
    allowed = 8 * STEPS * eps(torch.float32) * (INPUT + HIDDEN) ** 0.5
    for one, two, three in zip(found, equal, expected, strict=True):
        assert one.shape == two.shape == three.shape
        assert torch.equal(one, two)
        assert bool(((one.double() - three).abs() <= allowed * three.abs().clamp_min(1.0)).all())


GRID = list(itertools.product([1, 2], [True, False], [True, False], [True, False]))


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(("layers", "bias", "first", "both"), GRID)
def test_sequences_are_the_dense_module_of_the_rounded_weights(
    kind: type[nn.Module], layers: int, bias: bool, first: bool, both: bool
) -> None:
    module = module_of(kind, num_layers=layers, bias=bias, batch_first=first, bidirectional=both)
    layer = rounded(module)
    x = torch.randn(BATCH if first else STEPS, STEPS if first else BATCH, INPUT, generator=seeded(1))
    count = layers * (2 if both else 1)
    assert_same(layer, x)
    assert_same(layer, x, states_of(kind, count, BATCH))
    assert_same(layer, x[0] if first else x[:, 0])
    assert_same(layer, x[0] if first else x[:, 0], states_of(kind, count))
    packed = pack_padded_sequence(x, torch.tensor([4, 2, STEPS]), batch_first=first, enforce_sorted=False)
    assert_same(layer, packed)
    assert_same(layer, packed, states_of(kind, count, BATCH))
    in_order = pack_sequence([torch.randn(n, INPUT, generator=seeded(n)) for n in (5, 3, 1)])
    assert_same(layer, in_order, states_of(kind, count, BATCH))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("both", [True, False])
def test_projections_of_an_lstm(both: bool) -> None:
    layer = rounded(module_of(nn.LSTM, num_layers=2, proj_size=5, bidirectional=both))
    x = torch.randn(STEPS, BATCH, INPUT, generator=seeded(1))
    assert_same(layer, x)
    assert_same(layer, x, states_of(nn.LSTM, 4 if both else 2, BATCH, sizes=(5, HIDDEN)))
    assert layer.weight_hr_l1_codes.shape == (5, HIDDEN)


def test_relu_networks() -> None:
    layer = rounded(module_of(nn.RNN, nonlinearity="relu", num_layers=2))
    assert_same(layer, torch.randn(STEPS, BATCH, INPUT, generator=seeded(1)) * 0.1)
    assert_same(rounded(module_of(nn.RNNCell, nonlinearity="relu")), torch.randn(BATCH, INPUT, generator=seeded(1)))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_the_dense_module_of_the_rounded_weights(kind: type[nn.Module], bias: bool) -> None:
    layer = rounded(module_of(kind, bias=bias))
    x = torch.randn(BATCH, INPUT, generator=seeded(1))
    assert_same(layer, x)
    assert_same(layer, x, states_of(kind, BATCH))
    assert_same(layer, x[0])
    assert_same(layer, x[0], states_of(kind))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_dropout_between_layers_in_training_only(kind: type[nn.Module]) -> None:
    layer = rounded(module_of(kind, num_layers=2, dropout=0.5))
    assert layer.training
    dense, x = layer.dequantize().requires_grad_(False), torch.randn(STEPS, BATCH, INPUT, generator=seeded(1))
    torch.manual_seed(3)
    ours = layer(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(ours, dense(x)[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer(x)[0], ours)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
def test_gradients_are_those_of_the_dense_module(kind: type[nn.Module]) -> None:
    layer = rounded(module_of(kind))
    dense = layer.dequantize()
    shape = (BATCH, INPUT) if kind in CELLS else (STEPS, BATCH, INPUT)
    gradients = []
    for module in (layer, dense):
        x = torch.randn(shape, generator=seeded(1), requires_grad=True)
        states = states_of(kind, *((BATCH,) if kind in CELLS else (1, BATCH)))
        leaves = [state.requires_grad_() for state in tensors_in(states)]
        sum(tensor.square().sum() for tensor in tensors_in(module(x, states))).backward()
        biases = [module.get_parameter(name).grad for name, _ in layer.named_parameters()]
        gradients.append([x.grad, *[leaf.grad for leaf in leaves], *biases])
    assert len(gradients[0]) > 3
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert bool(ours.abs().max() > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_scales(kind: type[nn.Module], dtype: torch.dtype) -> None:
    layer = rounded(module_of(kind).to(dtype))
    scale = dict(layer.named_buffers())
    converted = copy.deepcopy(rounded(module_of(kind))).to(dtype)
    for each in (layer, converted):
        assert each.dtype == dtype
        assert all(t.dtype == torch.float32 for name, t in each.named_buffers() if name.endswith("_scale"))
        assert all(parameter.dtype == dtype for parameter in each.parameters())
        x = torch.randn(BATCH, INPUT, generator=seeded(1)).to(dtype)
        with torch.no_grad():
            found, expected = tensors_in(each(x)), tensors_in(each.dequantize().requires_grad_(False)(x))
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, two)
    assert scale.keys() == dict(converted.named_buffers()).keys()


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
@pytest.mark.parametrize("bits", [2, 8])
def test_rounding_is_at_most_half_a_step(kind: type[nn.Module], bits: int) -> None:
    module = module_of(kind)
    layer = rounded(module, bits=bits)
    joined = []
    for name, weight in layer.dense_weights().items():
        original = module.get_parameter(name).detach()
        step = original.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert bool(((weight - original).abs() <= step * 0.5001).all())
        assert layer.get_buffer(f"{name}_codes").abs().max() == 2 ** (bits - 1) - 1
        joined.append(original.flatten())
    assert len(joined) == 2
    assert layer.dense_weight().shape == torch.cat(joined)[None].shape
    for name, bias in layer.named_parameters():
        assert torch.equal(bias, module.get_parameter(name))


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
def test_copies_and_state_are_exact(kind: type[nn.Module]) -> None:
    module = module_of(kind).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    layer = rounded(module)
    x = torch.randn(BATCH, INPUT, generator=seeded(2))
    expected = tensors_in(layer(x))
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    rebuilt = LAYER_KINDS[layer.kind].from_config(layer.config())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    rebuilt.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), rebuilt):
        assert all(torch.equal(one, two) for one, two in zip(tensors_in(twin(x)), expected, strict=True))
        assert twin.config() == layer.config()
        assert repr(twin) == repr(layer)
        check_scales(twin, "rnn")
    meta = LAYER_KINDS[layer.kind].from_config(layer.config(), device="meta")
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == {
        name: tensor.shape for name, tensor in layer.state_dict().items()
    }
    weights = sum(p.numel() + 4 * p.shape[0] for name, p in module.named_parameters() if p.ndim == 2)
    biases = sum(p.nbytes for p in module.parameters() if p.ndim == 1)
    assert layer.stored_bytes == weights + biases
    assert (layer.format, layer.bits, layer.rank, layer.activations) == ("int8", 8, None, "float")


def test_options_read_as_on_the_dense_module() -> None:
    module = module_of(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True)
    layer = rounded(module)
    for name in layer.option_names:
        assert getattr(layer, name) == getattr(module, name)
    layer.flatten_parameters()
    with pytest.raises(AttributeError):
        layer.weight_ih_l7  # noqa: B018


def test_wrong_inputs_are_named() -> None:
    lstm, cell = rounded(module_of(nn.LSTM)), rounded(module_of(nn.GRUCell))
    for x in (torch.zeros(INPUT), torch.zeros(2, 3, INPUT + 1), torch.zeros(1, 2, 3, INPUT)):
        with pytest.raises(UsageError, match="10 features"):
            lstm(x)
    with pytest.raises(UsageError, match="float64"):
        lstm(torch.zeros(2, 3, INPUT).double())
    for hx in (torch.zeros(1, 3, HIDDEN), (torch.zeros(1, 3, HIDDEN),), (torch.zeros(3, HIDDEN),) * 2):
        with pytest.raises(UsageError, match="hx"):
            lstm(torch.zeros(2, 3, INPUT), hx)
    with pytest.raises(UsageError, match=r"\(1, 3, 12\)"):
        lstm(torch.zeros(2, 3, INPUT), (torch.zeros(1, 4, HIDDEN),) * 2)
    with pytest.raises(UsageError, match="input"):
        cell(torch.zeros(2, 3, INPUT))
    with pytest.raises(UsageError, match="hx"):
        cell(torch.zeros(2, INPUT), torch.zeros(3, HIDDEN))


def test_wrong_modules_are_named() -> None:
    with pytest.raises(UsageError, match=r"nn\.LSTM"):
        RECURRENT[nn.LSTM].from_module(nn.GRU(2, 2))
    with pytest.raises(RankError, match="2 to 8"):
        rounded(nn.LSTM(2, 2), bits=9)
    with pytest.raises(UsageError, match="takes input_size"):
        RECURRENT[nn.GRU](input_size=2, hidden_size=2, proj_size=1)  # type: ignore[call-arg]
    bad = module_of(nn.LSTM)
    bad.weight_hh_l0.data[1, 2] = math.nan  # type: ignore[union-attr, index]
    with pytest.raises(NumericsError, match=r"weight_hh_l0.*\[1, 2\]"):
        rounded(bad)
    lstm = module_of(nn.LSTM)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    with pytest.raises(UsageError, match="got ParametrizedLSTM"):
        RECURRENT[nn.LSTM].from_module(lstm)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_damaged_scales_are_refused(value: float) -> None:
    layer = rounded(module_of(nn.GRU, num_layers=2))
    check_scales(layer, "encoder")
    layer.weight_hh_l1_scale[3] = value
    with pytest.raises(CheckpointError, match=r"encoder: weight_hh_l1_scale\[3\]"):
        check_scales(layer, "encoder")
