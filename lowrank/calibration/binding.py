"""How a model is called with what a user's data holds: arrays, pairs of a loader, nested inputs, objects."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.errors import CalibrationError

__all__ = ["Call", "Form", "calls_of", "items_of", "signature_of"]

# Samples a call where the data is one array.
ROWS_A_BATCH = 32
MANY = 10**6


@dataclass(frozen=True)
class Form:
    """What a model's forward takes by position.

    Attributes:
        names: of the positional parameters.
        required: how many of them have no default.
        most: how many values it takes at most.
        keywords: the names that it takes as keywords; ``None`` where it takes any.
    """

    names: tuple[str, ...]
    required: int
    most: int
    keywords: frozenset[str] | None


@dataclass(frozen=True)
class Call:
    """One way to call a model with an item.

    Attributes:
        left_out: what of the item is not passed, in words; "" where all is.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    left_out: str = ""


def signature_of(model: nn.Module) -> Form:
    """Read what a model's forward takes.

    Example:
        >>> signature_of(nn.Bilinear(2, 2, 2)).required
        2
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        # Written in C++: it says nothing of what it takes.
        return Form((), 1, MANY, None)
    kinds = inspect.Parameter
    positional = [each for each in parameters if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    open_ended = any(each.kind is kinds.VAR_POSITIONAL for each in parameters)
    named = frozenset(
        each.name for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    )
    return Form(
        tuple(each.name for each in positional),
        sum(each.default is kinds.empty for each in positional),
        MANY if open_ended else len(positional),
        None if any(each.kind is kinds.VAR_KEYWORD for each in parameters) else named,
    )


def items_of(data: Any, name: str) -> Iterable[Any]:
    """Give the items of calibration data; one tensor or array, or a dict of them, is cut along dimension 0.

    Raises:
        CalibrationError: it is no such thing and cannot be iterated over.

    Example:
        >>> [len(item) for item in items_of(torch.zeros(40, 3), "calibration")]
        [32, 8]
    """
    if isinstance(data, (Tensor, np.ndarray)):
        if not data.ndim:
            raise CalibrationError(f"{name}: is a single number; samples stand along dimension 0 of a tensor")
        return [data[start : start + ROWS_A_BATCH] for start in range(0, len(data), ROWS_A_BATCH)]
    if isinstance(data, Mapping):
        arrays = {key: value for key, value in data.items() if isinstance(value, (Tensor, np.ndarray))}
        lengths = {len(value) for value in arrays.values() if value.ndim}
        if len(arrays) != len(data) or len(lengths) != 1 or not all(value.ndim for value in arrays.values()):
            raise CalibrationError(
                f"{name}: a dict must hold tensors or arrays of one length, named like the model's inputs, got "
                f"{', '.join(f'{key!r}: {type(value).__name__}' for key, value in list(data.items())[:3])}; "
                "a list of dicts is a list of batches"
            )
        return _rows(arrays, lengths.pop())
    if isinstance(data, (str, bytes)) or not hasattr(data, "__iter__"):
        raise CalibrationError(
            f"{name}: must be an iterable of batches, one tensor or one array, got a {type(data).__name__}"
        )
    found: Iterable[Any] = data
    return found


def _rows(arrays: Mapping[str, Any], length: int) -> Iterator[dict[str, Any]]:
    for start in range(0, length, ROWS_A_BATCH):
        yield {key: value[start : start + ROWS_A_BATCH] for key, value in arrays.items()}


def calls_of(form: Form, item: Any, dtype: torch.dtype, name: str, *, from_loader: bool) -> list[Call]:
    """List the ways in which a model may be meant to be called with an item, the likeliest first.

    Args:
        form: of the model's forward.
        item: of the data: a tensor or array, a tuple or list, a dict, or any object that the model takes.
        dtype: of the model's weights, which arrays of NumPy's default take.
        name: of the item, for messages.
        from_loader: it comes from a ``DataLoader``, whose second value is most often a label.

    Raises:
        CalibrationError: a dict whose keys are no names.

    Example:
        >>> pair, form = (torch.zeros(4, 2), torch.zeros(4)), signature_of(nn.Linear(2, 2))
        >>> call = calls_of(form, pair, torch.float32, "batch 0", from_loader=True)[0]
        >>> len(call.args), call.left_out
        (1, 'the second of 2 values')
    """
    item = _as_tensors(item, dtype)
    if isinstance(item, Mapping):
        return _keyword_calls(form, item, name)
    if not isinstance(item, (tuple, list)):
        return [Call((item,), names=form.names)]
    whole = Call((item,), names=form.names)
    if isinstance(item, list) and not any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in item):
        # A list of objects, graphs say, is what one argument takes.
        return [whole, *([Call(tuple(item), names=form.names)] if len(item) <= form.most else [])]
    keep = len(item)
    if from_loader and len(item) > 1:
        keep = min(max(form.required, 1), len(item))
    elif len(item) > form.most:
        keep = max(form.required, 1)
    mask = _mask_beside_ids(form, item) if from_loader and keep == 1 else None
    if mask is not None:
        return [Call((item[0],), {mask: item[1]}, form.names)]
    calls = [Call(tuple(item[:keep]), names=form.names, left_out=_left_out(len(item), keep))]
    if len(item) > 1 and isinstance(item[0], (Mapping, list, tuple)):
        # Inputs that are a dict or a tuple themselves, and labels.
        nested = calls_of(form, item[0], dtype, name, from_loader=False)
        nested = [replace(call, left_out=call.left_out or _left_out(len(item), 1)) for call in nested]
        calls = [*nested, *calls] if keep == 1 else [*calls, *nested]
    if keep < len(item) <= form.most:
        calls.append(Call(tuple(item), names=form.names))
    if isinstance(item, list) and not from_loader and keep < len(item) and _alike(item):
        # Images of several sizes, say. A model that does not take lists says so.
        return [whole, *calls]
    if isinstance(item, list) or hasattr(item, "_fields"):
        calls.append(whole)
    return calls


def _alike(values: Sequence[Any]) -> bool:
    """Whether all are tensors of one dtype and number of dimensions, which inputs and labels seldom are."""
    return (
        all(isinstance(value, Tensor) for value in values) and len({(value.dtype, value.ndim) for value in values}) == 1
    )


def _mask_beside_ids(form: Form, item: Sequence[Any]) -> str | None:
    """The mask's name where a loader gives token ids and beside them what can only be their mask: ones on one side, zeros on the other."""
    if len(item) < 2 or len(form.names) < 2 or form.names[1] != "attention_mask":
        return None
    ids, mask = item[0], item[1]
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.is_floating_point() or ids.ndim != 2:
        return None
    if mask.shape != ids.shape or not mask.numel() or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    steps = mask.to(torch.int8).diff(dim=1)
    sided = bool((steps <= 0).all()) or bool((steps >= 0).all())
    return form.names[1] if sided and bool(mask.any(dim=1).all()) else None


