"""Every convolution kind against the dense float64 judge, over all geometries."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from conv_models import conv_of, correlated_images, geometries, image_for, reference
from helpers import eps, seeded
from torch import Tensor, nn

from lowrank import kernels
from lowrank.errors import CheckpointError, NumericsError, RankError, UsageError
from lowrank.kernels import integer, quantize_tokens
from lowrank.layers import (
    LAYER_KINDS,
    CompressedLayer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    check_scales,
)
from lowrank.numerics.conv_factors import compose, factorize_conv
from lowrank.numerics.convolutions import ConvGeometry, pad_input, patches
from lowrank.numerics.moments import InputStatistics

CASES = geometries()
# torch's own remark on "same" with even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def thin(conv: nn.Module, rank: int, scheme: str = "channel", **options: object) -> CompressedLayer:
    if isinstance(conv, nn.Conv1d):
        return SVDCompressedConv1d.from_conv1d(conv, rank=rank, **options)  # type: ignore[arg-type]
    return SVDCompressedConv2d.from_conv2d(conv, rank=rank, scheme=scheme, **options)  # type: ignore[arg-type]


def rounded(layer: CompressedLayer, activations: str = "int8", bits: int = 8) -> CompressedLayer:
    kind = QuantizedLowRankConv1d if isinstance(layer, SVDCompressedConv1d) else QuantizedLowRankConv2d
    return kind.from_factors(layer, activations=activations, bits=bits)  # type: ignore[arg-type]


def dense(conv: nn.Module, activations: str = "int8", bits: int = 8) -> CompressedLayer:
    if isinstance(conv, nn.Conv1d):
        return QuantizedConv1d.from_conv1d(conv, activations=activations, bits=bits)
    return QuantizedConv2d.from_conv2d(conv, activations=activations, bits=bits)


def schemes(conv: nn.Module) -> tuple[str, ...]:
    return ("channel",) if isinstance(conv, nn.Conv1d) else ("channel", "spatial")


def full_rank(conv: nn.Module, scheme: str) -> int:
    return factorize_conv(conv.weight, scheme=scheme, groups=conv.groups).max_rank


def layers_of(conv: nn.Module, rank: int = 2) -> list[CompressedLayer]:
    """The kinds in a fixed order; the first two are float."""
    thin_ones = [thin(conv, rank, scheme) for scheme in schemes(conv)]
    made = [*thin_ones, dense(conv), dense(conv, "float")]
    return [*made, *(rounded(layer, how) for layer in thin_ones for how in ("int8", "float"))]


def assert_close_to(layer: CompressedLayer, x: Tensor, conv: nn.Module, extra: Tensor | float = 0.0) -> None:
    """Against the layer's own dense kernel, up to the rounding of its dtype (and float32, where it computes in that)."""
    weight = layer.dense_weight().detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()  # type: ignore[union-attr]
    with torch.no_grad():
        actual = layer(x)
    expected = reference(x, weight, bias, conv)
    assert actual.shape == expected.shape
    assert actual.dtype == x.dtype
    size = reference(x.double().abs(), _magnitude(layer), None if bias is None else bias.abs(), conv)
    unit = max(
        eps(x.dtype), 0.0 if isinstance(layer, (SVDCompressedConv1d, SVDCompressedConv2d)) else eps(torch.float32)
    )
    allowed = 4 * unit * (weight[0].numel() ** 0.5 + 2) * size + extra
    assert bool(((actual.double() - expected).abs() <= allowed).all())


def _magnitude(layer: CompressedLayer) -> Tensor:
    state = {name: tensor.double().abs() for name, tensor in layer.state_dict().items()}
    ones = [1] * layer.dims  # type: ignore[attr-defined]
    if "left" in state:
        return compose(state["right"], state["left"], layer.groups)  # type: ignore[attr-defined]
    if "left_codes" in state:
        first = state["right_codes"] * state["scale"].view(-1, 1, *ones)
        return compose(first, state["left_codes"], layer.groups)  # type: ignore[attr-defined]
    return state["codes"] * state["scale"].view(-1, 1, *ones)


