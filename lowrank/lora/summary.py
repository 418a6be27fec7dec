"""What was adapted, what was not and why, and how many parameters train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowrank.layers import CompressedLayer
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.adapters import active_adapters, lora_layers, saved_modules
from lowrank.lora.config import LoRAConfig
from lowrank.lora.target_modules import find_targets

__all__ = ["AdapterSummary", "adapter_summary", "trainable_parameters"]


@dataclass(frozen=True)
class AdapterSummary:
    """Every module that holds weights, with its adapters or the reason why it has none.

    Attributes:
        adapted: name to a line such as ``"Linear 64→10: default r=4"``.
        saved: names of modules trained whole.
        left: name to reason.
        trainable, total: numbers of parameters; integer codes count in the total.
        active: names of the active adapters.
    """

    adapted: dict[str, str]
    saved: tuple[str, ...]
    left: dict[str, str]
    trainable: int
    total: int
    active: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"adapted       {name}: {what}" for name, what in self.adapted.items()]
        lines += [f"trained whole {name}" for name in self.saved]
        lines += [f"left alone    {name}: {reason}" for name, reason in self.left.items()]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {share:.4f}")
        return "\n".join(lines)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that train, and all parameters; shared ones once, each integer code of a compressed layer as one.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> trainable_parameters(add_lora(nn.Sequential(nn.Linear(64, 10)), LoRAConfig(r=4)))
        (296, 946)
    """
    parameters = list(model.parameters())
    codes = {
        id(buffer): buffer.numel()
        for module in model.modules()
        if isinstance(module, CompressedLayer)
        for buffer in module.buffers(recurse=False)
        if not buffer.is_floating_point()
    }
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters) + sum(codes.values())


def adapter_summary(model: nn.Module) -> AdapterSummary:
    """Sum up what was adapted, what was not and why; printed it ends in PEFT's line on parameters.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> print(adapter_summary(add_lora(nn.Sequential(nn.Linear(64, 10), nn.LayerNorm(10)), LoRAConfig(r=4))))
        adapted       0: Linear 64→10: default r=4
        left alone    1: not a linear layer
        trainable params: 296 || all params: 966 || trainable%: 30.6418
    """
    layers = lora_layers(model)
    adapted = {name: _line(layer) for name, layer in layers.items()}
    config = next((config for layer in layers.values() for config in layer.configs.values()), LoRAConfig())
    left = find_targets(model, config, strict=False).left
    saved = tuple(saved_modules(model))
    trainable, total = trainable_parameters(model)
    reasons = {name: reason for name, reason in left.items() if name not in adapted and not _inside(name, saved)}
    return AdapterSummary(adapted, saved, reasons, trainable, total, tuple(active_adapters(model)))


def _inside(name: str, saved: tuple[str, ...]) -> bool:
    return any(name == whole or name.startswith(f"{whole}.") for whole in saved)


def _line(layer: LoRALayer) -> str:
    ranks = ", ".join(f"{adapter} r={layer.rank_of(adapter)}" for adapter in layer.configs)
    return f"{type(layer.unmerged_base).__name__} {layer.in_features}→{layer.out_features}: {ranks}"
