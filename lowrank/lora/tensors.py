"""An adapter as named tensors: PEFT's keys out of it, and a file's tensors into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, CheckpointError
from lowrank.io import printable
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.adapters import lora_layers, saved_modules

__all__ = ["PREFIX", "adapter_tensors", "by_layer", "fill", "fill_saved", "rank_of_parts"]

PREFIX = "base_model.model."
# Those of linear layers and convolutions are modules in PEFT.
_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_TENSOR = re.compile(
    r"(?P<layer>.*)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?)$"
)


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Name the tensors of an adapter by PEFT's keys; a learned scale is folded into B.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> list(adapter_tensors(add_lora(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(r=1)), "default"))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        if adapter not in layer.configs:
            continue
        key = f"{PREFIX}{name}."
        learned = layer.lora_scale[adapter].detach() if adapter in layer.lora_scale else None
        for part, parameter in layer.parts(adapter).items():
            tensor = parameter.detach()
            if learned is not None and part.endswith("_B"):
                tensor = tensor * learned
            tensors[key + _KEYS.get(part, part)] = tensor
    for name, module in saved_modules(model).items():
        if adapter in module.modules_to_save:
            for part, tensor in module.modules_to_save[adapter].state_dict().items():
                tensors[f"{PREFIX}{name}.{part}"] = tensor.detach()
    return tensors


def by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort a file's tensors: a layer's name to its parts, and the rest, of modules that are trained whole.

    Args:
        tensors: by their keys, with or without PEFT's prefix.

    Example:
        >>> by_layer({"base_model.model.fc.lora_A.weight": torch.zeros(1, 2), "head.bias": torch.zeros(2)})
        ({'fc': {'lora_A': tensor([[0., 0.]])}}, {'head.bias': tensor([0., 0.])})
    """
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _TENSOR.match(name)
        if found is None:
            rest[name] = tensor
        else:
            layers.setdefault(found["layer"], {})[found["part"].removesuffix(".weight")] = tensor
    return layers, rest


def rank_of_parts(parts: Mapping[str, Tensor]) -> int:
    """Read the rank off the tensors of one layer; 1 where they do not say."""
    down = parts.get("lora_A", parts.get("lora_embedding_A"))
    return int(down.shape[0]) if down is not None and down.ndim else 1


def fill(layer: LoRALayer, adapter: str, parts: dict[str, Tensor], where: str, departures: Iterable[str]) -> None:
    """Copy the tensors of one layer into its adapter.

    Args:
        departures: where a convolution's ``lora_A`` departs from the base's geometry; see :meth:`LoRALayer.departures`.

    Raises:
        CheckpointError: another set of tensors, other shapes, or NaN or Inf, or departures that the layer cannot take; begins with
            ``where``.
    """
    needed = set(layer.parts(adapter))
    if set(parts) != needed:
        raise CheckpointError(f"{where}: must have {', '.join(sorted(needed))}, got {', '.join(sorted(parts))}")
    if layer.family.startswith("conv"):
        _match_convolutions(layer, adapter, parts["lora_A"], parts["lora_B"])
        try:
            layer.depart(adapter, departures)
        except AdapterError as error:
            raise CheckpointError(f"{where}: {error}") from error
    for name, parameter in layer.parts(adapter).items():
        _copy(parameter, parts[name], f"{where}.{name}")


def _match_convolutions(layer: LoRALayer, adapter: str, down: Tensor, up: Tensor) -> None:
    """PEFT's convolutions have groups in ``lora_B`` instead of ``lora_A``."""
    first: Any = layer.lora_A[adapter]
    second: Any = layer.lora_B[adapter]
    if first.groups > 1 and down.ndim == first.weight.ndim and down.shape[1] == first.in_channels:
        second.groups, first.groups = first.groups, 1
        for module, like in ((first, down), (second, up)):
            module.weight = nn.Parameter(module.weight.new_empty(like.shape))


def fill_saved(model: nn.Module, adapter: str, rest: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Copy the tensors that belong to no adapted layer into the modules that are trained whole.

    Returns:
        Those that belong to no such module either.

    Raises:
        CheckpointError: one is missing, of another shape, or holds NaN or Inf; begins with ``where``.
    """
    left = dict(rest)
    for name, module in saved_modules(model).items():
        if adapter not in module.modules_to_save:
            continue
        for part, tensor in module.modules_to_save[adapter].state_dict().items():
            given = left.pop(f"{name}.{part}", None)
            if given is None:
                raise CheckpointError(f"{where}: lacks {printable(name)}.{part} of modules_to_save")
            _copy(tensor, given, f"{where}: {printable(name)}.{part}")
    return left


def _copy(target: Tensor, given: Tensor, where: str) -> None:
    if target.shape != given.shape:
        raise CheckpointError(
            f"{where}: the model needs shape {tuple(target.shape)}, the file holds {tuple(given.shape)}"
        )
    if not bool(torch.isfinite(given).all()):
        raise CheckpointError(f"{where}: holds NaN or Inf")
    with torch.no_grad():
        target.copy_(given)
