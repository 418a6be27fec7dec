"""Compressed layers read, traced and run as torch's own are: attributes, ``.weight``, symbolic traces, memory formats, autocast."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.errors import UsageError
from lowrank.layers import (
    LowRankEmbedding,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankConv2d,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    QuantizedLSTM,
    SVDCompressedConv2d,
    SVDCompressedLinear,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(kind: str) -> tuple[nn.Module, nn.Module]:
    """A dense layer and one that stands for it."""
    torch.manual_seed(0)
    linear, conv, table = nn.Linear(12, 8), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Embedding(20, 8)
    layers: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
        "int8 linear": lambda: (linear, QuantizedLinear.from_linear(linear)),
        "weight-only linear": lambda: (linear, QuantizedLinear.from_linear(linear, activations="float")),
        "low-rank linear": lambda: (linear, SVDCompressedLinear.from_linear(linear, rank=8).requires_grad_(False)),
        "low-rank int8 linear": lambda: (linear, QuantizedLowRankLayer.from_linear(linear, rank=8)),
        "int8 conv": lambda: (conv, QuantizedConv2d.from_conv2d(conv)),
        "low-rank conv": lambda: (conv, SVDCompressedConv2d.from_conv2d(conv, rank=6).requires_grad_(False)),
        "low-rank int8 conv": lambda: (conv, QuantizedLowRankConv2d.from_conv2d(conv, rank=6)),
        "int8 embedding": lambda: (table, QuantizedEmbedding.from_embedding(table)),
        "low-rank embedding": lambda: (table, LowRankEmbedding.from_embedding(table, rank=8).requires_grad_(False)),
        "low-rank int8 embedding": lambda: (table, QuantizedLowRankEmbedding.from_embedding(table, rank=8)),
    }
    return layers[kind]()


KINDS = (
    "int8 linear",
    "weight-only linear",
    "low-rank linear",
    "low-rank int8 linear",
    "int8 conv",
    "low-rank conv",
    "low-rank int8 conv",
    "int8 embedding",
    "low-rank embedding",
    "low-rank int8 embedding",
)
CONVS = tuple(kind for kind in KINDS if kind.endswith("conv"))
TORCHS_NAMES = {
    "linear": ("in_features", "out_features"),
    "conv": (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
    ),
    "embedding": (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_those_of_the_dense_layer(kind: str) -> None:
    dense, layer = made(kind)
    for name in TORCHS_NAMES[kind.split()[-1]]:
        assert getattr(layer, name) == getattr(dense, name), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_read_as_a_tensor_of_the_dense_shape(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    dense, layer = made(kind)
    weight = layer.weight
    assert weight.shape == dense.weight.shape and weight.dtype == dense.weight.dtype
    assert weight.device == dense.weight.device and not weight.requires_grad
    assert layer.weight_decodings == 0, "asking for its type must not decode it"
    with caplog.at_level(logging.WARNING, "lowrank"):
        read = weight + 0.0
    assert torch.equal(read, layer.dense_weight().detach().to(dense.weight.dtype))
    # Eight bits a row: half a step of 1/127 of the row's largest entry, twice where both factors are rounded.
    assert float((read - dense.weight).detach().abs().max()) <= 0.05 * float(dense.weight.detach().abs().max())
    assert layer.weight_decodings == 1 and ".weight is computed with" in caplog.text
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8 linear", "low-rank int8 linear"])
def test_computing_with_the_weight_is_right_and_gradients_reach_the_input(kind: str) -> None:
    _, layer = made(kind)
    x = torch.randn(3, 12, generator=seeded(), requires_grad=True)
    y = F.linear(x, layer.weight, layer.bias)
    dense = layer.dense_weight().detach()
    torch.testing.assert_close(y, F.linear(x, dense, layer.bias), rtol=0.0, atol=0.0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(3, -1))


def test_factors_in_training_get_gradients_through_the_weight() -> None:
    linear = nn.Linear(6, 4)
    layer = SVDCompressedLinear.from_linear(linear, rank=2)
    F.linear(torch.ones(1, 6), layer.weight).sum().backward()
    assert layer.left.grad is not None and float(layer.left.grad.abs().sum()) > 0.0


@pytest.mark.parametrize("write", [Tensor.zero_, lambda w: w.add_(1.0), lambda w: w.__setitem__(0, 1.0)])
def test_writing_to_the_weight_is_refused_by_name(write: Callable[[Tensor], object]) -> None:
    _, layer = made("int8 linear")
    before = layer.codes.clone()
    with pytest.raises(UsageError, match=r"QuantizedLinear holds codes or factors.*cannot be written to"):
        write(layer.weight)
    with pytest.raises(UsageError, match="takes no other weight by assignment"):
        layer.weight = nn.Parameter(torch.zeros(8, 12))
    assert torch.equal(layer.codes, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.zero_(),
        lambda w: w.detach().normal_(),
        lambda w: w.T.fill_(1.0),
        lambda w: w[0].zero_(),
        lambda w: w.view(-1)[3:5].copy_(torch.zeros(2)),
        lambda w: w.data.copy_(torch.zeros(8, 12)),
        lambda w: w.chunk(2)[1].mul_(2.0),
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: torch.add(w, 1.0, out=w),
        lambda w: w.requires_grad_(True),
        lambda w: setattr(w, "requires_grad", True),
    ],
)
@pytest.mark.parametrize("kind", ["int8 linear", "low-rank linear"])
def test_a_write_that_would_be_lost_is_refused(write: Callable[[Tensor], object], kind: str) -> None:
    _, layer = made(kind)
    with pytest.raises(UsageError, match="holds codes or factors"):
        write(layer.weight)


@pytest.mark.parametrize("kind", ["int8 linear", "low-rank int8 conv", "int8 embedding"])
def test_the_weight_goes_to_numpy_copies_and_pickles_by_its_numbers(kind: str) -> None:
    _, layer = made(kind)
    wanted = layer.dense_weight().detach()
    array = layer.weight.detach().cpu().numpy()
    assert array.tolist() == wanted.tolist() == layer.weight.data.tolist()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0.0
    for copied in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), layer.weight.clone()):
        assert type(copied) is Tensor and torch.equal(copied.zero_() + wanted, wanted)
    assert torch.equal(layer.weight.flatten(1).T @ torch.ones(len(wanted)), wanted.flatten(1).T @ torch.ones(len(wanted)))
    layer.weight.requires_grad_(False)


def test_data_and_its_type_are_read_without_decoding() -> None:
    _, layer = made("int8 linear")
    assert layer.weight.data.dtype == torch.float32 and layer.weight.detach().shape == (8, 12)
    assert layer.weight_decodings == 0


def test_a_tracer_that_names_modules_is_told_of_each_layer() -> None:
    """As torchvision's ``create_feature_extractor`` has one."""

    class Naming(torch.fx.Tracer):
        within, names = "", {}  # type: ignore[var-annotated]

        def call_module(self, m: nn.Module, forward: Callable[..., object], args: object, kwargs: object) -> object:
            before, self.within = self.within, self.path_of_module(m)
            try:
                return super().call_module(m, forward, args, kwargs)  # type: ignore[arg-type]
            finally:
                self.within = before

        def create_node(self, *args: object, **kwargs: object) -> torch.fx.Node:
            node = super().create_node(*args, **kwargs)  # type: ignore[arg-type]
            self.names[node.target] = self.within
            return node

    tracer = Naming()
    tracer.trace(nn.Sequential(made("int8 linear")[1], nn.ReLU(), nn.Sequential(made("int8 conv")[1])))
    assert tracer.names["0"] == "0" and tracer.names["1"] == "1" and tracer.names["2.0"] == "2.0"


