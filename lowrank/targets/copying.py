"""Copies of models that share nothing with them but what they are told to share, and layers that change in place."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowrank.errors import UsageError
from lowrank.targets.references import owned, reachable, redirect

__all__ = ["become", "copy_model", "same_module", "sharing_copy"]

_Module = TypeVar("_Module", bound=nn.Module)


def copy_model(model: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """Make a deep copy in which every way to a module leads to the copy's own, and which takes what runs have left there.

    ``copy.deepcopy`` refuses a tensor with a graph (an activation that a module keeps), which is copied without it here,
    and hands on functions and weak references as they are, which lead to the original's layers: those are made anew.

    Args:
        memo: as of ``copy.deepcopy``: what stands for an object, by its id.

    Raises:
        UsageError: something in the model cannot be copied (names it), or gives itself as its copy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.last = model[0](torch.ones(1, 2))
        >>> model.run = lambda x, model=model: model[0](x)
        >>> copied = copy_model(model)
        >>> _ = nn.init.zeros_(copied[0].weight)
        >>> torch.equal(copied.run(torch.ones(1, 2)), copied[0].bias[None]), copied.last.requires_grad
        (True, False)
    """
    memo = {} if memo is None else memo
    own = owned(model)
    functions: list[types.FunctionType] = []
    references: list[weakref.ref[Any]] = []
    for _, value in reachable(model):
        if isinstance(value, types.FunctionType):
            if any(id(found) in own for _, found in reachable(value)):
                functions.append(value)
        elif type(value) is weakref.ref and id(value()) in own:
            references.append(value)
    try:
        with _Detaching():
            copied: _Module = copy.deepcopy(model, memo)
        exchanged: dict[int, Any] = {id(function): _with_own_closure(function) for function in functions}
        # Filled only now that all of them are there: they may lead to each other.
        for function in functions:
            made = exchanged[id(function)]
            for cell, theirs in zip(made.__closure__ or (), function.__closure__ or (), strict=True):
                cell.cell_contents = copy.deepcopy(theirs.cell_contents, memo)
            made.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            made.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
            vars(made).update(copy.deepcopy(vars(function), memo))
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError) as error:
        raise UsageError(
            f"model: this {type(model).__name__} cannot be copied ({_first_line(error)}): {_culprit(model)}"
        ) from error
    exchanged |= {
        id(reference): weakref.ref(memo[id(reference())]) for reference in references if id(reference()) in memo
    }
    if exchanged:
        redirect(copied, exchanged)
    kept = {id(module) for module in model.modules()}
    for name, module in copied.named_modules():
        if id(module) in kept:
            raise UsageError(
                f"model: layer {name} ({type(module).__name__}) gives itself as its own copy (a __deepcopy__ of its class), so that "
                "no copy can be changed without the original; take that method away for the compression"
            )
    return copied


def sharing_copy(model: _Module) -> _Module:
    """Make a copy that has the model's parameters and all else of its own: what runs leave behind is left there.

    Tensors made under ``torch.inference_mode`` are copied too, since gradients know nothing of them.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> copied = sharing_copy(model)
        >>> copied.weight is model.weight, copied.running_mean is model.running_mean
        (True, False)
    """
    return copy_model(model, {id(tensor): tensor for tensor in model.parameters() if not tensor.is_inference()})


def same_module(module: _Module) -> _Module:
    """Give another object that is the module in all it holds; what one of them becomes the other stays.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> same_module(layer).weight is layer.weight
        True
    """
    twin: _Module = object.__new__(type(module))
    twin.__dict__ = module.__dict__
    return twin


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another one where it stands, so that every way to it leads to what it is now.

    A replacement in ``_modules`` alone is missed by all that a model keeps besides: a list, a dict, a partial, a bound
    method, a closure. Both objects hold the same from now on.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> order = [layer]
        >>> become(layer, nn.Identity())
        >>> order
        [Identity()]
    """
    if module is other:
        return
    inside = [(part, name) for part in other.modules() for name, child in part._modules.items() if child is module]
    if inside:
        # What wraps the module goes on holding what the module was.
        twin = same_module(module)
        for part, name in inside:
            part._modules[name] = twin
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


class _Detaching(TorchFunctionMode):
    """Copy tensors that hang on a graph as tensors without one, which torch itself refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _with_own_closure(function: types.FunctionType) -> types.FunctionType:
    """The same function with empty cells of its own."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells or None
    )
    made.__qualname__ = function.__qualname__
    return made


def _culprit(model: nn.Module) -> str:
    """The first attribute that does not let itself be copied."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            memo = {id(item): item for item in _tensors_and_modules(model)}
            try:
                copy.deepcopy(value, memo)
            except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError):
                where = f"layer {name} ({type(module).__name__})" if name else type(module).__name__
                return (
                    f"attribute {attribute!r} of {where} is a {type(value).__name__} that copy.deepcopy does not take; remove it, or "
                    "give its class a __deepcopy__"
                )
    return f"copy.deepcopy does not take this {type(model).__name__}"


def _tensors_and_modules(model: nn.Module) -> Iterable[torch.Tensor | nn.Module]:
    yield from model.modules()
    yield from model.parameters()
    yield from model.buffers()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
