"""Attention with int8 projections against torch's own module, and the encoders around it."""

from __future__ import annotations

import contextlib
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

from lowrank.errors import NumericsError, RankError, UsageError
from lowrank.layers import (
    LAYER_KINDS,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    call_every_layer,
    check_scales,
)

TARGET, SOURCE, BATCH, EMBED, HEADS = 5, 7, 3, 24, 4


def attention_of(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(EMBED, HEADS, **options)
    generator = seeded(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def inputs_of(first: bool, kdim: int = EMBED, vdim: int = EMBED, *, batched: bool = True) -> tuple[Tensor, ...]:
    generator = seeded(1)
    found = []
    for steps, size in ((TARGET, EMBED), (SOURCE, kdim), (SOURCE, vdim)):
        x = torch.randn(BATCH, steps, size, generator=generator)
        found.append(x[0] if not batched else x if first else x.transpose(0, 1))
    return tuple(found)


def masks_of(shape: str, padding: str, *, batched: bool = True) -> dict[str, Tensor]:
    """Masks that leave every query at least one key."""
    generator = seeded(2)
    found = {}
    if shape:
        size = {"2d": (TARGET, SOURCE), "3d": ((BATCH if batched else 1) * HEADS, TARGET, SOURCE)}[shape[:2]]
        blocked = torch.rand(size, generator=generator) < 0.4
        blocked[..., 0] = False
        found["attn_mask"] = blocked if shape.endswith("bool") else torch.randn(size, generator=generator)
    if padding:
        blocked = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2, 4])[:, None]
        mask = blocked if padding == "bool" else torch.zeros(BATCH, SOURCE).masked_fill(blocked, -math.inf)
        found["key_padding_mask"] = mask if batched else mask[1]
    return found


