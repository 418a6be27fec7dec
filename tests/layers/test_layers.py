"""One suite for every linear layer kind, against the dense float64 judge."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import assert_matches_dense, eps, matrix_with_spectrum, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import kernels
from lowrank.errors import CheckpointError, NumericsError, RankError, UsageError
from lowrank.kernels import integer
from lowrank.layers import (
    LAYER_KINDS,
    CompressedLayer,
    QuantizedLinear,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
    check_scales,
)
from lowrank.numerics.factors import factorize
from lowrank.numerics.moments import InputStatistics

SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (24, 24)}


def linear_of(shape: tuple[int, int], bias: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    outputs, inputs = shape
    sigma = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix_with_spectrum(outputs, inputs, sigma, seeded(seed)))
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(outputs, generator=seeded(seed + 1)))
    return linear


def layers_of(linear: nn.Linear, rank: int = 6) -> list[CompressedLayer]:
    return [
        SVDCompressedLinear.from_linear(linear, rank=rank),
        QuantizedLinear.from_linear(linear),
        QuantizedLinear.from_linear(linear, activations="float"),
        QuantizedLowRankLayer.from_linear(linear, rank=rank),
        QuantizedLowRankLayer.from_linear(linear, rank=rank, activations="float"),
    ]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("rank", ["one", "mid", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_kind_matches_its_dense_weight(shape: tuple[int, int], bias: bool, rank: str, dtype: torch.dtype) -> None:
    linear = linear_of(shape, bias, dtype)
    full = min(shape)
    x = torch.randn(2, 3, shape[1], generator=seeded(5)).to(dtype)
    for layer in layers_of(linear, {"one": 1, "mid": full // 2, "full": full}[rank]):
        weight = layer.dense_weight().double().detach()
        magnitude = _magnitude(layer)
        extra: Tensor | float = 0.0
        if getattr(layer, "activations", "float") == "int8":
            # Half a step of the token in every input, and of the components for the factored layer.
            steps = x.double().abs().amax(-1, keepdim=True) / 127
            extra = steps * magnitude.sum(dim=1)
            if isinstance(layer, QuantizedLowRankLayer):
                components = (x.double().abs() @ layer.right_codes.double().abs().T) * layer.scale.double()
                extra = extra + components.amax(-1, keepdim=True) / 127 * layer.left_codes.double().abs().sum(dim=1)
        elif isinstance(layer, SVDCompressedLinear):
            # Factors, and the components between them, are rounded in the layer's dtype.
            extra = 4 * eps(dtype) * x.double().abs() @ magnitude.T
        else:
            # Fixed-point digits are relative to the token's largest value, and dense_weight is itself float32.
            extra = (
                4 * max(eps(dtype), eps(torch.float32)) * x.double().abs().amax(-1, keepdim=True) * magnitude.sum(dim=1)
            )
        assert_matches_dense(layer, x, weight, linear.bias, magnitude=magnitude, extra=extra)
        assert layer(x).dtype == dtype
        assert layer.shape == shape
        assert layer.stored_bytes == sum(t.nbytes for t in layer.state_dict().values())


def _magnitude(layer: CompressedLayer) -> Tensor:
    if isinstance(layer, SVDCompressedLinear):
        return (layer.left.double().abs() @ layer.right.double().abs()).detach()
    if isinstance(layer, QuantizedLowRankLayer):
        return (layer.left_codes.double().abs() * layer.scale.double()) @ layer.right_codes.double().abs()
    return layer.dense_weight().double().abs()


@pytest.mark.parametrize("index", range(1, 5))
def test_bit_equal_to_the_integer_reference(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded(11)
    cases = 0
    for outputs, inputs, tokens in (
        (33, 70, 5000),
        (64, 16, 4000),
        (5, 9, 1000),
        (7, 2100, 40),
        (1, 1, 40),
        (12, 30, 1),
    ):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.normal_(generator=generator)
        layer = layers_of(linear, min(outputs, inputs, 4))[index]
        x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-42, 37, tokens)[:, None]
        x[0] = 3.4e38
        if tokens > 3:
            x[1], x[2] = 0.0, -1e-45
        with torch.no_grad():
            ours = layer(x)
            with monkeypatch.context() as patch, kernels.torch_route():
                patch.setitem(integer._routes, x.device, ("int64", lambda a, b: (a.long() @ b.long().T).int()))
                reference = layer(x)
        assert torch.equal(ours.nan_to_num(), reference.nan_to_num())
        assert torch.equal(ours.isnan(), reference.isnan())
        cases += tokens
    assert cases >= 10_000


class _NoFloatWeight(TorchDispatchMode):
    """Fails where an operation makes a float tensor with as many numbers as the weight."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                assert tensor.numel() < self.limit, f"{func} made a float tensor of {tuple(tensor.shape)}"
        return result


