"""Where an analysis gets its tensors: from a module, or from safetensors files without reading them yet."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank.io import open_tensors
from lowrank.targets import kind_of
from lowrank.targets.model import refuse_script
from lowrank.targets.survey import MAX_ELEMENTS

__all__ = [
    "ITEM_BYTES",
    "Item",
    "Layer",
    "count_of",
    "layers_of_files",
    "layers_of_module",
    "names_of",
    "not_floating",
    "prefix_ends",
    "refusal_of",
    "short_dtype",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What BatchNorm keeps beside its parameters.
RUNNING = ("running_mean", "running_var")
A_BUFFER = "a buffer: not a parameter, left as it is"
ITEM_BYTES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in FLOATS}


@dataclass(frozen=True)
class Item:
    """One tensor, not yet read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    refusal: str | None
    read: Callable[[], Tensor]
    buffer: bool = False


@dataclass(frozen=True)
class Layer:
    """The tensors that go by one name."""

    name: str
    kind: str | None
    items: tuple[Item, ...]
    module: nn.Module | None = None


def layers_of_module(model: nn.Module) -> list[Layer]:
    """List every module that holds tensors, in the model's order; a tensor seen before is refused as tied.

    Raises:
        UsageError: TorchScript, whose modules show none.
    """
    refuse_script(model)
    layers: list[Layer] = []
    seen: dict[object, str] = {}
    for name, module in model.named_modules():
        tensors: dict[str, Tensor] = {key: value for key, value in module._parameters.items() if value is not None}
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set:
                tensors[key] = value
        items = [
            replace(_module_item(name, key, tensor, module, seen), buffer=key not in module._parameters)
            for key, tensor in tensors.items()
        ]
        if items:
            layers.append(Layer(name, type(module).__name__, tuple(items), module))
    return layers


def _module_item(name: str, key: str, tensor: Tensor, module: nn.Module, seen: dict[object, str]) -> Item:
    full = f"{name}.{key}" if name else key
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return Item(
            key, (), str(tensor.dtype), 0, "lazy, not yet initialised: run the model once first", lambda: tensor
        )
    refusal = None
    if type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        refusal = f"a {type(tensor.data).__name__}, not a plain dense tensor"
    elif tensor.is_meta:
        refusal = "on the meta device: it holds no numbers"
    nbytes = tensor.numel() * tensor.element_size()
    identity: object = id(tensor)
    if refusal is None and tensor.numel():
        # Two parameters over the same memory are tied as much as one parameter in two places.
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
    if identity in seen:
        return Item(key, tuple(tensor.shape), str(tensor.dtype), 0, f"tied with {seen[identity]}", lambda: tensor)
    seen[identity] = name or full
    kind = kind_of(module)
    shape, read = tuple(tensor.shape), tensor.detach
    if kind is not None and not kind.composite and refusal is None and key in kind.parameters(module):
        # As the kind multiplies it, whichever way round it is stored.
        weight = kind.factored_weight(module)
        shape, read = tuple(weight.shape), lambda: weight
    return Item(key, shape, str(tensor.dtype), nbytes, refusal, read)


def layers_of_files(path: str | os.PathLike[str]) -> list[Layer]:
    """Give the tensors of safetensors files, grouped by module name, in the order in which a reader counts."""
    source = open_tensors(path)
    groups: dict[str, list[Item]] = {}
    # File order is by dtype and size or by hash; a reader expects layer 10 after layer 9.
    for name, entry in sorted(source.entries.items(), key=lambda item: _natural(item[0])):
        prefix, _, key = name.rpartition(".")
        dtype = str(entry.torch_dtype) if entry.torch_dtype is not None else entry.dtype
        # A file does not say what is trained: whole numbers are not, nor is what BatchNorm keeps.
        buffer = short_dtype(dtype) not in ITEM_BYTES or key in RUNNING
        item = Item(key, entry.shape, dtype, entry.nbytes, None, lambda name=name: source.read(name), buffer)  # type: ignore[misc]
        groups.setdefault(prefix, []).append(item)
    return [Layer(name, None, tuple(items)) for name, items in groups.items()]


def _natural(name: str) -> list[tuple[int, int, str]]:
    # Digits beyond 18 would make comparing a hostile name slow.
    return [
        (1, int(part), "") if part.isdecimal() and len(part) < 19 else (2, 0, part) for part in re.split(r"(\d+)", name)
    ]


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """List every name of every module, the one it is reported by first."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def prefix_ends(name: str) -> Iterator[int]:
    """Find where the names of a layer and of the containers around it end."""
    for match in re.finditer(r"\.", name):
        yield match.start()
    yield len(name)


def refusal_of(item: Item) -> str | None:
    """Why a tensor has no spectrum: None where it has one, "" for a vector, which needs no word beside a matrix."""
    if item.refusal is not None:
        return item.refusal
    if math.prod(item.shape) == 0:
        return "empty"
    if len(item.shape) < 2:
        return ""
    if short_dtype(item.dtype) not in ITEM_BYTES:
        return not_floating(item)
    if item.buffer:
        return A_BUFFER
    if math.prod(item.shape) > MAX_ELEMENTS:
        return f"{math.prod(item.shape):,} elements, over the limit of 2^31"
    return None


def not_floating(item: Item) -> str:
    """Give the reason why a tensor of this dtype has no spectrum."""
    return f"{short_dtype(item.dtype)} is not a floating dtype that can be factored"


def count_of(item: Item) -> int:
    """Parameters that a tensor adds to the model, as torch counts them: none where it is a buffer or tied."""
    tied = item.refusal is not None and item.refusal.startswith("tied")
    return 0 if item.buffer or tied else math.prod(item.shape)


def short_dtype(dtype: str) -> str:
    """Give ``"float32"`` for ``"torch.float32"``."""
    return dtype.removeprefix("torch.")