def assert_same(layer: QuantizedMultiheadAttention, inputs: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Weight-only: the dense module of the rounded weights, in float64, up to eps."""
    exact = layer.dequantize().double()
    in_double = {key: value.double() if torch.is_floating_point(value) else value for key, value in _tensors(kwargs)}
    with torch.no_grad():
        output, weights = layer(*inputs, **kwargs)
        expected, expected_weights = exact(*(x.double() for x in inputs), **{**kwargs, **in_double})
    allowed = 64 * eps(torch.float32) * EMBED**0.5
    assert output.shape == expected.shape
    assert bool(((output - expected).abs() <= allowed * expected.abs().max()).all())
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert weights.shape == expected_weights.shape
        assert bool(((weights - expected_weights).abs() <= allowed).all())


def _tensors(kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in kwargs.items() if isinstance(value, Tensor)]


MASKS = [("", ""), ("2d bool", ""), ("2d float", ""), ("3d bool", ""), ("3d float", "float"), ("", "bool")]
MASKS += [("2d bool", "bool"), ("3d bool", "bool"), ("2d float", "float")]


@pytest.mark.parametrize(("shape", "padding"), MASKS)
@pytest.mark.parametrize(("first", "bias", "batched"), list(itertools.product([True, False], repeat=3)))
def test_weight_only_is_the_dense_module_of_the_rounded_weights(
    shape: str, padding: str, first: bool, bias: bool, batched: bool
) -> None:
    module = attention_of(bias=bias, batch_first=first)
    layer = QuantizedMultiheadAttention.from_module(module, activations="float")
    masks = masks_of(shape, padding, batched=batched)
    query, key, _ = inputs_of(first, batched=batched)
    for need, average in ((True, True), (True, False), (False, True)):
        assert_same(layer, (query, key, key), need_weights=need, average_attn_weights=average, **masks)


@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (10, None), (None, 9), (10, 9)])
@pytest.mark.parametrize("first", [True, False])
def test_separate_projections(kdim: int | None, vdim: int | None, first: bool) -> None:
    module = attention_of(kdim=kdim, vdim=vdim, batch_first=first)
    layer = QuantizedMultiheadAttention.from_module(module, activations="float")
    assert_same(layer, inputs_of(first, kdim or EMBED, vdim or EMBED))
    assert layer.dense_weights().keys() == {name for name, p in module.named_parameters() if p.ndim == 2}
    for name, weight in layer.dense_weights().items():
        original = module.get_parameter(name).detach()
        assert bool(((weight - original).abs() <= original.abs().amax(dim=1, keepdim=True) / 254 * 1.001).all())


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("padding", ["", "bool"])
def test_causal_attention(need: bool, padding: str) -> None:
    layer = QuantizedMultiheadAttention.from_module(attention_of(), activations="float")
    x = torch.randn(SOURCE, BATCH, EMBED, generator=seeded(3))
    mask = nn.Transformer.generate_square_subsequent_mask(SOURCE)
    padded = {"key_padding_mask": masks_of("", "float")["key_padding_mask"]} if padding else {}
    assert_same(layer, (x, x, x), attn_mask=mask, is_causal=True, need_weights=need, **padded)
    with pytest.raises(UsageError, match="attn_mask"):
        layer(x, x, x, is_causal=True)


def test_integer_products_are_those_of_the_projections() -> None:
    """The projections' own outputs, put through attention written out in float64."""
    layer = QuantizedMultiheadAttention.from_module(attention_of(batch_first=True))
    assert layer.activations == "int8"
    x = torch.randn(BATCH, SOURCE, EMBED, generator=seeded(3))
    with torch.no_grad():
        output, weights = layer(x, x, x, average_attn_weights=False)
        fused, none = layer(x, x, x, need_weights=False)
        q, k, v = (
            projection(x).double().unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        expected = torch.softmax(q @ k.transpose(-2, -1) / (EMBED / HEADS) ** 0.5, dim=-1)
        mixed = (expected @ v).transpose(1, 2).flatten(-2).float()
        through = layer.out_proj(mixed)
    assert none is None
    assert weights is not None
    assert bool(((weights - expected).abs() <= 64 * eps(torch.float32)).all())
    # Where eps moves a token across half a step, each of its products moves by a step.
    steps = mixed.abs().amax(-1, keepdim=True) / 127 * layer.out_proj.dense_weight().abs().amax(dim=1)
    for found in (output, fused):
        assert bool(((found - through).abs() <= 4 * steps).all())
    layer.activations = "float"
    assert layer.v_proj.activations == layer.activations == "float"
    reference = layer.dequantize()(x, x, x)[0].detach()
    assert 0 < float((output - reference).norm() / reference.norm()) < 0.03


def test_every_projection_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedMultiheadAttention.from_module(attention_of(batch_first=True))
    called = count_calls(monkeypatch, QuantizedLinear)
    x = torch.randn(BATCH, SOURCE, EMBED, generator=seeded(3))
    layer(x, x, x)
    assert called == {id(child): 1 for child in layer.children()}
    assert len(called) == 4


def count_calls(monkeypatch: pytest.MonkeyPatch, *kinds: type[nn.Module]) -> dict[int, int]:
    """Calls by identity of the layer. Hooks would not do: they make torch's fast path stand aside."""
    called: dict[int, int] = {}
    for kind in kinds:

        def counted(self: nn.Module, *args: Any, _forward: Any = kind.forward, **kwargs: Any) -> Any:
            called[id(self)] = called.get(id(self), 0) + 1
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return called


def test_dropout_in_training_only() -> None:
    layer = QuantizedMultiheadAttention.from_module(attention_of(dropout=0.5).train(), activations="float")
    x = torch.randn(SOURCE, BATCH, EMBED, generator=seeded(3))
    for need in (True, False):
        layer.train()
        first, second = layer(x, x, x, need_weights=need)[0], layer(x, x, x, need_weights=need)[0]
        assert not torch.equal(first, second)
        layer.eval()
        assert_same(layer, (x, x, x), need_weights=need)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_gradients_are_those_of_the_dense_module(activations: str) -> None:
    layer = QuantizedMultiheadAttention.from_module(attention_of(), activations=activations)
    dense = layer.dequantize()
    gradients = []
    for module in (layer, dense):
        x = torch.randn(SOURCE, BATCH, EMBED, generator=seeded(3), requires_grad=True)
        module(x, x, x)[0].square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    close = 1e-4 if activations == "float" else 0.05
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < close
    for child in layer.children():
        assert child.bias is not None  # type: ignore[union-attr]
        assert child.bias.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_scales(dtype: torch.dtype) -> None:
    made = QuantizedMultiheadAttention.from_module(attention_of().to(dtype))
    moved = QuantizedMultiheadAttention.from_module(attention_of()).to(dtype)
    for layer in (made, moved):
        assert layer.dtype == layer.q_proj.dtype == dtype
        assert layer.q_proj.scale.dtype == torch.float32
        x = torch.randn(SOURCE, BATCH, EMBED, generator=seeded(3)).to(dtype)
        output, weights = layer(x, x, x)
        assert output.dtype == weights.dtype == dtype


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 9, "batch_first": True}])
def test_copies_and_state_are_exact(options: dict[str, Any]) -> None:
    module = attention_of(**options).requires_grad_(False)
    layer = QuantizedMultiheadAttention.from_module(module)
    inputs = inputs_of(layer.batch_first, layer.kdim, layer.vdim)
    expected = layer(*inputs)[0]
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    rebuilt = LAYER_KINDS[layer.kind].from_config(layer.config())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    rebuilt.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), rebuilt):
        assert torch.equal(twin(*inputs)[0], expected)
        assert twin.config() == layer.config()
        assert twin.error_bound() == layer.error_bound()
        assert repr(twin) == repr(layer)
    matrices = [p for p in module.parameters() if p.ndim == 2]
    biases = [p for p in module.parameters() if p.ndim == 1]
    assert layer.stored_bytes == sum(p.numel() + 4 * len(p) for p in matrices) + sum(p.nbytes for p in biases)
    original = torch.cat([p.flatten() for p in matrices])[None]
    measured = float((layer.dense_weight() - original).norm())
    assert measured <= layer.error_bound() <= 4 * measured
    check_scales(layer, "attention")
    for name, bias in layer.dequantize().named_parameters():
        if bias.ndim == 1:
            assert torch.equal(bias, module.get_parameter(name))


