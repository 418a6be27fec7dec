"""Whole models: what they may not be wrapped in, which of their modules a pattern names, and swapping one for another."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lowrank.errors import UsageError

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")

__all__ = ["matching", "refuse_adapters", "refuse_script", "replace_module", "unwrapped"]


def refuse_adapters(model: nn.Module, who: str) -> None:
    """Refuse a model with LoRA adapters.

    Args:
        who: the end of "which has adapters, which …", for the message.

    Raises:
        UsageError: names the first adapted layer.
    """
    for name, module in model.named_modules():
        # By what they hold: adapters live on a higher floor.
        if hasattr(module, "lora_A") or hasattr(module, "modules_to_save"):
            raise UsageError(
                f"model: layer {name} has adapters, which {who}; save_adapter writes them, or "
                "unload_lora(merge_lora(model)) puts them into the weights"
            )


def unwrapped(model: object) -> nn.Module:
    """Refuse what is no model, or one that is wrapped in something that replaces its forward.

    Raises:
        UsageError: not a module, a bare layer, or wrapped by torch.compile, DataParallel, DDP or FSDP.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    _refuse_finished(model)
    if hasattr(model, "_orig_mod"):
        raise UsageError("model: is wrapped by torch.compile; pass model._orig_mod and compile the result")
    if kind in {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}:
        raise UsageError(f"model: is wrapped by {kind}; pass model.module and wrap the result")
    if not any(True for _ in model.children()):
        raise UsageError(f"model: is a single layer ({kind}); pass nn.Sequential(layer), so that it can be replaced")
    return model


def refuse_script(model: nn.Module) -> None:
    """Refuse TorchScript, whose layers are no modules with a weight to look at or to replace.

    Raises:
        UsageError: names the first such layer.

    Example:
        >>> refuse_script(nn.Sequential(nn.Linear(2, 2)))
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (not name or any(True for _ in module.parameters())):
            raise UsageError(
                f"model: {_where(name)} is TorchScript (torch.jit.script, trace or load), whose layers cannot be replaced; pass the "
                "nn.Module that it was made from: build it with its class and give it the script's state_dict()"
            )


def _where(name: str) -> str:
    return f"layer {name}" if name else "the model"


def _refuse_finished(model: nn.Module) -> None:
    """Refuse what torch has compiled or quantised already: its layers are no longer modules with a weight."""
    refuse_script(model)
    for name, module in model.named_modules():
        origin = type(module).__module__
        if origin.startswith(_QUANTISED) and type(module).__name__ != "FloatFunctional":
            raise UsageError(
                f"model: {_where(name)} is a {origin}.{type(module).__name__}: torch has quantised it already, so that its weights are "
                "gone; pass the model as it was before torch.ao.quantization (quantize_dynamic, convert)"
            )


def matching(patterns: Sequence[str], names: Iterable[str], argument: str) -> dict[str, set[str]]:
    """For each glob the names it covers: a name covers everything below it.

    Raises:
        UsageError: a pattern matches nothing; lists near misses.

    Example:
        >>> sorted(matching(["encoder.*"], ["encoder.a", "encoder.b", "head"], "ignore")["encoder.*"])
        ['encoder.a', 'encoder.b']
    """
    if isinstance(patterns, str):
        raise UsageError(f"{argument}: must be a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    known = list(names)
    found: dict[str, set[str]] = {}
    for pattern in patterns:
        hits = {name for name in known if fnmatchcase(name, pattern)}
        if not hits:
            near = difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(f"{argument}: pattern {pattern!r} matches no module of the model{hint}")
        found[pattern] = {name for name in known if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return found


def replace_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` in every place named.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> replace_module(model, ["0"], nn.Identity())
        >>> model
        Sequential(
          (0): Identity()
        )
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