def test_a_layer_with_several_weights_has_none_of_that_name_but_each_by_its_own() -> None:
    layer = QuantizedLSTM.from_module(nn.LSTM(4, 3))
    assert not hasattr(layer, "weight")
    assert layer.weight_ih_l0.shape == (12, 4) and layer.weight_decodings == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("embedding")])
def test_symbolic_trace_takes_a_layer_as_a_leaf(kind: str) -> None:
    _, layer = made(kind)
    model = nn.Sequential(layer, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 4, 9, 9, generator=seeded()) if "conv" in kind else torch.randn(2, 12, generator=seeded())
    assert torch.equal(traced(x), model(x))


def test_symbolic_trace_of_a_compressed_model_runs_with_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = QuantizedLinear(6, 6), QuantizedLinear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=torch.relu(self.a(x)) + x)

    model, x = Net(), torch.randn(3, 6, generator=seeded())
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("last", [True, False])
def test_convolutions_keep_the_memory_format_of_their_input(kind: str, last: bool) -> None:
    dense, layer = made(kind)
    x = torch.randn(2, 9, 9, 4, generator=seeded()).permute(0, 3, 1, 2)
    x = x if last else x.contiguous()
    wanted, found = dense(x), layer(x)
    assert wanted.is_contiguous(memory_format=torch.channels_last) == last
    assert found.is_contiguous(memory_format=torch.channels_last) == last
    torch.testing.assert_close(found, layer(x.contiguous()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["int8 linear", "weight-only linear", "low-rank int8 linear", "low-rank linear", *CONVS]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_answers_in_autocasts_type(kind: str, dtype: torch.dtype) -> None:
    dense, layer = made(kind)
    x = torch.randn(2, 4, 9, 9, generator=seeded()) if "conv" in kind else torch.randn(2, 12, generator=seeded())
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=dtype):
            assert layer(x).dtype == dense(x).dtype == dtype
    with torch.no_grad():
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8 linear", "weight-only linear", "low-rank int8 linear", "int8 conv"])
def test_gradient_checkpointing_without_reentry_gives_the_same_gradient(kind: str) -> None:
    _, layer = made(kind)
    layer.bias.requires_grad_(True)
    shape = (2, 4, 9, 9) if "conv" in kind else (2, 12)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = torch.randn(shape, generator=seeded(), requires_grad=True)
        layer.bias.grad = None
        run(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_methods_of_transformers_that_would_lose_the_layers_say_what_to_do() -> None:
    class Like(nn.Module):
        """What transformers' base class has."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

        def save_pretrained(self, directory: str) -> str:
            return "written"

        def resize_token_embeddings(self, size: int) -> str:
            return "resized"

        def tie_weights(self) -> None:
            raise AssertionError("would look for .weight")

    torch.manual_seed(0)
    model = Like().eval()
    result = lowrank.compress_model(model, error_budget=0.2, progress=False)
    for small in (result.model, copy.deepcopy(result.model), lowrank.apply_plan(model, result.plan)):
        with pytest.raises(UsageError, match=r"save_pretrained: .*result\.save\(directory\)"):
            small.save_pretrained("out")
        with pytest.raises(UsageError, match="resize the dense model and compress it again"):
            small.resize_token_embeddings(60)
        assert small.tie_weights() is None
    assert model.save_pretrained("out") == "written"
    assert pickle.loads(pickle.dumps(result.model.__dict__["save_pretrained"])).name == "save_pretrained"