def test_wrong_arguments_are_named() -> None:
    layer = QuantizedMultiheadAttention.from_module(attention_of(batch_first=True))
    query, key, value = inputs_of(True)
    for inputs in ((query[0], key, value), (query[None], key[None], value[None])):
        with pytest.raises(UsageError, match="3-d"):
            layer(*inputs)
    with pytest.raises(UsageError, match="as long as key"):
        layer(query, key, value[:, 1:])
    with pytest.raises(UsageError, match="attn_mask: must be"):
        layer(query, key, value, attn_mask=torch.zeros(SOURCE, TARGET))
    with pytest.raises(UsageError, match="attn_mask: must be bool"):
        layer(query, key, value, attn_mask=torch.zeros(TARGET, SOURCE, dtype=torch.int64))
    with pytest.raises(UsageError, match="key_padding_mask"):
        layer(query, key, value, key_padding_mask=torch.zeros(SOURCE, BATCH, dtype=torch.bool))
    with pytest.raises(UsageError, match="add_bias_kv"):
        QuantizedMultiheadAttention.from_module(attention_of(add_bias_kv=True))
    with pytest.raises(UsageError, match="add_zero_attn"):
        QuantizedMultiheadAttention.from_module(attention_of(add_zero_attn=True))
    with pytest.raises(UsageError, match=r"nn\.MultiheadAttention"):
        QuantizedMultiheadAttention.from_module(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="num_heads=5"):
        QuantizedMultiheadAttention(24, 5)
    with pytest.raises(UsageError, match="dropout"):
        QuantizedMultiheadAttention(24, 4, dropout=1.5)
    with pytest.raises(RankError, match="2 to 8"):
        QuantizedMultiheadAttention.from_module(attention_of(), bits=1)
    bad = attention_of()
    bad.in_proj_weight.data[2 * EMBED + 1, 3] = math.nan
    with pytest.raises(NumericsError, match=r"\[1, 3\]"):
        QuantizedMultiheadAttention.from_module(bad)