@pytest.mark.parametrize("conv", [conv for _, conv in CASES], ids=[name for name, _ in CASES])
def test_every_geometry_matches_the_dense_kernel(conv: nn.Module) -> None:
    conv = copy.deepcopy(conv)
    x = image_for(conv)
    with torch.no_grad():
        expected = conv(x)
    for scheme in schemes(conv):
        full = full_rank(conv, scheme)
        exact = thin(conv, full, scheme)
        with torch.no_grad():
            torch.testing.assert_close(exact(x), expected, rtol=1e-11, atol=1e-11)
        for rank in {1, (full + 1) // 2}:
            layer = thin(conv, rank, scheme)
            assert_close_to(layer, x, conv)
            assert_close_to(rounded(layer, "float"), x, conv)
            _assert_rounded_forward(rounded(layer), x.float(), conv)
        assert exact.shape == tuple(conv.weight.shape)
    for layer in (dense(conv, "float"), dense(conv)):
        if layer.activations == "float":
            assert_close_to(layer, x, conv)
        else:
            _assert_rounded_forward(layer, x.float(), conv)
        assert layer.shape == tuple(conv.weight.shape)
        assert layer.stored_bytes == sum(tensor.nbytes for tensor in layer.state_dict().values())


def _assert_rounded_forward(layer: CompressedLayer, x: Tensor, conv: nn.Module) -> None:
    """Bit for bit against integers in int64 and the documented float operations, one after the other."""
    with torch.no_grad():
        actual = layer(x)
        y = x
        stages = layer.stages()  # type: ignore[operator]
        for index, stage in enumerate(stages):
            codes, scale, geometry = stage
            bias = layer.bias if index == len(stages) - 1 else None
            scale = torch.ones(codes.shape[0]) if scale is None else scale
            size = geometry.output_size(y.shape[2:])
            padded = pad_input(y, geometry)
            rows, step, offset = quantize_tokens(padded.flatten(1))
            whole = (rows.long() - offset.long()).view(padded.shape)
            bare = ConvGeometry(geometry.kernel_size, geometry.stride, (), geometry.dilation, geometry.groups)
            unfolded = patches(whole, bare).unflatten(2, (geometry.groups, -1))
            weight = codes.long().flatten(1).unflatten(0, (geometry.groups, -1))
            sums = (unfolded.transpose(1, 2) @ weight.transpose(1, 2)).permute(0, 1, 3, 2).flatten(1, 2)
            y = sums.float().mul(scale[:, None]).mul(step[:, :, None])
            if bias is not None:
                y = y.add(bias.float()[:, None])
            y = y.view(len(x), -1, *size)
    assert torch.equal(actual, y)
    exact = reference(x, layer.dense_weight(), None if layer.bias is None else layer.bias, conv)
    assert float((actual.double() - exact).norm()) <= 0.03 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2])
def test_every_dtype(dims: int, dtype: torch.dtype) -> None:
    conv = conv_of(dims, (6, 9), 3, padding=1, groups=3, dtype=dtype)
    x = image_for(conv)
    for layer in layers_of(conv):
        extra: Tensor | float = 0.0
        if isinstance(layer, (SVDCompressedConv1d, SVDCompressedConv2d)):
            # The image between the two is rounded to the dtype too.
            extra = 4 * eps(dtype) * reference(x.double().abs(), _magnitude(layer), None, conv)
        if getattr(layer, "activations", "float") == "int8":
            step = x.double().abs().amax() / 127
            extra = 2 * step * _magnitude(layer).flatten(1).sum(dim=1).view(-1, *(1,) * dims)
            if layer.rank is not None:
                # Components are rounded to a share of the largest of the sample.
                codes = layer.left_codes.double().abs().flatten(1).sum(dim=1)
                first = layer.right_codes.double().abs().flatten(1).sum(dim=1) * layer.scale.double()
                extra = extra + (codes * first.max() * x.double().abs().amax() / 127).view(-1, *(1,) * dims)
        assert_close_to(layer, x, conv, extra)
        assert layer.dtype == dtype
        assert layer.bias.dtype == dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("dims", [1, 2])
