"""Integer convolutions: exact sums of rounded samples on every geometry, native and torch bit for bit the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from torch import Tensor

from lowrank import kernels
from lowrank.errors import UsageError
from lowrank.kernels import IntegerConv, conv, native, quantize_tokens
from lowrank.numerics.convolutions import ConvGeometry, pad_input

# With each set of instructions there is; see conftest.py.
needs_library = pytest.mark.usefixtures("native_level")
# (geometry, out, in)
CASES = {
    "3x3": (ConvGeometry((3, 3), padding=(1, 1)), 16, 3),
    "strided": (ConvGeometry((3, 2), (2, 3), (2, 1)), 40, 18),
    "dilated": (ConvGeometry((2, 3), (1, 2), (0, 2), (3, 2)), 70, 33),
    "pointwise": (ConvGeometry((1, 1)), 130, 65),
    "pointwise strided": (ConvGeometry((1, 1), (2, 2)), 17, 4),
    "same": (ConvGeometry((2, 4), padding="same"), 5, 7),
    "reflect": (ConvGeometry((3, 3), padding=(2, 1), padding_mode="reflect"), 6, 5),
    "circular": (ConvGeometry((3, 3), padding=(1, 1), padding_mode="circular"), 6, 5),
    "groups": (ConvGeometry((3, 3), padding=(1, 1), groups=3), 9, 6),
    "depthwise": (ConvGeometry((3, 3), (2, 2), (1, 1), groups=8), 8, 8),
    "long groups": (ConvGeometry((9, 9), groups=2), 4, 16),
    "line": (ConvGeometry((5,), (2,), (2,)), 33, 20),
    "line groups": (ConvGeometry((3,), padding=(1,), padding_mode="replicate", groups=2), 6, 4),
}


def native_calls() -> int:
    return sum(count for route, count in kernels.routes_in_use().items() if route.startswith("native"))


def case(name: str, batch: int = 3) -> tuple[IntegerConv, Tensor, Tensor, Tensor, Tensor]:
    geometry, outputs, inputs = CASES[name]
    generator = seeded(1)
    shape = (outputs, inputs // geometry.groups, *geometry.kernel_size)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    codes[0], codes[-1] = 127, -128
    scale = torch.rand(outputs, generator=generator) + 0.1
    x = torch.randn(batch, inputs, *((19, 13) if geometry.dims == 2 else (37,)), generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return IntegerConv(codes, scale, geometry), x, bias, codes, scale


@pytest.mark.parametrize("name", CASES)
def test_equals_a_float64_convolution_of_the_rounded_samples(name: str) -> None:
    layer, x, bias, codes, scale = case(name)
    geometry = CASES[name][0]
    x = x * torch.tensor([1e-30, 1.0, 1e30]).view(-1, *(1 for _ in x.shape[1:]))
    padded = pad_input(x, geometry)
    rounded, step, offset = quantize_tokens(padded.flatten(1))
    assert offset is not None
    whole = (rounded.double() - offset.double()).view(padded.shape)
    bare = replace(geometry, padding=(0,) * geometry.dims, padding_mode="zeros")
    function = F.conv2d if geometry.dims == 2 else F.conv1d
    sums = function(whole, codes.double(), None, bare.stride, 0, bare.dilation, bare.groups)
    ones = (1,) * geometry.dims
    products = sums * scale.double().view(-1, *ones) * step.double().view(-1, 1, *ones)
    added = bias.double().view(-1, *ones)
    result = layer.product(x, bias)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    # Four roundings: the sum and the two scales of the product, and adding the bias.
    assert bool(((result.double() - products - added).abs() <= 4 * 2.0**-24 * (products.abs() + added.abs())).all())


@needs_library
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_bit_equal_to_torch(name: str, batch: int) -> None:
    layer, x, bias, _, _ = case(name, batch)
    if batch > 1:
        x[0], x[1] = 0.0, x[1].abs() * 1e37
    if batch > 2:
        x[2, 0].view(-1)[5] = math.nan
        x[3, -1].view(-1)[-1] = -math.inf
    layouts = [x, x.transpose(-1, -2).contiguous().transpose(-1, -2)] if x.ndim == 4 else [x]
    for given in layouts:
        for added in (bias, None):
            fast = layer.product(given, added)
            with kernels.torch_route():
                slow = layer.product(given, added)
            assert torch.equal(fast.nan_to_num(0.0), slow.nan_to_num(0.0))
            assert torch.equal(fast.isnan(), slow.isnan())
    if batch == 5:  # what the two samples with NaN and infinity spread to
        assert [bool(sample.isnan().all()) for sample in fast] == [False, False, True, True, False]


@needs_library
def test_the_library_is_used_where_there_is_one_group() -> None:
    kernels.reset_routes()
    for name in CASES:
        layer, x, bias, _, _ = case(name)
        before = native_calls()
        layer.product(x, bias)
        used = native_calls() - before
        assert used == (CASES[name][0].groups == 1)


@needs_library
def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        for name in ("3x3", "strided", "pointwise"):
            for batch in (1, 2, 3, 8):
                layer, x, bias, _, _ = case(name, batch)
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    results.append(layer.product(x.repeat(1, 1, 3, 3), bias))
                assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_a_convolution_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = native.NativeConv.__call__

    def wrong(self: native.NativeConv, x: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
        result = honest(self, x, bias, size)
        return result.nextafter(torch.full_like(result, math.inf)) if size[-1] > 9 else result

    monkeypatch.setattr(native.NativeConv, "__call__", wrong)
    monkeypatch.setattr(conv, "_tested", {})
    kernels.reset_routes()
    layer, x, bias, _, _ = case("3x3")
    layer.product(x, bias)
    assert native_calls() == 0


def test_large_scales_and_small_inputs() -> None:
    _, x, bias, codes, scale = case("3x3")
    large = IntegerConv(codes, scale * 2.0**100, CASES["3x3"][0])
    result = large.product(x * 1e-20, None)
    assert bool(torch.isfinite(result).all())
    plain = IntegerConv(codes, scale, CASES["3x3"][0]).product(x * 1e-20, None)
    torch.testing.assert_close(result / 2.0**100, plain, rtol=1e-6, atol=0.0)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        IntegerConv(codes, scale, ConvGeometry((3, 3))).product(x[..., :2, :2], bias)
