"""Compressed models in graphs: torch.compile without breaks, torch.export, both with eager's outputs and gradients."""

from __future__ import annotations

import copy
import gc
import io
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_models import TOKENS, compressed
from helpers import seeded
from torch import Tensor, nn

from lowrank.layers import (
    LAYER_KINDS,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
    operators,
)

LINEAR_KINDS = ["QuantizedLinear", "QuantizedLinear float", "QuantizedLowRankLayer", "QuantizedLowRankLayer float"]


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's own tracing warns of its own deprecated calls.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def linear_layer(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    name, _, mode = kind.partition(" ")
    torch.manual_seed(3)
    dense = nn.Linear(24, 16, bias=bias, dtype=dtype)
    activations = mode or "int8"
    if name == "QuantizedLinear":
        return QuantizedLinear.from_linear(dense, activations=activations)
    if name == "QuantizedLowRankLayer":
        return QuantizedLowRankLayer.from_linear(dense, rank=5, activations=activations)
    return SVDCompressedLinear.from_linear(dense, rank=5)


def embedding_layer(kind: str) -> nn.Module:
    torch.manual_seed(4)
    table = nn.Embedding(20, 12)
    if kind == "QuantizedEmbedding":
        return QuantizedEmbedding.from_embedding(table)
    if kind == "LowRankEmbedding":
        return LowRankEmbedding.from_embedding(table, rank=4)
    return QuantizedLowRankEmbedding.from_embedding(table, rank=4)


def graph_of(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize(
    "kind", [*LINEAR_KINDS, "QuantizedConv2d", "QuantizedLowRankConv2d", "QuantizedLowRankEmbedding"]
)
def test_a_jit_trace_computes_what_eager_does(kind: str) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 24), torch.randn(5, 24)
    if kind.endswith("Conv2d"):
        conv, options = nn.Conv2d(4, 6, (2, 3), padding="same"), {"rank": 3} if "LowRank" in kind else {}
        layer: nn.Module = LAYER_KINDS[kind].from_conv2d(conv, **options)  # type: ignore[attr-defined]
        first, second = torch.randn(2, 4, 7, 9), torch.randn(3, 4, 7, 9)
    elif kind.endswith("Embedding"):
        layer, first, second = embedding_layer(kind), torch.tensor([[1, 2]]), torch.tensor([[3, 4, 19]])
    else:
        layer = linear_layer(kind)
    with torch.no_grad():
        traced = torch.jit.trace(layer, first)
        assert torch.equal(traced(second), layer(second))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [*LINEAR_KINDS, "SVDCompressedLinear"])
def test_linear_layers_compile_to_the_bits_of_eager(kind: str, dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(linear_layer(kind, bias=bias, dtype=dtype), nn.ReLU())
    x = torch.randn(2, 3, 24, generator=seeded(5)).to(dtype)
    with torch.no_grad():
        expected = model(x)
        actual = graph_of(model)(x)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["QuantizedEmbedding", "LowRankEmbedding", "QuantizedLowRankEmbedding"])
def test_embeddings_compile_to_the_bits_of_eager(kind: str) -> None:
    model = nn.Sequential(embedding_layer(kind))
    ids = torch.tensor([[0, 3, 19], [7, 7, 1]])
    with torch.no_grad():
        assert torch.equal(graph_of(model)(ids), model(ids))


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_gradients_in_a_graph_are_those_of_eager(kind: str) -> None:
    layer = linear_layer(kind)
    model = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(5, 24, generator=seeded(6)).requires_grad_()
    model(x).square().sum().backward()
    wanted = x.grad, layer.bias.grad  # type: ignore[union-attr]
    x.grad = layer.bias.grad = None  # type: ignore[union-attr]
    graph_of(model)(x).square().sum().backward()
    assert wanted[0] is not None and bool(wanted[0].abs().max() > 0.0)
    assert torch.equal(x.grad, wanted[0])  # type: ignore[arg-type]
    assert torch.equal(layer.bias.grad, wanted[1])  # type: ignore[union-attr, arg-type]