def test_routes_agree_bit_for_bit(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = conv_of(dims, (12, 20), 3, padding=1, stride=2)
    x = image_for(conv, 5) * torch.logspace(-30, 30, 5).view(-1, *(1,) * (dims + 1))
    for layer in (dense(conv), rounded(thin(conv, 5))):
        with torch.no_grad():
            ours = layer(x)
            with kernels.torch_route():
                torch_route = layer(x)
                with monkeypatch.context() as patch:
                    patch.setitem(integer._routes, x.device, ("int64", lambda a, b: (a.long() @ b.long().T).int()))
                    slow = layer(x)
        assert torch.equal(ours, torch_route)
        assert torch.equal(ours, slow)


def test_samples_do_not_see_each_other() -> None:
    conv = conv_of(2, (4, 8), 3, padding=1)
    x = image_for(conv, 4)
    for layer in layers_of(conv)[2:]:
        with torch.no_grad():
            clean = layer(x)
            for value in (math.nan, math.inf):
                spoiled = x.clone()
                spoiled[2, 1, 3, 3] = value
                found = layer(spoiled)
                assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])
                assert not bool(torch.isfinite(found[2]).all())
        torch.testing.assert_close(layer(x[1:2]), clean[1:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2])
def test_layouts_and_batches(dims: int) -> None:
    conv = conv_of(dims, (4, 8), 3, padding=1)
    x = image_for(conv, 3)
    for layer in layers_of(conv):
        with torch.no_grad():
            whole = layer(x)
            torch.testing.assert_close(layer(x[1]), whole[1], rtol=1e-6, atol=1e-6)
            assert layer(x[:0]).shape == (0, *whole.shape[1:])
            strided = x.transpose(1, 2).contiguous().transpose(1, 2)
            torch.testing.assert_close(layer(strided), whole, rtol=1e-6, atol=1e-6)
            if dims == 2:
                last = x.to(memory_format=torch.channels_last)
                torch.testing.assert_close(layer(last), whole, rtol=1e-6, atol=1e-6)
                moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
                torch.testing.assert_close(moved(last), whole, rtol=1e-6, atol=1e-6)
        for bad in (x[:, :2], x.long(), x[0, 0]):
            with pytest.raises(UsageError, match="channels"):
                layer(bad)


@pytest.mark.parametrize("dims", [1, 2])
def test_copies_and_state_are_exact(dims: int) -> None:
    conv = conv_of(dims, (4, 8), 3, padding="same", groups=2, padding_mode="reflect").eval()
    conv.weight.requires_grad_(False)
    x = image_for(conv)
    for layer in layers_of(conv):
        expected = layer(x)
        assert not layer.training
        assert not any(name in ("left", "right") and p.requires_grad for name, p in layer.named_parameters())
        assert layer.bias.requires_grad  # type: ignore[union-attr]
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
        rebuilt = LAYER_KINDS[layer.kind].from_config(layer.config())
        rebuilt(x)  # what was derived before loading must not survive it
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        rebuilt.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(rebuilt(x), expected)
        assert rebuilt.config() == layer.config()
        assert repr(rebuilt) == repr(layer)
        meta = LAYER_KINDS[layer.kind].from_config(layer.config(), device="meta")
        assert {name: t.shape for name, t in meta.state_dict().items()} == {
            name: t.shape for name, t in layer.state_dict().items()
        }
        check_scales(layer, "conv")


def test_scales_are_checked_and_survive_low_precision() -> None:
    conv = conv_of(2, (4, 8), 3, groups=2)
    for layer in (dense(conv), rounded(thin(conv, 2)), rounded(thin(conv, 2, "spatial"))):
        before = layer.scale.clone()
        for changed in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16)):
            assert torch.equal(changed.scale, before)
            assert changed(image_for(conv).to(changed.dtype)).dtype == changed.dtype != torch.float32
        layer.scale = layer.scale[1:]
        with pytest.raises(CheckpointError, match="scale"):
            check_scales(layer, "conv")


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("dims", [1, 2])
def test_gradients_reach_input_bias_and_factors(dims: int, mode: str) -> None:
    conv = conv_of(dims, (4, 8), 4, padding="same", dilation=2, groups=2, padding_mode=mode)
    for layer in layers_of(conv):
        x = image_for(conv).requires_grad_()
        result = layer(x)
        gradient = torch.randn(result.shape, generator=seeded(7))
        result.backward(gradient)
        ours = x.grad
        other = image_for(conv).double().requires_grad_()
        bare = reference_with_grad(other, layer, conv)
        (theirs,) = torch.autograd.grad(bare, other, gradient.double())
        assert ours is not None
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
        assert isinstance(layer.bias, nn.Parameter)
        torch.testing.assert_close(layer.bias.grad, gradient.transpose(0, 1).flatten(1).sum(1), rtol=1e-4, atol=1e-5)
        trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
        assert trained == ({"left", "right", "bias"} if layer.bits is None else {"bias"})


