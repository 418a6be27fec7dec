"""What a model reaches by other ways than its registered children: containers, partials, methods, closures, weak references."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_opaque", "other_ways", "reachable", "redirect", "slots_of"]

# Shared by everything that runs, not held by one model.
_OUTSIDE = (type, types.ModuleType, types.CodeType, types.FrameType, types.BuiltinFunctionType, types.GeneratorType)
_TABLES = ("_parameters", "_buffers", "_modules")
_EMPTY = object()


def is_opaque(value: object) -> bool:
    """Tell whether nothing is looked for inside: numbers, text, types, tensors, whatever holds no other objects."""
    return isinstance(value, (Tensor, *_OUTSIDE)) or not (gc.is_tracked(value) or isinstance(value, weakref.ref))


def slots_of(value: object) -> list[str]:
    """Name the filled ``__slots__`` of an object, of all its classes."""
    names: list[str] = []
    for kind in type(value).__mro__:
        declared = vars(kind).get("__slots__", ())
        names += [declared] if isinstance(declared, str) else list(declared)
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _EMPTY


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, each with what to write behind the object's own name."""
    if isinstance(value, types.FunctionType):
        yield from ((f"'s closure ({name})", _cell(cell)) for name, cell in _closure(value))
        yield from (
            ("'s default", item) for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        )
        yield from ((f".{name}", item) for name, item in vars(value).items())
        return
    if isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
        return
    if isinstance(value, weakref.ref):
        yield "()", value()
        return
    if isinstance(value, types.CellType):
        yield "", _cell(value)
        return
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r}]" if isinstance(key, (str, int)) else "[…]", item
            yield "'s key", key
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset, deque)) or not (hasattr(value, "__dict__") or slots_of(value)):
        yield from (("'s item", item) for item in gc.get_referents(value))
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    for name, item in list(attributes.items()):
        if isinstance(value, nn.Module) and name in _TABLES and isinstance(item, dict):
            yield from ((f".{key}", held) for key, held in item.items())
        else:
            yield f".{name}", item
    yield from ((f".{name}", getattr(value, name)) for name in slots_of(value))


def _closure(function: types.FunctionType) -> list[tuple[str, types.CellType]]:
    return list(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def reachable(root: object, name: str = "model") -> Iterator[tuple[str, object]]:
    """Give everything that an object holds, each once, with the way to it; what is registered first.

    Types, Python modules and what functions see as globals belong to everyone and are not followed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.order = [model[0]]
        >>> hidden = nn.Linear(2, 2)
        >>> model.more = {"kept": hidden}
        >>> [path for path, found in reachable(model) if found is hidden]
        ["model.more['kept']"]
    """
    seen: set[int] = set()
    # Keeps alive what was made on the way, so that no other object gets its id.
    kept: list[object] = []
    later: list[tuple[str, object]] = [(name, root)]
    while later:
        path, value = later.pop()
        if id(value) in seen or value is _EMPTY:
            continue
        seen.add(id(value))
        kept.append(value)
        yield path, value
        if not is_opaque(value):
            # A proxy shows itself as what it stands for, and raises where that is gone.
            parts = [(path + label, part) for label, part in _parts(value) if type(part) not in weakref.ProxyTypes]
            # The last is looked at first.
            later += sorted(parts, key=lambda part: isinstance(part[1], nn.Module))


def other_ways(model: nn.Module, wanted: object) -> list[str]:
    """Name the places, other than registered children, parameters and buffers, in which a model holds an object.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.order = [model[0]]
        >>> other_ways(model, model[0])
        ['model.order[0]']
    """
    found: list[str] = []
    for path, value in reachable(model):
        if is_opaque(value):
            continue
        registered = [vars(value).get(table, {}) for table in _TABLES] if isinstance(value, nn.Module) else []
        own = {id(table) for table in registered}
        if id(value) in own:
            continue
        for label, part in _parts(value):
            if part is wanted and not any(table.get(label[1:]) is wanted for table in registered):
                found.append(path + label)
    # Tables of children are dicts of their own.
    return [path for path in found if not any(f".{table}[" in path for table in _TABLES)]


def redirect(root: object, exchanged: Mapping[int, Any]) -> None:
    """Put other objects in the place of some, wherever the root holds them; what cannot be changed in place is made anew.

    Args:
        exchanged: by the id of what is to go; the caller keeps those objects alive.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.pair = (model[0], [model[0]])
        >>> redirect(model, {id(model[0]): "other"})
        >>> model.pair
        ('other', ['other'])
    """
    made: dict[int, tuple[Any, Any]] = {}

    def new(value: Any) -> Any:
        if id(value) in exchanged:
            return exchanged[id(value)]
        if type(value) in weakref.ProxyTypes:
            return value
        if id(value) in made:
            return made[id(value)][1]
        result = value
        if isinstance(value, tuple) or type(value) is frozenset:
            items = [new(item) for item in value]
            if any(one is not other for one, other in zip(items, value, strict=True)):
                result = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        elif isinstance(value, types.MethodType):
            parts = new(value.__func__), new(value.__self__)
            if parts[0] is not value.__func__ or parts[1] is not value.__self__:
                result = types.MethodType(*parts)
        elif isinstance(value, functools.partial):
            function, arguments = new(value.func), new(value.args)
            if function is not value.func or arguments is not value.args:
                result = type(value)(function, *arguments, **value.keywords)
        else:
            return value
        made[id(value)] = value, result
        return result

    for _, value in list(reachable(root)):
        if is_opaque(value):
            continue
        if isinstance(value, dict):
            _redirect_dict(value, new)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if new(item) is not item:
                    value[index] = new(item)
        elif isinstance(value, set):
            going = [item for item in value if new(item) is not item]
            value.difference_update(going)
            value.update(new(item) for item in going)
        elif isinstance(value, types.FunctionType):
            for _, cell in _closure(value):
                if _cell(cell) is not _EMPTY and new(cell.cell_contents) is not cell.cell_contents:
                    cell.cell_contents = new(cell.cell_contents)
        if hasattr(value, "__dict__") and not isinstance(value, types.FunctionType):
            _redirect_dict(vars(value), new)
        for name in slots_of(value):
            item = getattr(value, name)
            if new(item) is not item:
                object.__setattr__(value, name, new(item))


def _redirect_dict(table: dict[Any, Any], new: Any) -> None:
    if any(new(key) is not key for key in table):
        items = [(new(key), new(item)) for key, item in table.items()]
        table.clear()
        table.update(items)
        return
    for key, item in table.items():
        if new(item) is not item:
            table[key] = new(item)


def owned(model: nn.Module) -> set[int]:
    """Give the ids of a model's modules, parameters and buffers.

    Example:
        >>> len(owned(nn.Sequential(nn.Linear(2, 2))))
        4
    """
    found: list[nn.Module | torch.Tensor] = [*model.modules(), *model.parameters(), *model.buffers()]
    return {id(item) for item in found}
