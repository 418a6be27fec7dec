"""The adapters on a model: their layers and names, which of them count, and checks on a name or a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.errors import AdapterError, UsageError
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.saved_module import SavedModule

__all__ = [
    "activate",
    "active_adapters",
    "adapter_names",
    "check_new_name",
    "check_one_copy",
    "check_unmerged",
    "lora_layers",
    "require_adapter",
    "saved_modules",
]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Find the adapted layers by their first names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Find the modules that are trained whole, by their first names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SavedModule)}


def adapter_names(model: nn.Module) -> list[str]:
    """List the adapters on a model, in the order they were added.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> adapter_names(add_lora(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(r=1), "task"))
        ['task']
    """
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names |= dict.fromkeys(layer.configs)
    for module in saved_modules(model).values():
        names |= dict.fromkeys(module.modules_to_save)
    return list(names)


def active_adapters(model: nn.Module) -> list[str]:
    """List the adapters that count at the moment."""
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names |= dict.fromkeys(layer.active_adapters)
    for module in saved_modules(model).values():
        if module.active is not None:
            names[module.active] = None
    return list(names)


def activate(model: nn.Module, adapters: Sequence[str]) -> None:
    """Let these adapters count and be trained, and no others; nothing is checked."""
    for layer in lora_layers(model).values():
        layer.set_active(adapters)
    for module in saved_modules(model).values():
        module.set_active(list(adapters))


def require_adapter(model: nn.Module, adapter: str) -> None:
    """Refuse a name that no adapter of the model has.

    Raises:
        AdapterError: names those that there are.
    """
    known = adapter_names(model)
    if adapter not in known:
        raise AdapterError(f"adapter {adapter!r}: not on this model, which has {', '.join(known) or 'none'}")


def check_new_name(model: nn.Module, adapter: object) -> None:
    """Refuse a name that no adapter can have, or that one of the model's has already.

    Raises:
        UsageError: not a text, empty, with a dot, an attribute of every module, or taken.
    """
    if (
        not isinstance(adapter, str)
        or not adapter
        or "." in adapter
        or hasattr(nn.ModuleDict(), adapter)
        or hasattr(nn.ParameterDict(), adapter)
    ):
        raise UsageError(
            f"adapter_name: must be a non-empty text without dots that is no attribute of a module, got {adapter!r}"
        )
    if adapter in adapter_names(model):
        raise UsageError(f"adapter_name: the model already has an adapter {adapter!r}; delete it or take another name")


def check_one_copy(model: nn.Module, adapters: Sequence[str], what: str) -> None:
    """Refuse adapters that cannot count together, since each has a copy of its own of the same module.

    Args:
        what: is to be done, for the message.

    Raises:
        UsageError: names the module and the adapters.
    """
    for name, module in saved_modules(model).items():
        own = [adapter for adapter in dict.fromkeys(adapters) if adapter in module.modules_to_save]
        if len(own) > 1:
            raise UsageError(
                f"{what}: {', '.join(own)} each train {name} whole (modules_to_save), and only one copy of it can run; choose one "
                "of them"
            )


def check_unmerged(model: nn.Module, what: str) -> None:
    """Refuse a model whose adapters are merged.

    Args:
        what: is to be done, for the message.

    Raises:
        UsageError: names the first such layer.
    """
    for name, layer in lora_layers(model).items():
        if layer.merged_adapters:
            raise UsageError(
                f"{what}: adapters are merged (layer {name}: {', '.join(layer.merged_adapters)}); unmerge_lora first"
            )
