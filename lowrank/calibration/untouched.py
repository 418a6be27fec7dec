"""Running a model that is somebody else's: its modes, attributes and buffers come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["borrowed", "in_evaluation", "restore_modes", "set_modes", "untouched"]

# What nn.Module keeps of itself; taking layers out and in is not a thing that running it does.
_MODULES_OWN = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's own mode again, by its own ``train``.

    A ``train`` or ``eval`` of the model's own may do more than to set a flag: LoRA layers fold themselves into their weight.

    Example:
        >>> model = nn.Sequential(nn.Dropout()).train()
        >>> with in_evaluation(model):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    if not any(mode for _, mode in modes):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        restore_modes(modes)


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give modules their modes by their own ``train``.

    Args:
        modes: parents before children, as ``model.modules()`` gives them.

    Example:
        >>> model = nn.Sequential(nn.Dropout())
        >>> restore_modes([(model, True), (model[0], False)])
        >>> model.training, model[0].training
        (True, False)
    """
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)
    for module, mode in modes:
        # One that was set by hand, to what its train() does not do.
        module.training = mode


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Take back what running the model leaves on it: attributes, entries of its lists and dicts, what is written to its buffers.

    Example:
        >>> class Counting(nn.Module):
        ...     last = None
        ...     def forward(self, x):
        ...         self.last = x
        ...         return x
        >>> model = Counting()
        >>> with untouched(model):
        ...     _ = model(torch.ones(1))
        >>> model.last is None
        True
    """
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    containers: list[tuple[Any, Any]] = []
    buffers: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    for module in model.modules():
        attributes.append((module.__dict__, dict(module.__dict__)))
        containers += [
            (value, value.copy())
            for name, value in module.__dict__.items()
            if type(value) in (list, dict, set) and name not in _MODULES_OWN
        ]
        for buffer in module._buffers.values():
            if buffer is not None and not buffer.is_meta:
                buffers.append((buffer, _version(buffer), buffer.detach().clone()))
    try:
        yield
    finally:
        for held, before in attributes:
            held.clear()
            held.update(before)
        for value, before in containers:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if _version(buffer) != version or buffer.is_inference():
                    buffer.copy_(values)


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Work on the caller's model: in evaluation mode, out of inference mode (which knows no gradients), afterwards as it was.

    Gives its modes by module name, for :func:`set_modes` on what was made of it.

    Example:
        >>> model = nn.Sequential(nn.Dropout()).train()
        >>> with borrowed(model) as modes:
        ...     modes, model.training
        ({'': True, '0': True}, False)
    """
    modes = {name: module.training for name, module in model.named_modules()}
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with outside, untouched(model), in_evaluation(model):
        yield modes


def set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Give a model, whose layers may have been replaced, the modes of the one it was made of.

    Example:
        >>> model = nn.Sequential(nn.Dropout()).eval()
        >>> set_modes(model, {"": True, "0": True})
        >>> model[0].training
        True
    """
    restore_modes([(module, modes.get(name, module.training)) for name, module in model.named_modules()])


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