def reference_with_grad(x: Tensor, layer: CompressedLayer, conv: nn.Module) -> Tensor:
    twin = copy.deepcopy(conv).double()
    with torch.no_grad():
        twin.weight.copy_(layer.dense_weight())
    return twin(x)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2])
def test_error_bound_holds_and_is_tight(dims: int, groups: int, bits: int) -> None:
    conv = conv_of(dims, (8, 12), 3, groups=groups, bias=False)
    made = [dense(conv, bits=bits)]
    for scheme in schemes(conv):
        full = full_rank(conv, scheme)
        made += [rounded(thin(conv, rank, scheme), bits=bits) for rank in (1, full // 2, full)]
    for layer in made:
        lost = float((layer.dense_weight().double() - conv.weight.detach().double()).norm())
        assert lost <= layer.error_bound() <= 4 * lost  # type: ignore[operator]
    with pytest.raises(UsageError, match="not made from a weight"):
        QuantizedConv2d(3, 4, 3).error_bound()


@pytest.mark.parametrize("dims", [1, 2])
def test_ways_back_to_dense(dims: int) -> None:
    conv = conv_of(dims, (4, 8), 3, padding="same", groups=2, padding_mode="replicate")
    x = image_for(conv)
    full = full_rank(conv, "channel")
    layer = thin(conv, full)
    back = layer.to_conv1d() if dims == 1 else layer.to_conv2d()  # type: ignore[operator]
    torch.testing.assert_close(back.weight, conv.weight, rtol=0, atol=4e-7)
    assert ConvGeometry.of(back) == ConvGeometry.of(conv) == ConvGeometry.of(layer)
    torch.testing.assert_close(back(x), conv(x), rtol=1e-5, atol=1e-5)
    assert layer.reconstruction_error(conv.weight) < 4 * eps(torch.float32)  # type: ignore[operator]
    for scheme in schemes(conv):
        quantized = rounded(thin(conv, 3, scheme))
        half = quantized.dequantize()  # type: ignore[operator]
        torch.testing.assert_close(half.dense_weight(), quantized.dense_weight(), rtol=1e-5, atol=1e-6)
        assert half.scheme == scheme
    plain = dense(conv)
    assert torch.equal(plain.dequantize().weight, plain.dense_weight())  # type: ignore[operator]
    assert torch.equal(plain.dequantize().bias, conv.bias)  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("groups", [1, 2])
def test_max_error_and_statistics(scheme: str, groups: int) -> None:
    conv = conv_of(2, (4, 8), 3, padding=1, groups=groups)
    images = correlated_images(4).float()
    rows = patches(images, ConvGeometry.of(conv)).flatten(0, 1)
    statistics = InputStatistics(rows.shape[1], blocks=groups)
    statistics.update(rows)
    for given in (None, statistics):
        curve = factorize_conv(conv.weight, given, scheme=scheme, groups=groups)
        layer = SVDCompressedConv2d.from_conv2d(conv, max_error=0.1, scheme=scheme, statistics=given)
        assert curve.errors[layer.rank] <= 0.1 < curve.errors[layer.rank - 1]
        int8 = QuantizedLowRankConv2d.from_conv2d(conv, max_error=0.1, scheme=scheme, statistics=given)
        assert int8.rank >= layer.rank
        with torch.no_grad():
            expected = conv(images)
            centre = expected.transpose(0, 1).flatten(1).mean(dim=1).view(-1, 1, 1)
            error = float((layer(images) - expected).norm() / (expected - centre).norm())
        if given is not None:
            assert error <= 0.1 + 1e-5
    with pytest.raises(RankError, match=r"full rank"):
        QuantizedLowRankConv2d.from_conv2d(conv, max_error=1e-7, scheme=scheme)


def test_bad_arguments_are_named() -> None:
    conv, line = conv_of(2, (4, 8), 3), conv_of(1, (4, 8), 3)
    for rank in (0, 9, 2.0, True, None):
        with pytest.raises(RankError):
            SVDCompressedConv2d.from_conv2d(conv, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scheme"):
        SVDCompressedConv2d.from_conv2d(conv, rank=2, scheme="depth")
    for kind in (SVDCompressedConv1d, QuantizedLowRankConv1d):
        with pytest.raises(UsageError, match="two dimensions"):
            kind.from_conv1d(line, rank=2, scheme="spatial")
    for make in (SVDCompressedConv2d.from_conv2d, QuantizedLowRankConv2d.from_conv2d):
        with pytest.raises(UsageError, match=r"nn\.Conv2d, got Conv1d"):
            make(line, rank=2)
    with pytest.raises(UsageError, match=r"nn\.Conv1d, got Linear"):
        QuantizedConv1d.from_conv1d(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="SVDCompressedConv2d"):
        QuantizedLowRankConv2d.from_factors(SVDCompressedConv1d.from_conv1d(line, rank=2))
    with pytest.raises(RankError, match="groups"):
        SVDCompressedConv2d(4, 8, 3, 2, groups=3)
    with pytest.raises(UsageError, match="stride"):
        QuantizedConv2d(4, 8, 3, stride=(1, 2, 3))
    with pytest.raises(RankError, match="2 to 8"):
        QuantizedConv2d.from_conv2d(conv, bits=1)
    with pytest.raises(UsageError, match="activations"):
        dense(conv).activations = "int4"
    with pytest.raises(RankError, match="do not fit"):
        SVDCompressedConv2d.from_factors(factorize_conv(conv.weight).factors(2), conv, "spatial")
    shifted = factorize_conv(conv.weight, InputStatistics.from_samples(torch.randn(50, 36, generator=seeded())))
    with pytest.raises(RankError, match="bias shift"):
        SVDCompressedConv2d.from_factors(shifted.factors(2), conv_of(2, (4, 8), 3, bias=False))
    with pytest.raises(UsageError, match="shape"):
        QuantizedConv2d.from_config(dense(conv).config() | {"shape": [8, 4, 3, 5]})
    with torch.no_grad():
        conv.weight[1, 2, 0, 1] = math.nan
    with pytest.raises(NumericsError, match=r"\[1, 2, 0, 1\]"):
        QuantizedConv2d.from_conv2d(conv)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3e36])
@torch.no_grad()
def test_extreme_kernels_stay_finite(size: float) -> None:
    conv = conv_of(2, (4, 6), 3, bias=False)
    conv.weight.div_(conv.weight.abs().max()).mul_(size)
    x = image_for(conv) * 0.1
    expected = conv(x)
    for layer in layers_of(conv, 6)[:-4] + [rounded(thin(conv, 6), how) for how in ("int8", "float")]:
        result = layer(x)
        assert bool(torch.isfinite(result).all())
        check_scales(layer, "conv") if layer.bits else None
        if size > 1e-37:
            largest = expected.abs().max()
            lost = ((result - expected) / largest).double().norm() / (expected / largest).double().norm()
            # Of the spatial form rank 6 of 12 is not all.
            assert float(lost) < (0.9 if getattr(layer, "scheme", "") == "spatial" else 0.05)


def test_layers_from_scratch_train() -> None:
    torch.manual_seed(0)
    layer = SVDCompressedConv2d(3, 8, (3, 5), 4, padding="same", scheme="spatial")
    assert 0.5 < float(layer.dense_weight().detach().std() / nn.Conv2d(3, 8, (3, 5)).weight.detach().std()) < 2.0
    x, target = torch.randn(4, 3, 8, 8, generator=seeded()), torch.randn(4, 8, 8, 8, generator=seeded(1))
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


def test_new_codes_are_seen() -> None:
    layer, other = dense(conv_of(2, (4, 8), 3)), dense(conv_of(2, (4, 8), 3, bias=False))
    x = image_for(conv_of(2, (4, 8), 3))
    with torch.no_grad():
        before = layer(x)
        layer.codes.neg_()
        layer.bias.neg_()  # type: ignore[union-attr]
        torch.testing.assert_close(layer(x), -before)
        other.codes = torch.zeros_like(other.codes)
        assert float(other(x).abs().max()) == 0.0


def test_compiles() -> None:
    conv = conv_of(2, (4, 8), 3, padding="same", padding_mode="circular")
    x = image_for(conv)
    for layer in layers_of(conv):
        with torch.no_grad():
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), layer(x))