@pytest.mark.parametrize("index", range(1, 5))
def test_forward_holds_no_float_weight(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The float route converts so many rows at a time, which would be all of this small layer.
    monkeypatch.setattr(integer, "_FLOAT_ROWS", 8)
    layer = layers_of(nn.Linear(96, 80), 40)[index]
    x = torch.randn(3, 96, generator=seeded(1))
    layer(x)
    smallest = min(t.numel() for name, t in layer.state_dict().items() if name.endswith("codes"))
    with torch.no_grad(), _NoFloatWeight(smallest):
        layer(x)


@pytest.mark.parametrize("index", range(5))
def test_copies_and_state_are_exact(index: int) -> None:
    linear = linear_of((20, 16), True).eval()
    linear.weight.requires_grad_(False)
    layer = layers_of(linear)[index]
    x = torch.randn(4, 16, generator=seeded(2))
    expected = layer(x)
    assert not layer.training
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    rebuilt = LAYER_KINDS[layer.kind].from_config(layer.config())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    rebuilt(x)  # a cache of the values before loading must not survive it
    rebuilt.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(rebuilt(x), expected)
    assert rebuilt.config() == layer.config()
    assert repr(rebuilt) == repr(layer)
    if layer.bits is not None:
        bound = layer.error_bound()  # type: ignore[operator]
        assert rebuilt.error_bound() == copy.deepcopy(layer).error_bound() == bound  # type: ignore[operator]


@pytest.mark.parametrize("index", range(5))
def test_any_leading_shape_and_layout(index: int) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    x = torch.randn(16, 6, generator=seeded(3)).T
    flat = layer(x.contiguous())
    # A float product may sum in another order where the layout differs.
    torch.testing.assert_close(layer(x), flat, rtol=0 if index else 1e-5, atol=0 if index else 1e-5)
    for shape in ((16,), (0, 16), (2, 0, 16), (1, 2, 3, 16)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 20)
    torch.testing.assert_close(layer(x.reshape(2, 3, 16)).reshape(6, 20), flat, rtol=1e-5, atol=1e-5)
    with pytest.raises((UsageError, RuntimeError)):
        layer(torch.zeros(4, 8))


@pytest.mark.parametrize("index", range(1, 5))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_reach_their_own_token_only(index: int, value: float) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    x = torch.randn(5, 16, generator=seeded(4))
    with torch.no_grad():
        clean = layer(x)
        x[3, 7] = value
        result = layer(x)
    assert not bool(torch.isfinite(result[3]).any())
    keep = [0, 1, 2, 4]
    assert torch.equal(result[keep], clean[keep])


@pytest.mark.parametrize("index", range(1, 5))
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-30, 1e30, 1e37])
def test_extreme_and_constant_tokens(index: int, size: float) -> None:
    layer = layers_of(linear_of((20, 16), False), 16)[index]
    x = torch.full((3, 16), size)
    x[1] *= torch.linspace(-1, 1, 16)
    with torch.no_grad():
        result = layer(x)
    assert bool(torch.isfinite(result).all())
    expected = x.double() @ layer.dense_weight().double().T
    step = 2.0**-126 if size < 1e-30 else 0.0
    allowed = 0.06 * expected.norm(dim=1) + 0.03 * x.double().norm(dim=1) + step * 127
    assert bool(((result.double() - expected).norm(dim=1) <= allowed).all())


