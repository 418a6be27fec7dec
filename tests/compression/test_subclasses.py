"""Modules with a forward of their own: kept in codes, decoded into it, saved and loaded to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.errors import CheckpointError, UsageError
from lowrank.layers import DecodedLayer, QuantizedConv2d, QuantizedGRU, QuantizedLinear


class SameConv(nn.Conv2d):
    """TensorFlow's padding, worked out from the size of the input."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, step in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // step) - 1) * step + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Masked(nn.Conv2d):
    """Changes its weight in place by a buffer, as PixelCNN does; and holds one that no file has."""

    def __init__(self) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.register_buffer(
            "mask", (torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(3)) > 0.3).float()
        )
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(self.mask)
        return super().forward(input) + self.shift


class Equalised(nn.Module):
    """No class of torch's: a matrix, a gain with the name of our scale, and a number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.scale = nn.Parameter(torch.full((outputs,), 1.5))
        self.step = inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.step) * self.scale


class Renamed(nn.Linear):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.data.mul_(0.5)


class PlainConv(nn.Conv2d):
    pass


class Held(nn.Linear):
    """Computes as its base, but holds what a replacement would lose."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("seen", torch.zeros(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        SameConv(3, 16, 3, stride=2),
        nn.ReLU(),
        Masked(),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        Equalised(48, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    ).eval()


def data(count: int = 8) -> list[Tensor]:
    return [torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def small() -> lowrank.CompressionResult:
    return lowrank.compress_model(network(), error_budget=0.1, calibration=data(), progress=False)


def test_every_layer_is_kept_in_codes(small):
    kinds = {name: type(small.model[int(name)]) for name in ("0", "2", "4", "7")}
    assert set(kinds.values()) == {DecodedLayer}
    assert small.report.totals["size_ratio"] < 0.5
    small.report.check_totals()
    for row in small.report.rows:
        if row.name in kinds:
            assert row.format == "int8" and row.arithmetic.remark == "weight-only" and row.weight_error < 0.02
    # Right at sizes that calibration never saw: the padding is the module's own.
    for size in (9, 12, 17):
        x = torch.randn(4, 3, size, size)
        with torch.no_grad():
            dense, other = network()(x), small.model(x)
        assert float((dense - other).norm() / dense.norm()) < 0.05
    assert small.model[0].stride == (2, 2) and small.model[0].weight.shape == (16, 3, 3, 3)


def test_it_goes_through_a_file(small, tmp_path):
    small.save(tmp_path / "out")
    again = lowrank.load_model(tmp_path / "out", model=network())
    x = data(1)[0]
    with torch.no_grad():
        assert torch.equal(again(x), small.model(x))
    names = set(small.model.state_dict())
    assert {"0.codes", "0.scale", "0.bias", "2.mask", "7.weight_codes", "7.weight_scale", "7.scale"} <= names
    assert not {name for name in names if name.endswith(".weight")}
    assert torch.equal(lowrank.load_model(tmp_path / "out", model=network)(x), small.model(x))
    other = network()
    other[0] = SameConv(3, 16, 3, stride=2, bias=False)
    with pytest.raises(CheckpointError, match="the SameConv of the model holds"):
        lowrank.load_model(tmp_path / "out", model=other)


def test_plans_copies_and_dtypes(small):
    applied = lowrank.apply_plan(network(), small.plan, data())
    x = data(1)[0]
    with torch.no_grad():
        assert torch.equal(applied(x), small.model(x))
        twin = copy.deepcopy(small.model)
        assert torch.equal(twin(x), small.model(x)) and twin[2].source is not small.model[2].source
        half = copy.deepcopy(small.model).double()
        assert half[2].codes.dtype == torch.int8 and half[2].scale.dtype == torch.float32
        torch.testing.assert_close(half(x.double()).float(), small.model(x), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input_and_what_is_kept():
    layer = DecodedLayer.from_module(Equalised(48, 32))
    x = torch.randn(2, 48, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.scale.grad is not None
    dense = layer.dequantize()
    assert type(dense) is Equalised
    torch.testing.assert_close(dense(x), layer(x))
    with pytest.raises(UsageError, match="no forward yet"):
        DecodedLayer.from_config(layer.config())(x)
    assert torch.equal(layer.weight, dense.weight) and not layer.weight.requires_grad


def test_plain_subclasses_are_their_base():
    torch.manual_seed(0)
    gru = type("PlainGRU", (nn.GRU,), {})
    model = nn.ModuleDict(
        {"linear": Renamed(32, 32), "conv": PlainConv(8, 8, 3), "gru": gru(16, 16), "held": Held(32, 32)}
    )
    result = lowrank.compress_model(model, size_budget=0.4, formats=("int8",), progress=False)
    assert type(result.model["linear"]) is QuantizedLinear and type(result.model["conv"]) is QuantizedConv2d
    assert type(result.model["gru"]) is QuantizedGRU
    # Its buffer goes with it.
    assert type(result.model["held"]) is DecodedLayer and "held.seen" in result.model.state_dict()


def test_what_is_left_alone_has_its_reason(tmp_path: Path):
    class Renorm(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleDict(
        {
            "renorm": Renorm(40, 16, max_norm=1.0),
            "norm": nn.LayerNorm((8, 16)),
            "bag": nn.EmbeddingBag(40, 16),
            "fc": nn.Linear(32, 8),
            "list": nn.ParameterList([nn.Parameter(torch.ones(8, 8))]),
        }
    )
    result = lowrank.compress_model(model, size_budget=0.9, formats=("int8",), progress=False)
    rows = {row.name: row for row in result.report.rows}
    assert "max_norm" in rows["renorm"].reason and rows["norm"].reason == "not a target"
    assert not rows["list"].compressed and type(result.model["bag"]) is DecodedLayer
    result.save(tmp_path / "out")
    again = lowrank.load_model(tmp_path / "out", model=model)
    ids, offsets = torch.arange(12), torch.tensor([0, 5])
    assert torch.equal(again["bag"](ids, offsets), result.model["bag"](ids, offsets=offsets))
