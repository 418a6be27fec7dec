"""Copying a model together with whatever a run of it left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType, ModuleType

from torch import Tensor, nn

__all__ = ["copied"]


def copied(model: nn.Module) -> nn.Module:
    """Copy a model deeply; what a run left on it (an activation with its graph, wherever it is kept) is copied as plain numbers.

    ``copy.deepcopy`` refuses tensors that belong to a graph. The original keeps its own, graph included.

    Args:
        model: anything that ``copy.deepcopy`` takes, but for such tensors.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.last = model(model.weight)
        >>> copied(model).last.requires_grad, model.last.requires_grad
        (False, True)
    """
    memo: dict[int, object] = {}
    for tensor in _kept(model):
        memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _kept(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a graph that are reached from the model as ``copy.deepcopy`` reaches them."""
    seen: set[int] = set()
    waiting: list[object] = [model]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (type, FunctionType, ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            if not found.is_leaf:
                yield found
            elif found.grad is not None:
                waiting.append(found.grad)
            continue
        if isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, (list, tuple, set, frozenset)):
            waiting += found
        waiting += getattr(found, "__dict__", {}).values()
        for kind in type(found).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            waiting += [getattr(found, slot, None) for slot in ([slots] if isinstance(slots, str) else slots)]