def _left_out(count: int, keep: int) -> str:
    if keep == count:
        return ""
    words = {1: "second", 2: "third", 3: "fourth"}
    which = f"the {words[keep]}" if count == keep + 1 and keep in words else f"the last {count - keep}"
    return f"{which} of {count} values"


def _keyword_calls(form: Form, item: Mapping[Any, Any], name: str) -> list[Call]:
    whole = Call((dict(item),), names=form.names)
    if not all(isinstance(key, str) for key in item):
        if form.most >= 1 and form.required <= 1 and form.keywords is not None:
            return [whole]
        raise CalibrationError(f"{name}: the keys of a dict are the model's argument names, got {list(item)[:3]!r}")
    kwargs = dict(item)
    left_out = ""
    if "labels" in kwargs and form.keywords is not None and "labels" not in form.keywords:
        del kwargs["labels"]
        left_out = "'labels', which the model does not take"
    calls = [Call(kwargs=kwargs, left_out=left_out)]
    if form.keywords is not None and form.required <= 1 <= form.most:
        if not any(key in form.keywords for key in kwargs):
            return [whole, *calls]
        calls.append(whole)
    return calls


def _as_tensors(value: Any, dtype: torch.dtype) -> Any:
    """The same with arrays as tensors; float64, which NumPy makes unasked, in the model's own type."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        tensor = torch.from_numpy(np.ascontiguousarray(value) if value.flags.writeable else value.copy())
        return tensor.to(dtype) if tensor.dtype == torch.float64 else tensor
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _as_tensors(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_as_tensors(item, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_as_tensors(item, dtype) for item in value)
    return value
