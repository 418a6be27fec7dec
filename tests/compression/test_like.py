"""Classes of a user's own that pad and then are a layer of torch's: every format, inside their own forward."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank.errors import CheckpointError, UsageError
from lowrank.layers import DecodedLayer, PaddedLayer, QuantizedConv2d, QuantizedLowRankConv2d


class StaticSame(nn.Conv2d):
    """EfficientNet's Conv2dStaticSamePadding: a padding module worked out once, from the image's size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, image: int = 16, **options: Any) -> None:
        super().__init__(inputs, outputs, kernel, **options)
        total = max((math.ceil(image / self.stride[0]) - 1) * self.stride[0] + kernel - image, 0)
        self.static_padding = nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicSame(nn.Conv2d):
    """timm's Conv2dSame: pads by the size of the input, which it reads, as that of its weight, on each call."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        kernel = self.weight.size()[-2:]
        for size, extent, step, gap in zip(input.shape[-2:], kernel, self.stride, self.dilation, strict=True):
            total = max((math.ceil(size / step) - 1) * step + (extent - 1) * gap + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Reflected(nn.Conv2d):
    """Leaves the product to its base."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 0, 2, 1), mode="reflect"))


class Causal(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        margin = (self.kernel_size[0] - 1) * self.dilation[0]
        return self._conv_forward(F.pad(input, (margin, 0)), self.weight, self.bias)


class Rooted(nn.Linear):
    """Pads its input with its mean, then is a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(torch.cat([input, input.mean(dim=-1, keepdim=True)], dim=-1), self.weight, bias=self.bias)


LIKE: dict[type[nn.Module], type[nn.Module]] = {
    StaticSame: nn.Conv2d,
    DynamicSame: nn.Conv2d,
    Reflected: nn.Conv2d,
    Rooted: nn.Linear,
}


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        StaticSame(3, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        DynamicSame(24, 48, 3, stride=2, groups=2),
        nn.ReLU(),
        Reflected(48, 40, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Rooted(41, 32),
        nn.ReLU(),
        nn.Linear(32, 6),
    ).eval()


def data(count: int = 8, size: int = 16) -> list[Tensor]:
    return [torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def compress(model: nn.Module | None = None, **kwargs: Any) -> lowrank.CompressionResult:
    arguments: dict[str, Any] = {"calibration": data(), "error_budget": 0.03, "progress": False, "like": LIKE}
    return lowrank.compress_model(images() if model is None else model, **(arguments | kwargs))


def int8() -> lowrank.CompressionResult:
    return compress(formats=["int8"], activations="int8")


NAMES = ("0", "3", "5", "8")


@pytest.fixture(scope="module")
def small() -> lowrank.CompressionResult:
    return int8()


def test_they_take_integer_products_inside_their_own_forward(
    small: lowrank.CompressionResult, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [small.model.get_submodule(name) for name in NAMES]
    assert all(type(layer) is PaddedLayer and layer.activations == "int8" for layer in layers)
    assert type(layers[1].product) is QuantizedConv2d
    rows = {row.name: row for row in small.report.rows}
    assert rows["3"].kind == "DynamicSame" and rows["3"].arithmetic.remark == "integer"
    assert "in the forward of DynamicSame, which is like nn.Conv2d" in str(rows["3"].reason)
    small.report.check_totals()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="lowrank"):
        for size in (16, 13, 23):
            # Sizes that calibration never saw: what pads is the user's own.
            x = data(1, size)[0]
            dense, rounded = images()(x), small.model(x)
            assert float((dense - rounded).norm() / dense.norm()) < 0.03
    assert all(layer.weight_decodings == 0 for layer in layers) and "decoded" not in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_inside_does_the_product_and_nothing_else(small: lowrank.CompressionResult, name: str) -> None:
    layer = small.model.get_submodule(name)
    dense = layer.dequantize()
    assert type(dense) is type(images().get_submodule(name)) and layer.weight.shape == dense.weight.shape
    assert torch.equal(layer.weight.detach(), dense.weight.detach())
    seen: list[Tensor] = []
    layer.product.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 40) if name == "8" else torch.randn(2, {"0": 3, "3": 24, "5": 48}[name], 11, 14)
    with torch.no_grad():
        found, wanted = layer(x), dense(x)
    assert seen[0] is found
    # Half a step of each input's range, a little more for the products' sum.
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    layer.product._forward_hooks.clear()


def test_it_goes_through_a_file_and_a_plan(small: lowrank.CompressionResult, tmp_path: Path) -> None:
    small.save(tmp_path / "out")
    x = data(1, 19)[0]
    with torch.no_grad():
        for model in (images, images()):
            assert torch.equal(lowrank.load_model(tmp_path / "out", model=model)(x), small.model(x))
        plan = lowrank.Plan.from_json((tmp_path / "out" / "plan.json").read_text())
        assert {entry.name for entry in plan.entries} >= set(NAMES)
        assert torch.equal(lowrank.apply_plan(images(), plan, data())(x), small.model(x))
        # The plan says what the classes are like.
        again = compress(plan=plan, like=None)
        assert torch.equal(again.model(x), small.model(x))
        assert again.certificate["tensors"] == small.certificate["tensors"]
    assert "3.product.codes" in small.model.state_dict() and "3.weight" not in small.model.state_dict()
    other = images()
    other[0] = StaticSame(3, 24, 3, stride=2)
    with pytest.raises(CheckpointError, match=r"holds|missing"):
        lowrank.load_model(tmp_path / "out", model=other)


def test_low_rank_formats_and_overrides_reach_the_layer_inside() -> None:
    formats = ["int8", "lowrank-int8"]
    result = compress(
        error_budget=0.9, formats=formats, overrides={"5": {"format": "lowrank-int8", "rank": 9}, "8": "dense"}
    )
    assert type(result.model[5].product) is QuantizedLowRankConv2d and result.model[5].rank == 9
    assert type(result.model[8]) is Rooted
    x = data(1)[0]
    dense = result.model[5].dequantize()
    assert type(dense) is Reflected
    entry = result.plan.entry("5")
    assert (entry.format, entry.rank) == ("lowrank-int8", 9)
    assert torch.isfinite(result.model(x)).all()


def test_ignored_ones_stay_and_others_are_decoded_as_before() -> None:
    result = compress(ignore=["3"], like={DynamicSame: nn.Conv2d, StaticSame: nn.Conv2d}, formats=["int8"])
    assert type(result.model[3]) is DynamicSame and type(result.model[5]) is DecodedLayer
    assert type(result.model[0]) is PaddedLayer
    rows = {row.name: row for row in result.report.rows}
    assert rows["3"].reason == "ignored"


@pytest.mark.parametrize("heal", [False, {"steps": 2}])
def test_inplace(heal: Any) -> None:
    model = images()
    order = [model[3]]
    arguments: dict[str, Any] = {"heal": heal, "error_budget": 0.2, "formats": ["int8"]}
    result = compress(model, inplace=True, **arguments)
    assert result.model is model and type(model[5]) is PaddedLayer and order[0] is model[3]
    other = compress(**arguments)
    x = data(1)[0]
    with torch.no_grad():
        assert torch.equal(model(x), other.model(x))


def test_a_causal_convolution() -> None:
    torch.manual_seed(0)
    causal = nn.Sequential(Causal(24, 32, 3, dilation=2)).eval()
    inputs = [torch.randn(32, 24, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = compress(causal, like={Causal: nn.Conv1d}, calibration=inputs, formats=["int8"])
    assert type(result.model[0]) is PaddedLayer and result.model[0].product.geometry.dilation == (2,)
    changed = inputs[0].clone()
    # The largest and the smallest of a sample's inputs set its step: they stay.
    changed[:, :, 15:] = changed[:, :, 15:].sign() * 0.1
    changed[:, 0, 0], changed[:, 1, 0] = 9.0, -9.0
    earlier = changed.clone()
    earlier[:, :, 15:] = 0.0
    with torch.no_grad():
        one, other = result.model(changed), result.model(earlier)
    assert one.shape == (32, 32, 20) and torch.equal(one[:, :, :15], other[:, :, :15])
    assert not torch.equal(one[:, :, 15:], other[:, :, 15:])


def test_copies_dtypes_and_threads(small: lowrank.CompressionResult) -> None:
    x = data(1)[0]
    with torch.no_grad():
        twin = copy.deepcopy(small.model)
        assert torch.equal(twin(x), small.model(x))
        assert twin[3].source.weight._layer is twin[3] and small.model[3].source.weight._layer is not twin[3]
        twin[3].product.scale.mul_(2.0)
        assert not torch.equal(twin(x), small.model(x))
        sent = pickle.loads(pickle.dumps(small.model))
        assert torch.equal(sent(x), small.model(x))
        double = copy.deepcopy(small.model).double()
        assert double[3].weight.dtype == torch.float64 and double[3].product.scale.dtype == torch.float32
        torch.testing.assert_close(double(x.double()).float(), small.model(x), rtol=1e-3, atol=1e-3)


def test_adapters_go_on_the_layer_inside_and_healing_moves_it(small: lowrank.CompressionResult) -> None:
    x = data(1)[0]
    with pytest.raises(UsageError, match=r"the layer inside takes adapters: 3.product"):
        lowrank.add_lora(small.model, lowrank.LoRAConfig(r=2, target_modules=["3"]))
    adapted = lowrank.add_lora(small.model, lowrank.LoRAConfig(r=2, target_modules=["3.product", "8.product"]))
    with torch.no_grad():
        assert torch.equal(adapted(x), small.model(x))
        adapted[3].product.lora_B["default"].weight.fill_(0.1)
        assert not torch.equal(adapted(x), small.model(x))
    healed = lowrank.heal(small.model, images(), data(), steps=2, progress=False).model
    assert type(healed[3]) is PaddedLayer and healed[3].weight_decodings == 0
    assert torch.isfinite(healed(x)).all()


def test_gradients_reach_input_and_bias(small: lowrank.CompressionResult) -> None:
    model = copy.deepcopy(small.model)
    x = data(1)[0].requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0.0
    assert model[3].product.bias.grad is not None


def test_another_geometry_than_was_seen_is_decoded_and_right(small: lowrank.CompressionResult) -> None:
    class Argument(nn.Conv2d):
        """Hands its padding over as an argument, worked out from the input."""

        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight, self.bias, self.stride, input.shape[-1] % 3)

    torch.manual_seed(0)
    model = nn.Sequential(Argument(3, 32, 3), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(2)).eval()
    result = compress(model, like={Argument: nn.Conv2d}, formats=["int8"])
    with torch.no_grad():
        for size, decodings in ((16, 0), (17, 1)):
            x = data(1, size)[0]
            wanted = model(x)
            assert float((result.model(x) - wanted).norm() / wanted.norm()) < 0.02
            assert result.model[0].weight_decodings == decodings


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class After(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :8]) + super().forward(x[:, :, 8:])


class OwnBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None if self.bias is None else self.bias + 1)


class Masked(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.mask)


class Unfolded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel_size)
        return (self.weight.flatten(1) @ patches).view(len(x), -1, x.shape[2] - 2, x.shape[3] - 2)


class Unused(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Idle(nn.Module):
    """Holds a convolution that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.idle, self.head = nn.Conv2d(3, 8, 3), Unused(3, 8, 3), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            Standardised,
            r"layer 0 \(Standardised\): its forward computes with the weight before the product.*\(mean|sub",
        ),
        (After, r"does more with what comes out"),
        (Twice, r"makes 2 products in 1 calls"),
        (OwnBias, r"with another bias than its own"),
        (Masked, r"holds mask beside weight and bias"),
        (Unfolded, r"computes with the weight before the product, or beside it \(flatten"),
    ],
)
def test_what_does_something_else_is_refused_with_what_was_seen(kind: type[nn.Module], words: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 16, 3), nn.Flatten()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=words) as caught:
        compress(model, like={kind: nn.Conv2d})
    assert "leave the class out of like" in str(caught.value)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"like": {"SameConv": nn.Conv2d}}, r"'SameConv' must be a class of modules"),
        ({"like": {StaticSame: nn.Conv3d}}, r"StaticSame can be like nn.Conv1d, nn.Conv2d, nn.Linear, got 'Conv3d'"),
        ({"like": {StaticSame: nn.Conv1d}}, r"shape \(24, 3, 3, 3\) is none of an nn.Conv1d"),
        ({"like": [StaticSame]}, r"must be a dict"),
        ({"like": {After: nn.Conv2d}}, r"no module of the model is a After"),
        ({"calibration": None}, r"like: needs calibration"),
        ({"fold_batchnorm": True}, r"cannot be combined with fold_batchnorm"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compress(**arguments)


def test_what_the_data_does_not_reach_or_is_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layer idle \(Unused\): the first batch does not reach it"):
        compress(Idle().eval(), like={Unused: nn.Conv2d})
    model = nn.Sequential(Rooted(13, 12), nn.ReLU(), Rooted(13, 12)).eval()
    model[2].weight = model[0].weight
    with pytest.raises(UsageError, match=r"its weight is that of 2 too"):
        compress(model, like={Rooted: nn.Linear}, calibration=[torch.randn(64, 12)])


def test_a_plan_with_a_geometry_that_is_none_is_refused(small: lowrank.CompressionResult) -> None:
    for like, kind in (([], CheckpointError), ({"3": 5}, CheckpointError), ({"nowhere": {"of": "Conv2d"}}, UsageError)):
        plan = lowrank.Plan(small.plan.entries, metadata={**small.plan.metadata, "like": like})
        with pytest.raises(kind, match="like"):
            lowrank.apply_plan(images(), plan, data())


def test_like_without_a_module_to_take_apart_changes_nothing() -> None:
    model = images()
    result = compress(
        model, ignore=["0"], like={StaticSame: nn.Conv2d, nn.Linear: nn.Linear}, inplace=True, formats=["int8"]
    )
    assert result.model is model and type(model[0]) is StaticSame and "like" not in result.plan.metadata
    assert type(model[10]) is not nn.Linear


def test_a_plan_made_without_like_says_so() -> None:
    plan = compress(like=None, formats=["int8"]).plan
    with pytest.raises(UsageError, match="the plan was made without it"):
        compress(plan=plan)
