"""What every compressed layer says of itself, for every class: what it holds, which weight that is, and layers like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank.errors import RankError, UsageError
from lowrank.layers import LAYER_KINDS, RECURRENT, CompressedLayer, PaddedLayer, Role, declare_format
from lowrank.layers.factors import rounded_in_best_basis
from lowrank.layers.spec import LayerSpec


def _conv(dims: int, **options: object) -> nn.Module:
    kind: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d)[dims - 1]
    return kind(6, 8, 3, **options)


def _layer(name: str, module: nn.Module, **options: object) -> CompressedLayer:
    kind: type[CompressedLayer] = LAYER_KINDS[name]
    maker = {nn.Linear: "linear", nn.Embedding: "embedding", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}.get(type(module))
    made: CompressedLayer = getattr(kind, f"from_{maker or 'module'}")(module, **options)
    return made


LAYERS: dict[str, Callable[[], CompressedLayer]] = {
    "linear, factors": lambda: _layer("SVDCompressedLinear", nn.Linear(9, 7), rank=3),
    "linear, factors, half": lambda: _layer("SVDCompressedLinear", nn.Linear(9, 7, dtype=torch.bfloat16), rank=3),
    "linear, codes": lambda: _layer("QuantizedLinear", nn.Linear(9, 7), activations="float"),
    "linear, 4 bits": lambda: _layer("QuantizedLinear", nn.Linear(9, 7, bias=False), bits=4),
    "linear, packed codes": lambda: _layer("PackedLinear", nn.Linear(9, 7), bits=3, group=32, zero_point=True),
    "linear, packed codes of rows": lambda: _layer("PackedLinear", nn.Linear(9, 7), bits=5, group=None),
    "table, packed codes": lambda: _layer("PackedEmbedding", nn.Embedding(9, 40, padding_idx=2), bits=4, group=32),
    "conv1d, packed codes": lambda: _layer("PackedConv1d", _conv(1), bits=6),
    "conv2d, packed codes": lambda: _layer("PackedConv2d", _conv(2, groups=2, padding=1), bits=4, group=None),
    "linear, codes of factors": lambda: _layer("QuantizedLowRankLayer", nn.Linear(9, 7), rank=3, bits=6),
    "table, factors": lambda: _layer("LowRankEmbedding", nn.Embedding(9, 7), rank=3),
    "table, codes": lambda: _layer("QuantizedEmbedding", nn.Embedding(9, 7, padding_idx=2)),
    "table, codes of factors": lambda: _layer("QuantizedLowRankEmbedding", nn.Embedding(9, 7), rank=3),
    "conv1d, factors": lambda: _layer("SVDCompressedConv1d", _conv(1, stride=2), rank=3),
    "conv2d, factors": lambda: _layer("SVDCompressedConv2d", _conv(2), rank=3),
    "conv2d, spatial": lambda: _layer("SVDCompressedConv2d", _conv(2), rank=3, scheme="spatial"),
    "conv2d, groups": lambda: _layer("SVDCompressedConv2d", _conv(2, groups=2), rank=3),
    "conv1d, codes": lambda: _layer("QuantizedConv1d", _conv(1)),
    "conv2d, codes": lambda: _layer("QuantizedConv2d", _conv(2, groups=2, padding=1)),
    "conv1d, codes of factors": lambda: _layer("QuantizedLowRankConv1d", _conv(1), rank=3),
    "conv2d, codes of factors": lambda: _layer("QuantizedLowRankConv2d", _conv(2), rank=3),
    "conv2d, codes of factors, spatial": lambda: _layer("QuantizedLowRankConv2d", _conv(2), rank=3, scheme="spatial"),
    "conv2d, codes of factors, groups": lambda: _layer("QuantizedLowRankConv2d", _conv(2, groups=2), rank=3),
    **{
        kind.__name__: lambda kind=kind: kind.from_module(kind.dense_kind(5, 4))  # type: ignore[misc]
        for kind in RECURRENT.values()
    },
    "any module": lambda: _layer("DecodedLayer", nn.ConvTranspose1d(8, 12, 5)),
    "any module, several": lambda: _layer("DecodedLayer", nn.Bilinear(6, 40, 9)),
    "Around, codes": lambda: PaddedLayer(_layer("QuantizedLinear", nn.Linear(9, 7))),
    "attention": lambda: _layer("QuantizedMultiheadAttention", nn.MultiheadAttention(8, 2)),
    "attention, unlike sides": lambda: _layer("QuantizedMultiheadAttention", nn.MultiheadAttention(8, 2, kdim=6)),
}
# Made of modules of transformers: tests/layers and tests/compression have them.
EXPERTS = {"QuantizedExperts", "PackedExperts"}
ONE_WEIGHT = [name for name in LAYERS if name[0].islower() and not name.startswith(("attention", "any"))]
PRODUCTS = [name for name in ONE_WEIGHT if "factors" in name and "spatial" not in name and "groups" not in name]
OTHERS = [name for name in LAYERS if name not in PRODUCTS]
CODES = [name for name in LAYERS if "factors" not in name and name not in ("conv2d, spatial", "conv2d, groups")]
TRAINABLE = [name for name in ONE_WEIGHT if ("codes" in name or "bits" in name) and "table" not in name]


def build(name: str) -> CompressedLayer:
    torch.manual_seed(3)
    return LAYERS[name]()


def oriented(layer: CompressedLayer) -> Tensor:
    dense = layer.dense_weight().detach().double()
    return dense.T if layer.looks_up else dense


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def assert_same_tensors(one: CompressedLayer, other: CompressedLayer) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_every_class_is_here() -> None:
    assert {type(build(name)).__name__ for name in LAYERS} == set(LAYER_KINDS) - EXPERTS


@pytest.mark.parametrize("name", LAYERS)
def test_roles_cover_the_state_dict_and_tell_the_dtypes(name: str) -> None:
    layer = build(name)
    state, roles = layer.state_dict(), layer.roles()
    assert list(roles) == list(state)
    for key, tensor in state.items():
        expected = {torch.int8: Role("codes", layer.bits), layer.dtype: Role("float")}.get(tensor.dtype)
        # Scales are float32, as most models are: there the shape of a bias or of a factor tells them apart.
        if key.endswith("scale"):
            expected = Role("scale", signed="packed" in name)
        elif tensor.dtype == torch.uint8:
            # Several codes in a byte.
            expected = Role("zero_point" if key.endswith("zero_point") else "codes", layer.bits, packed=True)
        assert roles[key] == expected, key
    assert any(role.kind == "codes" for role in roles.values()) == (layer.bits is not None)


@pytest.mark.parametrize("name", LAYERS)
def test_a_spec_goes_through_the_configuration(name: str) -> None:
    layer = build(name)
    spec = LayerSpec.from_json(layer.config())
    assert spec.format == layer.format == layer.spec.format
    assert (spec.rank, spec.bits) == (layer.rank, layer.bits)
    assert spec == layer.spec
    again = type(layer).from_config(layer.config())
    assert again.config() == layer.config() and again.roles() == layer.roles()


@pytest.mark.parametrize("name", LAYERS)
def test_the_exact_weight_is_the_dense_one_before_its_rounding(name: str) -> None:
    layer = build(name)
    exact, dense = layer.exact_weight(), oriented(layer)
    assert exact.dtype == torch.float64 and not exact.requires_grad
    eps = torch.finfo(layer.dense_weight().dtype).eps
    torch.testing.assert_close(exact, dense, rtol=2 * eps, atol=eps * float(exact.abs().max()))


@pytest.mark.parametrize("name", PRODUCTS)
def test_factors_multiply_to_the_weight(name: str) -> None:
    layer = build(name)
    pair = layer.factors()
    assert pair is not None and pair[0].shape[1] == pair[1].shape[0] == layer.rank == 3
    dense = oriented(layer).flatten(1)
    eps = torch.finfo(layer.dense_weight().dtype).eps
    torch.testing.assert_close(pair[0] @ pair[1], dense, rtol=2 * eps, atol=eps * float(dense.abs().max()))
    single = layer.factors(torch.float32)
    assert single is not None and single[0].dtype == torch.float32


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_says_so(name: str) -> None:
    layer = build(name)
    assert layer.factors() is None
    with pytest.raises(UsageError, match="with_weight"):
        layer.with_factors(draw(7, 1), draw(1, 9))
    with pytest.raises(UsageError, match="with_weight"):
        layer.appended(draw(7, 1), draw(1, 9))


@pytest.mark.parametrize("name", CODES)
def test_codes_of_their_own_weight_are_the_same_codes(name: str) -> None:
    layer = build(name).eval()
    again = layer.with_weight(layer.exact_weight())
    assert_same_tensors(again, layer)
    assert type(again) is type(layer) and not again.training and again is not layer
    if "packed" in name:
        # Scales are float16, which three times one need not be, and ranges are chosen anew.
        lost = layer.with_weight(-3.0 * layer.exact_weight()).exact_weight() + 3.0 * layer.exact_weight()
        assert float(lost.norm()) <= 0.2 * 3.0 * float(layer.exact_weight().norm())
        return
    other = layer.with_weight(-3.0 * layer.exact_weight())
    torch.testing.assert_close(other.exact_weight(), -3.0 * layer.exact_weight(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in CODES])
def test_factors_of_their_own_weight_give_that_weight(name: str) -> None:
    layer = build(name)
    again = layer.with_weight(layer.exact_weight())
    assert again.config() == layer.config() | {
        key: None for key in ("truncation_error", "error_bound") if key in layer.config()
    }
    size = float(torch.linalg.vector_norm(layer.exact_weight()))
    lost = float(torch.linalg.vector_norm(again.exact_weight() - layer.exact_weight()))
    steps = {None: 16 * torch.finfo(layer.dtype).eps, 6: 0.1, 8: 0.03}
    assert lost <= steps[layer.bits] * size


@pytest.mark.parametrize("name", ONE_WEIGHT)
def test_a_weight_of_another_shape_is_refused(name: str) -> None:
    layer = build(name)
    with pytest.raises(RankError, match="weight: must be of shape"):
        layer.with_weight(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", PRODUCTS)
def test_appended_components_add_their_product(name: str) -> None:
    layer = build(name)
    rows, columns = layer.exact_weight().flatten(1).shape
    left, right = draw(rows, 2), draw(2, columns)
    more = layer.appended(left, right)
    assert more.rank == 5
    change = (more.exact_weight() - layer.exact_weight()).flatten(1)
    lost = float(torch.linalg.vector_norm(change - left @ right))
    if layer.bits is None:
        assert lost <= 8 * torch.finfo(layer.dtype).eps * float(torch.linalg.vector_norm(left @ right))
    else:
        sides = (right.T, left.T) if layer.looks_up else (left, right)
        # The better of two bases: no worse than its own bound.
        assert 0.0 < lost <= rounded_in_best_basis(*sides, layer.bits).bound * (1 + 1e-6)
        # What was there stays, bit for bit.
        one, other = layer.state_dict(), more.state_dict()
        assert torch.equal(other["left_codes"].flatten(1)[:, :3], one["left_codes"].flatten(1))
        assert torch.equal(other["right_codes"][:3], one["right_codes"]) and torch.equal(
            other["scale"][:3], one["scale"]
        )


@pytest.mark.parametrize("name", PRODUCTS)
def test_outputs_of_float_factors_may_be_scaled_and_codes_refuse(name: str) -> None:
    layer = build(name)
    rows, columns = layer.exact_weight().flatten(1).shape
    left, right, gains = draw(rows, 1), draw(1, columns), 1.0 + draw(rows).abs()
    if layer.bits is not None:
        with pytest.raises(UsageError, match="one scale a component"):
            layer.appended(left, right, gains)
        return
    expected = layer.exact_weight().flatten(1) * gains[:, None] + left @ right
    lost = torch.linalg.vector_norm(layer.appended(left, right, gains).exact_weight().flatten(1) - expected)
    assert float(lost) <= 8 * torch.finfo(layer.dtype).eps * float(torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("name", PRODUCTS)
def test_other_factors_may_have_another_rank(name: str) -> None:
    layer = build(name)
    rows, columns = layer.exact_weight().flatten(1).shape
    left, right = draw(rows, 4), draw(4, columns)
    other = layer.with_factors(left, right)
    assert other.rank == 4
    size = float(torch.linalg.vector_norm(left @ right))
    lost = float(torch.linalg.vector_norm(other.exact_weight().flatten(1) - left @ right))
    assert lost <= {None: 8 * torch.finfo(layer.dtype).eps, 6: 0.1, 8: 0.03}[layer.bits] * size
    with pytest.raises(RankError):
        layer.with_factors(draw(rows, 64), draw(64, columns))


WITH_BIAS = [name for name in LAYERS if any("bias" in key for key, _ in build(name).named_parameters())]


@pytest.mark.parametrize("name", WITH_BIAS)
def test_biases_are_carried_over(name: str) -> None:
    layer = build(name)
    torch.manual_seed(7)
    biases = {key: parameter for key, parameter in layer.named_parameters() if "bias" in key}
    assert biases
    with torch.no_grad():
        for parameter in biases.values():
            parameter.normal_().requires_grad_(False)
    other = dict(layer.with_weight(layer.exact_weight()).named_parameters())
    for key, parameter in biases.items():
        assert torch.equal(other[key], parameter) and not other[key].requires_grad


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_rounds_to_the_layer_itself_and_comes_back_to_it(name: str) -> None:
    layer = build(name)
    assert layer.trains_rounded
    floats = layer.trainable()
    again = layer.with_floats(floats)
    assert type(again) is type(layer) and again.spec == layer.spec
    torch.testing.assert_close(again.exact_weight(), layer.exact_weight(), rtol=1e-5, atol=1e-6)
    x = draw(2, 9).float() if name.startswith("linear") else draw(2, 6, *[8] * (len(layer.shape) - 2)).float()
    layer.activations = "float"
    expected = layer(x)
    result = layer.rounded_forward(floats, x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    result.square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.any())
        for key, parameter in floats.named_parameters()
        if key != "bias"
    )


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in TRAINABLE])
def test_what_does_not_train_rounded_says_so(name: str) -> None:
    layer = build(name)
    assert not layer.trains_rounded
    with pytest.raises(UsageError, match="trainable"):
        layer.trainable()


def test_tied_layers_hold_the_same_tensors() -> None:
    table, head = build("table, codes"), _layer("QuantizedLinear", nn.Linear(7, 9))
    head.share_tensors(table)
    assert head.codes is table.codes and head.scale is table.scale  # type: ignore[attr-defined]
    assert torch.equal(head.dense_weight(), table.dense_weight())
    for other in ("table, factors", "linear, codes"):
        with pytest.raises(UsageError, match="cannot share"):
            head.share_tensors(build(other))


def test_a_format_is_declared_and_may_depend_on_the_layer() -> None:
    class Mine(LAYER_KINDS["QuantizedLinear"]):  # type: ignore[misc, name-defined]
        pass

    assert Mine(2, 3).format == build("linear, codes").format
    declare_format(Mine, "fewer", lambda layer: (layer.bits or 8) < 8)
    assert Mine(2, 3, n_bits=4).format == "fewer" != Mine(2, 3).format

    class Bare(CompressedLayer):
        pass

    with pytest.raises(UsageError, match="none is declared for Bare"):
        Bare().format  # noqa: B018


def test_the_rank_limit_is_what_layers_themselves_allow() -> None:
    limits = {
        "conv2d, factors": 8,
        "conv2d, spatial": 18,
        "conv2d, groups": 4,
        "linear, factors": 7,
        "table, factors": 7,
    }
    for name, limit in limits.items():
        layer = build(name)
        assert layer.rank_limit(layer.shape, layer.scheme, layer.groups) == limit
        assert type(layer).from_config(layer.config() | {"rank": limit}).rank == limit
        with pytest.raises(RankError):
            type(layer).from_config(layer.config() | {"rank": limit + 1})