CONVOLUTIONS = {
    "strided": nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "same, uneven": nn.Conv2d(4, 6, (2, 3), padding="same"),
    "reflected, groups": nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
    "1d, dilated": nn.Conv1d(4, 6, 4, dilation=2, padding="same"),
}


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("kind", ["QuantizedConv", "QuantizedLowRankConv", "SVDCompressedConv"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_compile_to_the_bits_of_eager(name: str, kind: str, activations: str) -> None:
    torch.manual_seed(5)
    conv = copy.deepcopy(CONVOLUTIONS[name])
    conv.reset_parameters()
    dims = len(conv.kernel_size)
    options: dict[str, Any] = {} if kind == "QuantizedConv" else {"rank": 2}
    if kind != "SVDCompressedConv":
        options["activations"] = activations
    made = getattr(LAYER_KINDS[f"{kind}{dims}d"], f"from_conv{dims}d")(conv, **options)
    model = nn.Sequential(made, nn.ReLU())
    x = torch.randn(3, 4, *(12, 10)[:dims], generator=seeded(6)).requires_grad_()
    graph = graph_of(model)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
    model(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    graph(x).square().sum().backward()
    assert wanted is not None and x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_exported_convolutions_take_any_batch() -> None:
    torch.manual_seed(6)
    layers = [LAYER_KINDS["QuantizedConv2d"].from_conv2d(CONVOLUTIONS["strided"])]
    layers.append(LAYER_KINDS["QuantizedLowRankConv2d"].from_conv2d(nn.Conv2d(6, 4, 3), rank=3))
    model = nn.Sequential(*layers).eval()
    x = torch.randn(7, 4, 16, 15, generator=seeded(8))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for rows in (x, x[:3]):
        with torch.no_grad():
            assert torch.equal(program.module()(rows), model(rows))


@pytest.mark.parametrize("kind", ["QuantizedLSTM", "QuantizedGRU", "QuantizedRNN"])
def test_recurrent_layers_export(kind: str) -> None:
    torch.manual_seed(7)
    dense = getattr(nn, kind.removeprefix("Quantized"))(5, 6, num_layers=2, batch_first=True)
    layer = LAYER_KINDS[kind].from_module(dense).eval()  # type: ignore[attr-defined]
    x = torch.randn(3, 4, 5, generator=seeded(9))
    program = torch.export.export(layer, (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["QuantizedLSTMCell", "QuantizedGRUCell", "QuantizedRNNCell"])
def test_recurrent_cells_compile_to_the_bits_of_the_dense_cell(kind: str) -> None:
    torch.manual_seed(7)
    dense = getattr(nn, kind.removeprefix("Quantized"))(5, 6)
    layer = LAYER_KINDS[kind].from_module(dense)  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, weight in layer.dense_weights().items():
            dense.get_parameter(name).copy_(weight)
    x = torch.randn(3, 5, generator=seeded(9))
    with torch.no_grad():
        actual = graph_of(layer)(x)
        # Torch takes a cell apart when it compiles, and the last bit of its gates then depends on the width of the registers
        # (seen with AVX2): so to the bit it is the dense cell, compiled too, that counts.
        for other, limit in ((graph_of(dense)(x), 0.0), (layer(x), 4 * torch.finfo(torch.float32).eps)):
            pairs = zip(other, actual, strict=True) if isinstance(other, tuple) else [(other, actual)]
            assert all(float((one - two).abs().max()) <= limit for one, two in pairs)


def test_attention_compiles_to_the_bits_of_eager() -> None:
    torch.manual_seed(8)
    layer = (
        LAYER_KINDS["QuantizedMultiheadAttention"]
        .from_module(  # type: ignore[attr-defined]
            nn.MultiheadAttention(8, 2, batch_first=True)
        )
        .eval()
    )
    x = torch.randn(3, 5, 8, generator=seeded(10))
    graph = graph_of(layer)
    with torch.no_grad():
        for weights in (True, False):
            expected, actual = layer(x, x, x, need_weights=weights), graph(x, x, x, need_weights=weights)
            assert torch.equal(actual[0], expected[0])
            assert actual[1] is expected[1] is None or torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("name", ["int8_linear", "lowrank_int8_linear", "lowrank_int8_embedding", "int8_conv"])
def test_operators_pass_torchs_own_checks(name: str) -> None:
    layer = linear_layer("QuantizedLinear" if name == "int8_linear" else "QuantizedLowRankLayer")
    args: tuple[Any, ...]
    if name == "lowrank_int8_embedding":
        table = embedding_layer("QuantizedLowRankEmbedding")
        args = torch.tensor([[1, 2]]), table.left_codes, table.right_codes, table.scale, torch.float32
    elif name == "int8_conv":
        conv = LAYER_KINDS["QuantizedConv2d"].from_conv2d(CONVOLUTIONS["strided"])
        x = torch.randn(2, 4, 9, 8, generator=seeded(7)).requires_grad_()
        args = x, conv.codes, conv.scale, conv.bias, [2, 2], [1, 1], [1, 1], 1
    else:
        x = torch.randn(3, 24, generator=seeded(7)).requires_grad_()
        args = (x, *layer.codes_and_scale(), layer.bias, "int8")  # type: ignore[operator]
    # Without the numerical check of the derivative: rounding makes the layer a staircase, and its derivative is that of the ramp.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if name != "lowrank_int8_embedding":
        checks = (*checks, "test_autograd_registration")
    found = torch.library.opcheck(getattr(torch.ops.lowrank, name).default, args, test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_a_whole_model_with_tied_and_shared_layers_compiles() -> None:
    model = compressed()
    with torch.no_grad():
        assert torch.equal(graph_of(model)(TOKENS), model(TOKENS))


def test_a_change_of_mode_or_codes_reaches_the_graph() -> None:
    layer = linear_layer("QuantizedLinear")
    model = nn.Sequential(layer)
    graph = graph_of(model)
    x = torch.randn(4, 24, generator=seeded(8))
    with torch.no_grad():
        first = graph(x)
        layer.activations = "float"  # type: ignore[assignment]
        second = graph(x)
        assert not torch.equal(first, second)
        assert torch.equal(second, model(x))
        layer.codes.neg_()  # type: ignore[operator]
        assert torch.equal(graph(x), model(x))
        assert not torch.equal(graph(x), second)


def test_a_graph_takes_any_batch() -> None:
    model = nn.Sequential(linear_layer("QuantizedLowRankLayer"), nn.ReLU())
    graph = graph_of(model, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 33):
            x = torch.randn(rows, 24, generator=seeded(rows))
            assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_round_trips_through_a_file(strict: bool) -> None:
    model = compressed()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: rows},), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"lowrank.int8_linear.default", "lowrank.lowrank_int8_linear.default"} <= called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (TOKENS, TOKENS[:2], TOKENS.repeat(4, 1)):
        with torch.no_grad():
            assert torch.equal(loaded(tokens), model(tokens))


def test_layers_made_for_a_graph_go_with_its_tensors() -> None:
    layer = linear_layer("QuantizedLinear")
    gc.collect()
    before = len(operators._made)
    with torch.no_grad():
        graph_of(nn.Sequential(layer))(torch.zeros(1, 24))
    assert len(operators._made) == before + 1
    del layer
    torch._dynamo.reset()
    gc.collect()
    assert len(operators._made) == before


@pytest.mark.slow
def test_inductor_keeps_the_integer_layers() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is none")
    model = nn.Sequential(linear_layer("QuantizedLinear"), nn.ReLU())
    x = torch.randn(4, 24, generator=seeded(9))
    with torch.no_grad():
        assert torch.equal(graph_of(model, backend="inductor")(x), model(x))


@pytest.mark.slow
def test_a_compressed_bert_compiles_and_exports() -> None:
    transformers = pytest.importorskip("transformers")
    from lowrank import compress_model

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 100, (64, 12), generator=seeded(10))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    small = compress_model(model, error_budget=0.3, calibration=batches, progress=False).model
    inputs = {name: tensor[:3] for name, tensor in batches[0].items()}
    with torch.no_grad():
        expected = small(**inputs).last_hidden_state
        assert torch.equal(graph_of(small)(**inputs).last_hidden_state, expected)
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(small, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs})
        assert torch.equal(program.module()(**inputs).last_hidden_state, expected)
        more: dict[str, Tensor] = {name: tensor[:9] for name, tensor in batches[0].items()}
        assert torch.equal(program.module()(**more).last_hidden_state, small(**more).last_hidden_state)
