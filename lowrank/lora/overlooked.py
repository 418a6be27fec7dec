"""What a configuration seems to ask for and an adapter passes over: said once, where the adapter is made."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowrank.layers import CompressedLayer
from lowrank.lora.config import LoRAConfig
from lowrank.lora.target_modules import Targets, asks_for_all_linear, matches

__all__ = ["overlooked"]


def overlooked(model: nn.Module, config: LoRAConfig, targets: Targets) -> list[str]:
    """List what the configuration could be taken to ask for, and what this adapter leaves alone all the same.

    Args:
        model: before the adapter is on it.
        config: of the adapter.
        targets: what :func:`lowrank.lora.target_modules.find_targets` made of it.

    Returns:
        A sentence each; empty where nothing was passed over.

    Example:
        >>> from lowrank.lora.target_modules import find_targets
        >>> model, config = nn.Sequential(nn.Linear(2, 2)), LoRAConfig(task_type="QUESTION_ANS")
        >>> overlooked(model, config, find_targets(model, config))
        ['task_type: QUESTION_ANS trains modules named qa_outputs whole, and this model has none: no head is trained']
    """
    said: list[str] = []
    experts = list(_stacked_weights(model)) if asks_for_all_linear(config) else []
    if experts:
        said.append(
            f'target_modules: "all-linear" passes over the experts of {len(experts)} modules (the first is {experts[0][0]}, '
            f"parameters {', '.join(experts[0][1])}): their weights are stacked in one parameter, which no adapter fits here; "
            "PEFT trains some of these"
        )
    names = [name for place in targets.saved for name in place.names]
    if config.head_names and not any(name.endswith(config.head_names) for name in names):
        said.append(
            f"task_type: {config.task_type} trains modules named {' or '.join(config.head_names)} whole, and this model has none: "
            "no head is trained"
        )
    if isinstance(config.target_modules, list):
        adapted = [name for place in targets.adapted for name in place.names]
        for entry in config.target_modules:
            if not any(matches([entry], name) for name in adapted):
                said.append(
                    f"target_modules: {entry!r} is trained whole ({'modules_to_save' if config.modules_to_save else 'task_type'}): "
                    "no adapter goes on it"
                )
    return said


def _stacked_weights(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules with matrices stacked in parameters of three dimensions, as mixtures of experts have them, and those parameters."""
    for name, module in model.named_modules():
        # torch's own layers with kernels are no experts; its containers may hold some.
        own_layer = type(module).__module__.startswith("torch.nn.") and type(module).forward is not nn.Module.forward
        if isinstance(module, CompressedLayer) or own_layer:
            continue
        stacked = tuple(
            part
            for part, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and min(parameter.shape) > 1
        )
        if stacked:
            yield name, stacked
