"""AdamW over what is trainable, its state as plain tensors, and the tensors a run changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, UsageError
from lowrank.training.options import TrainingOptions

__all__ = ["build_optimizer", "changing_tensors", "optimizer_tensors", "restore_optimizer", "trainable_named"]


def trainable_named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters that ask for a gradient, a shared one once, by name.

    Raises:
        UsageError: there is none.

    Example:
        >>> list(trainable_named(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UsageError(
            "model: has no trainable parameter; add an adapter with lowrank.add_lora(model, config), "
            "or set requires_grad on what is to be trained"
        )
    return found


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Find what training changes: trainable parameters, and the buffers of modules that own one (running statistics).

    Example:
        >>> list(changing_tensors(nn.BatchNorm1d(2)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    found: dict[str, Tensor] = dict(trainable_named(model))
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and has_trainable(module):
            for name, buffer in module.named_buffers(prefix, recurse=False):
                found[name] = buffer
    return found


def has_trainable(module: nn.Module) -> bool:
    """Say whether the module itself owns a trainable parameter."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def build_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """Build AdamW; biases, norms and other vectors without decay, ``lora_B`` at ``lora_plus_ratio`` times the learning rate.

    Raises:
        UsageError: ``lora_plus_ratio`` for a model without ``lora_B``.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable_named(model).items():
        faster = options.lora_plus_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
        groups.setdefault((faster, parameter.ndim > 1), []).append(parameter)
    if options.lora_plus_ratio is not None and not any(faster for faster, _ in groups):
        raise UsageError("lora_plus_ratio: the model has no trainable lora_B; add an adapter first, or leave it out")
    ratio = options.lora_plus_ratio or 1.0
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": options.lr * (ratio if faster else 1.0),
                "peak": options.lr * (ratio if faster else 1.0),
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (faster, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        # One fixed implementation: which one torch picks otherwise depends on device and version.
        foreach=False,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Give the moments and step counts, named ``<parameter>/<moment>``."""
    return {
        f"{name}/{key}": value
        for name, parameter in trainable_named(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises:
        CheckpointError: a moment that does not fit its parameter.
    """
    names = trainable_named(model)
    for label, value in tensors.items():
        name, _, key = label.rpartition("/")
        parameter = names.get(name)
        if parameter is None or (value.ndim and value.shape != parameter.shape):
            raise CheckpointError(
                f"training state: {label} does not fit the model; start anew with overwrite=True (--overwrite)"
            )
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = value.to(parameter.device) if value.ndim else value
