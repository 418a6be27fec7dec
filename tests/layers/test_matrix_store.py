"""Matrices held one by one: what their tensors stand for, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import nn

from lowrank.errors import LowRankError
from lowrank.layers import QuantizedGRUCell, QuantizedLSTM
from lowrank.layers.matrix_store import WIDE_BITS, MatrixStore
from lowrank.layers.spec import LayerSpec

PARTS = {
    "weight_ih_l0": LayerSpec("dense"),
    "weight_hh_l0": LayerSpec("int12", bits=12),
    "weight_ih_l1": LayerSpec("int8", bits=8, group=32),
    "weight_hh_l1": LayerSpec("int3", bits=3, group=32),
}


def spec_of(bits: int) -> LayerSpec:
    return LayerSpec(f"int{bits}", bits=bits)


@pytest.mark.parametrize("bits", [2, 5, 8, *WIDE_BITS])
@pytest.mark.parametrize("columns", [5, 48])
def test_no_weight_is_further_than_half_a_step_from_where_it_is_held(bits: int, columns: int) -> None:
    weight = torch.randn(7, columns, generator=seeded(0))
    weight[3] = 0.0
    store = MatrixStore.of(weight, spec_of(bits))
    held = store.encode(weight)
    assert sum(tensor.nbytes for tensor in held.values()) == store.stored_bytes(weight.dtype)
    decoded = store.decode(held, torch.float64)
    step = held["scale"].double().abs()
    # Up to 8 bits a range may leave out its largest weight where that pays; wide codes reach all.
    if bits > 8:
        assert bool(((decoded - weight.double()).abs() <= 0.5 * step * (1 + 1e-6)).all())
        assert float(step[weight.abs().amax(dim=1) > 0].max()) <= float(weight.abs().max()) / (2 ** (bits - 1) - 1) * (
            1 + 1e-6
        )
    inner = (decoded / step - (decoded / step).round()).abs()
    assert float(inner.max()) <= 2.0**-30
    assert torch.equal(decoded[3], torch.zeros(columns, dtype=torch.float64))


def test_each_matrix_is_held_as_its_part_says() -> None:
    torch.manual_seed(0)
    dense = nn.LSTM(12, 16, num_layers=2)
    layer = QuantizedLSTM.from_module(dense, parts=PARTS)
    assert dict(layer.spec.parts or ()) == PARTS
    assert torch.equal(layer.weight_ih_l0, dense.weight_ih_l0.detach())
    errors = {
        name: float(
            (getattr(layer, name) - getattr(dense, name).detach()).norm() / getattr(dense, name).detach().norm()
        )
        for name in PARTS
    }
    assert errors["weight_ih_l0"] == 0.0
    assert errors["weight_hh_l0"] < 1e-3 < errors["weight_ih_l1"] < 1e-2 < errors["weight_hh_l1"] < 0.3
    x = torch.randn(5, 3, 12, generator=seeded(1))
    assert torch.equal(layer(x)[0], layer.dequantize()(x)[0])


def test_scales_keep_their_dtype_and_floats_follow_the_models() -> None:
    layer = QuantizedLSTM.from_module(nn.LSTM(12, 16, num_layers=2), parts=PARTS).double()
    state = layer.state_dict()
    assert state["weight_ih_l0_floats"].dtype is torch.float64
    assert state["weight_hh_l0_scale"].dtype is torch.float32
    assert state["weight_ih_l1_scale"].dtype is torch.float16
    assert layer(torch.zeros(2, 1, 12, dtype=torch.float64))[0].dtype is torch.float64


def test_rounding_what_it_stands_for_gives_wide_codes_again() -> None:
    parts = {"weight_ih": spec_of(16), "weight_hh": spec_of(11)}
    layer = QuantizedGRUCell.from_module(nn.GRUCell(12, 16), parts=parts)
    again = layer.with_weight(layer.exact_weight())
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].float(), tensor.float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "parts",
    [
        {"weight_ih": spec_of(8)},
        {"weight_ih": spec_of(8), "weight_hh": spec_of(8), "weight_hr": spec_of(8)},
        {"weight_ih": spec_of(8), "weight_hh": spec_of(9)},
        {"weight_ih": spec_of(8), "weight_hh": LayerSpec("int12", bits=12, group=32)},
        {"weight_ih": spec_of(8), "weight_hh": LayerSpec("int4", bits=4, group=48)},
    ],
)
def test_parts_that_no_matrix_has_are_refused(parts: dict[str, LayerSpec]) -> None:
    with pytest.raises(LowRankError):
        QuantizedGRUCell.from_module(nn.GRUCell(12, 16), parts=parts)