@pytest.mark.parametrize("index", range(5))
def test_gradients_reach_input_and_bias(index: int) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    x = torch.randn(2, 3, 16, generator=seeded(6), requires_grad=True)
    gradient = torch.randn(2, 3, 20, generator=seeded(7))
    layer(x).backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ layer.dense_weight().detach(), rtol=1e-4, atol=1e-5)
    assert isinstance(layer.bias, nn.Parameter)
    torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(5))
def test_compiles(index: int) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    x = torch.randn(4, 16, generator=seeded(8))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("index", range(1, 5))
def test_low_precision_leaves_scales_alone(index: int) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    scale = layer.scale.clone()
    for changed in (
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).double(),
    ):
        assert torch.equal(changed.scale, scale)
        assert isinstance(changed.bias, nn.Parameter)
        assert changed.bias.dtype == changed.dtype != torch.float32
        assert changed(torch.zeros(1, 16, dtype=changed.dtype)).dtype == changed.dtype


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_bound_holds_and_is_tight(shape: tuple[int, int], bits: int) -> None:
    linear = linear_of(shape, False)
    layers = [QuantizedLinear.from_linear(linear, bits=bits)]
    bounded: list[QuantizedLinear | QuantizedLowRankLayer] = [*layers]
    bounded += [QuantizedLowRankLayer.from_linear(linear, rank=r, bits=bits) for r in (1, min(shape) // 2, min(shape))]
    for layer in bounded:
        measured = float(torch.linalg.vector_norm(layer.dense_weight().double() - linear.weight.detach().double()))
        assert measured <= layer.error_bound() <= 4 * measured


def test_full_rank_reproduces_and_converts_back() -> None:
    linear = linear_of((12, 20), True)
    layer = SVDCompressedLinear.from_linear(linear, rank=12)
    assert layer.reconstruction_error(linear.weight) < 4 * eps(torch.float32)
    back = layer.to_linear()
    torch.testing.assert_close(back.weight, linear.weight, rtol=0, atol=4e-7)
    assert torch.equal(back.bias, linear.bias)
    quantized = QuantizedLowRankLayer.from_linear(linear, rank=5)
    torch.testing.assert_close(quantized.dequantize().dense_weight(), quantized.dense_weight(), rtol=1e-5, atol=1e-6)
    assert torch.equal(
        QuantizedLinear.from_linear(linear).dequantize().weight, QuantizedLinear.from_linear(linear).dense_weight()
    )


@pytest.mark.parametrize("with_statistics", [False, True])
def test_max_error_gives_the_smallest_rank(with_statistics: bool) -> None:
    linear = linear_of((24, 24), True)
    statistics = InputStatistics.from_samples(torch.randn(200, 24, generator=seeded(9))) if with_statistics else None
    curve = factorize(linear.weight, statistics)
    layer = SVDCompressedLinear.from_linear(linear, max_error=0.1, statistics=statistics)
    assert curve.errors[layer.rank] <= 0.1 < curve.errors[layer.rank - 1]
    rounded = QuantizedLowRankLayer.from_linear(linear, max_error=0.1, statistics=statistics)
    assert rounded.rank >= layer.rank
    if statistics is None:
        for rank, fits in ((rounded.rank, True), (rounded.rank - 1, False)):
            weight = QuantizedLowRankLayer.from_linear(linear, rank=rank).dense_weight().detach()
            assert (float((weight - linear.weight.detach()).norm() / linear.weight.detach().norm()) <= 0.1) == fits
    with pytest.raises(RankError, match=r"full rank 24, 0\.\d+"):
        QuantizedLowRankLayer.from_linear(linear, max_error=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 13, 10**12, 8.0, "8", True, None])
def test_ranks_out_of_range_are_refused(rank: object) -> None:
    linear = nn.Linear(20, 12)
    for kind in (SVDCompressedLinear, QuantizedLowRankLayer):
        with pytest.raises(RankError):
            kind.from_linear(linear, rank=rank)  # type: ignore[arg-type]
        with pytest.raises(RankError, match="12"):
            kind(20, 12, rank)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    linear = nn.Linear(6, 4)
    for bits in (1, 9, 8.0, "8", True):
        with pytest.raises(RankError, match="2 to 8"):
            QuantizedLinear.from_linear(linear, bits=bits)  # type: ignore[arg-type]
        with pytest.raises(RankError, match="2 to 8"):
            QuantizedLowRankLayer(6, 4, 2, n_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="activations"):
        QuantizedLinear.from_linear(linear, activations="int4")
    layer = QuantizedLinear.from_linear(linear)
    with pytest.raises(UsageError, match="activations"):
        layer.activations = "fp8"
    with pytest.raises(UsageError, match=r"nn\.Linear"):
        QuantizedLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(RankError, match="exactly one"):
        SVDCompressedLinear.from_linear(linear, rank=2, max_error=0.1)
    with torch.no_grad():
        linear.weight[1, 2] = math.nan
    for make in (QuantizedLinear.from_linear, lambda m: SVDCompressedLinear.from_linear(m, rank=2)):
        with pytest.raises(NumericsError, match=r"\[1, 2\]"):
            make(linear)


def test_zero_matrix_and_zero_rows() -> None:
    linear = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    for layer in layers_of(linear, 1):
        assert torch.equal(layer(torch.randn(3, 5, generator=seeded(1))), torch.zeros(3, 4))
        check_scales(layer, "zero")


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_thin_shapes(shape: tuple[int, int]) -> None:
    linear = linear_of(shape, True)
    for layer in layers_of(linear, 1):
        x = torch.randn(3, shape[1], generator=seeded(2))
        torch.testing.assert_close(layer(x), linear(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("change", ["missing", "negative", "zero", "nan", "inf", "shape", "dtype"])
@pytest.mark.parametrize("index", [1, 3])
def test_damaged_scales_are_refused(change: str, index: int) -> None:
    layer = layers_of(linear_of((20, 16), True))[index]
    check_scales(layer, "block.0")
    if change == "missing":
        del layer.scale
    elif change == "shape":
        layer.scale = torch.ones(3)
    elif change == "dtype":
        layer.scale = layer.scale.double()
    else:
        layer.scale[2] = {"negative": -1.0, "zero": 0.0, "nan": math.nan, "inf": math.inf}[change]
    with pytest.raises(CheckpointError, match=r"block\.0"):
        check_scales(layer, "block.0")


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 3e37])
@torch.no_grad()
def test_extreme_weights_stay_finite(size: float) -> None:
    linear = linear_of((12, 10), False)
    with torch.no_grad():
        linear.weight.div_(linear.weight.abs().max()).mul_(size)
    x = torch.randn(4, 10, generator=seeded(3)) * 0.1
    for layer in layers_of(linear, 10):
        result = layer(x)
        assert bool(torch.isfinite(result).all())
        if size > 1e-38:
            expected = linear(x)
            largest = expected.abs().max()
            assert float(((result - expected) / largest).double().norm() / (expected / largest).double().norm()) < 0.05


def test_tensors_may_be_shared_and_replaced() -> None:
    layer = QuantizedLinear.from_linear(linear_of((20, 16), True))
    other = QuantizedLinear.from_linear(linear_of((20, 16), True, seed=7))
    x = torch.randn(4, 16, generator=seeded(2))
    layer(x)
    layer.codes, layer.scale = other.codes, other.scale
    with torch.no_grad():
        assert layer.bias is not None
        assert other.bias is not None
        layer.bias.copy_(other.bias)
    assert layer.codes is other.codes
    assert torch.equal(layer(x), other(x))
    shared = QuantizedLinear.from_tensors(other.codes, other.scale)
    assert shared.codes.data_ptr() == other.codes.data_ptr()


def test_conv1d_is_a_transposed_linear() -> None:
    linear = linear_of((20, 16), True)

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 20
            self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
            self.bias = nn.Parameter(linear.bias.detach().clone())

    x = torch.randn(3, 16, generator=seeded(2))
    for ours, theirs in zip(layers_of(linear, 16), layers_of(Conv1D(), 16), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(theirs(x), ours(x), rtol=0.02, atol=0.02)