def encoder_of(layers: int = 2, *, norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, **{"batch_first": True, **options})
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(EMBED) if norm else None)
    generator = seeded(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return encoder.eval()


def replaced(encoder: nn.TransformerEncoder, which: str, activations: str = "float") -> nn.TransformerEncoder:
    """A copy with the attention, the linear layers or both replaced."""
    copied = copy.deepcopy(encoder)
    for layer in copied.layers:
        if which in ("attention", "both"):
            layer.self_attn = QuantizedMultiheadAttention.from_module(layer.self_attn, activations=activations)
        if which in ("linear", "both"):
            layer.linear1 = QuantizedLinear.from_linear(layer.linear1, activations=activations)
            layer.linear2 = QuantizedLinear.from_linear(layer.linear2, activations=activations)
    call_every_layer(copied)
    call_every_layer(copied)
    return copied


def rounded(encoder: nn.TransformerEncoder, which: str) -> nn.TransformerEncoder:
    """The same weights as :func:`replaced` gives, in torch's own modules."""
    copied = copy.deepcopy(encoder)
    for layer in copied.layers:
        if which in ("attention", "both"):
            layer.self_attn = QuantizedMultiheadAttention.from_module(layer.self_attn).dequantize()
        if which in ("linear", "both"):
            layer.linear1 = QuantizedLinear.from_linear(layer.linear1).dequantize()
            layer.linear2 = QuantizedLinear.from_linear(layer.linear2).dequantize()
    return copied


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("which", ["attention", "linear", "both"])
@pytest.mark.parametrize("padded", ["none", "left", "scattered", "float"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_encoders_call_every_layer_and_keep_their_outputs(
    which: str, padded: str, norm: bool, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(norm=norm)
    ours, theirs = replaced(encoder, which), rounded(encoder, which)
    x = torch.randn(BATCH, SOURCE, EMBED, generator=seeded(4))
    mask: Tensor | None = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2, 4])[:, None]
    if padded == "none":
        mask = None
    elif padded == "scattered":
        mask[0, 2] = True  # type: ignore[index]
    elif padded == "float":
        mask = torch.zeros(BATCH, SOURCE).masked_fill(mask, -math.inf)  # type: ignore[arg-type]
    called = count_calls(monkeypatch, QuantizedLinear, QuantizedMultiheadAttention)
    with torch.set_grad_enabled(gradients):
        found = ours(x, src_key_padding_mask=mask)
        expected = theirs(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    layers = [m for m in ours.modules() if isinstance(m, (QuantizedLinear, QuantizedMultiheadAttention))]
    assert called == {id(layer): 1 for layer in layers}
    assert len(layers) == 2 * {"attention": 5, "linear": 2, "both": 7}[which]
    if mask is not None and padded != "scattered" and not norm:
        # What torch's fast path leaves at padded positions, it leaves without gradients only.
        assert bool((found[1, 2:] == 0).all()) == (not gradients)


@pytest.mark.parametrize("options", [{"norm_first": True}, {"batch_first": False}, {"activation": "gelu"}])
def test_encoder_options(options: dict[str, Any]) -> None:
    warning = pytest.warns(UserWarning, match="enable_nested_tensor is True")
    with contextlib.nullcontext() if "activation" in options else warning:
        encoder = encoder_of(**options)
    ours, theirs = replaced(encoder, "both"), rounded(encoder, "both")
    x = torch.randn(SOURCE, SOURCE, EMBED, generator=seeded(4))
    causal = nn.Transformer.generate_square_subsequent_mask(SOURCE)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            ours(x, mask=causal, is_causal=True), theirs(x, mask=causal, is_causal=True), rtol=2e-5, atol=2e-5
        )
        ours.train()
        assert bool(torch.isfinite(ours(x)).all())


def test_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 32, batch_first=True)
    theirs = nn.TransformerDecoder(layer, 2).eval()
    ours = copy.deepcopy(theirs)
    for before, after in zip(theirs.layers, ours.layers, strict=True):
        for name in ("self_attn", "multihead_attn"):
            made = QuantizedMultiheadAttention.from_module(getattr(before, name), activations="float")
            setattr(after, name, made)
            setattr(before, name, made.dequantize())
    called = count_calls(monkeypatch, QuantizedLinear)
    x, memory = torch.randn(BATCH, TARGET, EMBED, generator=seeded(1)), torch.randn(BATCH, SOURCE, EMBED)
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(TARGET), "tgt_is_causal": True}
    padding = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2, 4])[:, None]
    with torch.no_grad():
        found = ours(x, memory, memory_key_padding_mask=padding, **masks)
        expected = theirs(x, memory, memory_key_padding_mask=padding, **masks)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert sorted(called.values()) == [1] * 16


def test_encoders_without_compressed_layers_keep_their_fast_path() -> None:
    encoder = encoder_of()
    call_every_layer(encoder)
    assert encoder.use_nested_tensor
    assert not encoder._forward_hooks
    assert [layer.activation_relu_or_gelu for layer in encoder.layers] == [1, 1]
