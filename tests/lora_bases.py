"""One base layer of every kind that takes adapters, with inputs for it and its product in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers import eps, seeded
from torch import Tensor, nn

import lowrank
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.adapters import lora_layers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INPUTS, OUTPUTS, RANK = 12, 10, 3


def _linear(dtype: torch.dtype) -> nn.Module:
    return nn.Linear(INPUTS, OUTPUTS, dtype=dtype)


def _conv1d_of_transformers(dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module: nn.Module = Conv1D(OUTPUTS, INPUTS).to(dtype)
    with torch.no_grad():
        module.weight.normal_(std=0.3)  # type: ignore[operator]
    return module


def _embedding(dtype: torch.dtype) -> nn.Embedding:
    return nn.Embedding(INPUTS, OUTPUTS, dtype=dtype)


def _conv1d(dtype: torch.dtype) -> nn.Conv1d:
    return nn.Conv1d(INPUTS, OUTPUTS, 3, stride=2, padding=2, dilation=2, dtype=dtype)


def _conv2d(dtype: torch.dtype) -> nn.Conv2d:
    return nn.Conv2d(4, OUTPUTS, (3, 2), padding=(1, 0), padding_mode="reflect", dtype=dtype)


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "linear": _linear,
    "no-bias": lambda dtype: nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype),
    "Conv1D": _conv1d_of_transformers,
    "conv1d": _conv1d,
    "conv2d": _conv2d,
    "same": lambda dtype: nn.Conv2d(4, OUTPUTS, 3, padding="same", bias=False, dtype=dtype),
    "embedding": _embedding,
    "lowrank": lambda dtype: lowrank.SVDCompressedLinear.from_linear(_linear(dtype), rank=5),
    "lowrank-int8": lambda dtype: lowrank.QuantizedLowRankLayer.from_linear(_linear(dtype), rank=5),
    "lowrank-int8-weight-only": lambda dtype: lowrank.QuantizedLowRankLayer.from_linear(
        _linear(dtype), rank=5, activations="float"
    ),
    "int8": lambda dtype: lowrank.QuantizedLinear.from_linear(_linear(dtype)),
    "lowrank-embedding": lambda dtype: lowrank.LowRankEmbedding.from_embedding(_embedding(dtype), rank=5),
    "int8-embedding": lambda dtype: lowrank.QuantizedEmbedding.from_embedding(_embedding(dtype)),
    "lowrank-int8-embedding": lambda dtype: lowrank.QuantizedLowRankEmbedding.from_embedding(_embedding(dtype), rank=5),
    "lowrank-conv1d": lambda dtype: lowrank.SVDCompressedConv1d.from_conv1d(_conv1d(dtype), rank=5),
    "lowrank-conv2d": lambda dtype: lowrank.SVDCompressedConv2d.from_conv2d(_conv2d(dtype), rank=5),
    "spatial-conv2d": lambda dtype: lowrank.SVDCompressedConv2d.from_conv2d(_conv2d(dtype), rank=5, scheme="spatial"),
    "int8-conv1d": lambda dtype: lowrank.QuantizedConv1d.from_conv1d(_conv1d(dtype)),
    "int8-conv2d": lambda dtype: lowrank.QuantizedConv2d.from_conv2d(_conv2d(dtype)),
    "lowrank-int8-conv1d": lambda dtype: lowrank.QuantizedLowRankConv1d.from_conv1d(_conv1d(dtype), rank=5),
    "lowrank-int8-conv2d": lambda dtype: lowrank.QuantizedLowRankConv2d.from_conv2d(
        _conv2d(dtype), rank=5, activations="float"
    ),
}
INTEGER = {name for name in BASES if "int8" in name}
DENSE = {"linear", "no-bias", "Conv1D", "conv1d", "conv2d", "same", "embedding"}


def build(kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(BASES[kind](dtype)).eval()


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if "embedding" in kind:
        return torch.arange(14).reshape(2, 7) % INPUTS
    shape = {"conv1d": (2, INPUTS, 9), "conv2d": (2, 4, 5, 6), "same": (2, 4, 5, 5)}.get(
        kind.rsplit("-")[-1], (2, 3, INPUTS)
    )
    return torch.randn(shape, generator=seeded(5), dtype=torch.float64).to(dtype)


def product(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """What a weight (out, in, *kernel) makes of the inputs, in float64 and without a bias."""
    if "embedding" in kind:
        return F.embedding(x, weight.T)
    x = x.double()
    if kind.endswith("conv1d"):
        return F.conv1d(x, weight, stride=2, padding=2, dilation=2)
    if kind.endswith("conv2d"):
        return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="reflect"), weight)
    if kind == "same":
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight)
    return x @ weight.T


def adapted(kind: str, dtype: torch.dtype = torch.float32, *, adapter: str = "default", **options: object) -> nn.Module:
    """The base with one adapter whose A and B are both drawn at random."""
    model = lowrank.add_lora(
        build(kind, dtype),
        lowrank.LoRAConfig(**({"r": RANK, "lora_alpha": 6, "target_modules": ["0"]} | options)),
        adapter,  # type: ignore[arg-type]
    )
    randomise(model, adapter)
    return model


def randomise(model: nn.Module, adapter: str = "default", seed: int = 9) -> None:
    generator = seeded(seed)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            for parameter in layer.adapter_parameters(adapter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.2 * noise).to(parameter.dtype))


def only_layer(model: nn.Module) -> LoRALayer:
    (layer,) = lora_layers(model).values()
    return layer


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, safety: float = 16.0) -> None:
    """Equal up to rounding in ``dtype``, relative to the largest output."""
    assert actual.shape == expected.shape
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=0.0, atol=safety * eps(dtype) * max(size, 1.0)
    )
