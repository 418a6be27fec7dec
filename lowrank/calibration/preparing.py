"""From a user's data to batches: how the model is called, what a sample is, and which samples are the same."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.calibration.batches import (
    MIN_VERIFICATION_SAMPLES,
    Batch,
    Batches,
    ForwardFn,
    evaluating,
)
from lowrank.calibration.binding import Call, calls_of, items_of, signature_of
from lowrank.calibration.outputs import OutputFn, measured_tensors
from lowrank.calibration.samples import ENOUGH, distinct, leaves
from lowrank.errors import CalibrationError, UsageError

__all__ = ["input_embedding", "prepare_batches", "told"]

log = logging.getLogger("lowrank")

# Units of rounding a layer that another batch size may make; seen up to 10, and what mixes samples changes outputs by thousands.
UNITS = 64.0
# Tensors of a batch that are looked at for samples.
MOST_INPUTS = 8
# What a model may raise that is called in a way it does not take.
_REFUSALS = (
    TypeError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


def prepare_batches(
    model: nn.Module,
    data: Iterable[Any],
    name: str = "calibration",
    *,
    output_fn: OutputFn | None = None,
    forward_fn: ForwardFn | None = None,
    repeats: bool = False,
) -> Batches:
    """Read the data once and say how the model is called with each batch.

    One tensor, one array, or a dict of them holds samples along dimension 0. Otherwise the data is an iterable of batches: a tensor or
    array, a tuple (positional arguments), a dict (keyword arguments), or whatever the model's one argument takes: nested lists and dicts of
    tensors, objects. Of a tuple that a ``DataLoader`` gives, or that is longer than the forward takes, what the forward requires is passed
    and a note says what is left out; ``labels`` in a dict are left out where the forward does not take them.

    Dimension 0 counts samples if on the first batch f(x[i]) equals f(x)[i] to rounding; else a batch is one sample, and a note says so.
    Repeated samples are taken once where at least 16 others remain. Tensors are moved to the model's device.

    Args:
        output_fn: picks the tensor to measure out of the model's output.
        forward_fn: ``forward_fn(model, batch)`` calls the model, where it takes what no rule above covers.
        repeats: keep repeated samples, where nothing is to be learnt of them.

    Raises:
        CalibrationError: no batch, a batch that the model refuses, an iterator that failed, token ids outside the vocabulary.

    Example:
        >>> batches = prepare_batches(nn.Sequential(nn.Linear(3, 2)), [torch.rand(4, 3), (torch.rand(5, 3), torch.zeros(5))])
        >>> [batch.size for batch in batches]
        [4, 5]
    """
    if isinstance(data, Batches):
        return data
    if not isinstance(data, (Tensor, np.ndarray)) or data.ndim < 2 or not len(data):
        return _prepared(model, data, name, output_fn, forward_fn, repeats)
    # Samples along dimension 0, also of a model that takes one at a time.
    ways = (data, list(data))
    refusals: list[CalibrationError] = []
    found: list[Batches] = []
    for way in ways:
        try:
            found.append(_prepared(model, way, name, output_fn, forward_fn, repeats))
        except CalibrationError as error:
            refusals.append(error)
            continue
        if way is data and all(batch.size > 1 for batch in found[0][:-1]) and found[0][0].size > 1:
            return found[0]
    if not found:
        raise refusals[0]
    return found[-1]


def told(batches: Batches) -> Batches:
    """Say on the logger "lowrank" what the reader should know of the batches, where no report will.

    Example:
        >>> told(Batches([Batch(())])) == [Batch(())]
        True
    """
    for text in (*batches.warnings, *batches.notes):
        log.warning("%s", text)
    return batches


def _prepared(
    model: nn.Module,
    data: Iterable[Any],
    name: str,
    output_fn: OutputFn | None,
    forward_fn: ForwardFn | None,
    repeats: bool,
) -> Batches:
    items = _read(data, name)
    if not items:
        raise CalibrationError(f"{name}: is empty; at least {ENOUGH} samples are needed")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.get_default_dtype())
    notes: list[str] = []
    if forward_fn is not None:
        listed = [_sized(item if isinstance(item, Batch) else Batch((item,), forward_fn=forward_fn)) for item in items]
    else:
        from_loader = isinstance(data, torch.utils.data.DataLoader)
        listed, left_out = _bound(model, items, dtype, name, from_loader=from_loader)
        if left_out:
            notes.append(
                f"{name}: {left_out} is taken for labels and not passed to the model; pass dicts of its arguments to hand over more"
                if "labels" not in left_out
                else f"{name}: {left_out}, is not passed"
            )
    writes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    listed = [dataclasses.replace(batch.to(device), writes=writes) for batch in listed if batch.size]
    if not listed:
        raise CalibrationError(f"{name}: is empty; at least {ENOUGH} samples are needed")
    _check_ids(model, listed, name)
    listed, told = _whole_where_needed(model, listed, name, output_fn)
    notes += told
    if repeats:
        return Batches(listed, notes)
    kept, warnings = distinct(listed, name, MIN_VERIFICATION_SAMPLES if name.startswith("validation") else ENOUGH)
    return Batches(kept, notes, warnings)


def _read(data: Iterable[Any], name: str) -> list[Any]:
    items: list[Any] = []
    try:
        for item in items_of(data, name):
            items.append(item)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{name}: reading batch {len(items)} failed with {type(error).__name__}: {error}"
        ) from error
    return items


def _bound(
    model: nn.Module, items: Sequence[Any], dtype: torch.dtype, name: str, *, from_loader: bool
) -> tuple[list[Batch], str]:
    """The batches, and what of the items is not passed; the first that the model takes decides between ways to call it."""
    form = signature_of(model)
    way = 0
    decided = False
    batches: list[Batch] = []
    left_out = ""
    for index, item in enumerate(items):
        if isinstance(item, Batch):
            batches.append(item)
            continue
        where = f"{name}: batch {index}"
        calls = calls_of(form, item, dtype, where, from_loader=from_loader)
        if not decided and len(calls) > 1:
            way = _first_taken(model, calls)
        decided = True
        call = calls[min(way, len(calls) - 1)]
        left_out = left_out or call.left_out
        batch = _sized(Batch(call.args, call.kwargs, names=call.names))
        values = (*call.args, *call.kwargs.values())
        if isinstance(item, (str, bytes)):
            raise CalibrationError(
                f"{where}: must be a tensor, a tuple or a dict, got {type(item).__name__} ({item[:40]!r})"
            )
        if all(map(_holds_nothing, values)):
            raise CalibrationError(f"{where}: holds no tensor, got {_described(item)}")
        batches.append(batch)
    return batches, left_out


def _holds_nothing(value: Any) -> bool:
    """Whether it is a plain number or text, or lists and dicts of such: nothing that a model runs on."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_holds_nothing, value))
    return value is None or isinstance(value, (bytes, int, float))


def _described(item: Any) -> str:
    return f"{type(item).__name__} ({str(item)[:40]!r})" if isinstance(item, (str, int, float)) else type(item).__name__


def _first_taken(model: nn.Module, calls: Sequence[Call]) -> int:
    """Which of the ways the model takes; the likeliest, whose refusal is then reported, where it takes none."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for index, call in enumerate(calls):
        try:
            with evaluating(model):
                Batch(call.args, call.kwargs).to(device).run(model)
        except _REFUSALS:
            continue
        return index
    return 0


def _sized(batch: Batch) -> Batch:
    """The batch with the number of samples that its first tensor, or its list of objects, seems to hold."""
    values = [*batch.args, *batch.kwargs.values()]
    for value in values:
        if isinstance(value, (list, tuple)) and value and not any(leaves(item) for item in value):
            return dataclasses.replace(batch, size=len(value))
    tensors = leaves(values)
    size = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    return dataclasses.replace(batch, size=size)


def _whole_where_needed(
    model: nn.Module, batches: list[Batch], name: str, output_fn: OutputFn | None
) -> tuple[list[Batch], list[str]]:
    """Make a batch one sample where dimension 0 does not count samples, and say so; one batch stands for all."""
    place = next((index for index, batch in enumerate(batches) if batch.size > 1), 0)
    whole = [batch.whole() for batch in batches]
    reference = _outputs(model, batches[place], name, output_fn)
    # Tables and states may stand before what holds the samples.
    counted = [batches, *(other for other in map(_recounted, [batches] * MOST_INPUTS, range(1, MOST_INPUTS)) if other)]
    reason, seen = "", set()
    for candidate in counted:
        first = candidate[place]
        if first.size < 2 or first.size in seen:
            continue
        seen.add(first.size)
        refusal = _refusal(model, first, reference, name, output_fn)
        if not refusal:
            return candidate, []
        reason = reason or refusal
    if not reason:
        return whole, []
    first = batches[place]
    again = _outputs(model, first, name, output_fn)
    if any(not torch.equal(again[path], tensor) for path, tensor in reference.items() if path in again):
        # Nothing can be told of a model that draws random numbers; its shapes must do.
        if all(tensor.ndim and len(tensor) == first.size for tensor in reference.values()):
            return batches, [f"{name}: the model's output differs from call to call on one batch; errors include that"]
        return whole, [f"{name}: each batch is one sample; the model's output differs from call to call on one batch"]
    return whole, [f"{name}: each batch is taken as one sample, since dimension 0 does not count samples: {reason}"]


def _recounted(batches: Sequence[Batch], index: int) -> list[Batch]:
    """The batches with as many samples as their ``index``-th tensor holds; none where one of them has no such tensor."""
    found = []
    for batch in batches:
        tensors = leaves([*batch.args, *batch.kwargs.values()])
        if index >= len(tensors) or not tensors[index].ndim or not len(tensors[index]):
            return []
        found.append(dataclasses.replace(batch, size=len(tensors[index])))
    return found


def _refusal(
    model: nn.Module, batch: Batch, reference: dict[str, Tensor], name: str, output_fn: OutputFn | None
) -> str:
    """Why dimension 0 of a batch does not count samples that the model treats one by one; "" where it does."""
    # In their order, for models that want the longest sequence first; and without the first, on which a state would be built.
    indices = torch.arange(1, batch.size, 2)
    if not any(tensor.ndim and len(tensor) == batch.size for tensor in reference.values()) and reference:
        shapes = ", ".join(f"{_called(path)} has shape {tuple(tensor.shape)}" for path, tensor in reference.items())
        return f"{shapes} for {batch.size} indices"
    try:
        part = _outputs(model, batch.select(indices), name, output_fn)
    except CalibrationError as error:
        return f"it refuses a part of a batch ({str(error.__cause__ or error).splitlines()[0][:80]})"
    depth = sum(1 for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return _difference(reference, part, indices, batch.size, depth)


def _difference(reference: dict[str, Tensor], part: dict[str, Tensor], indices: Tensor, size: int, depth: int) -> str:
    """Why f(x[i]) is not f(x)[i], to rounding; "" where it is."""
    for path, tensor in reference.items():
        other = part.get(path)
        if other is not None and tensor.ndim == other.ndim > 1 and tensor.shape[1:] != other.shape[1:]:
            # Sequences that the model unpads come out as long as the longest of them.
            cut = (slice(None), *(slice(length) for length in other.shape[1:]))
            tensor = tensor[cut]
        if other is None or not tensor.ndim or len(tensor) != size or other.shape != (len(indices), *tensor.shape[1:]):
            if other is not None and other.shape == tensor.shape and torch.equal(other, tensor):
                continue
            shape = None if other is None else tuple(other.shape)
            told = f"{_called(path)} has shape {tuple(tensor.shape)} for {size} indices and {shape} for {len(indices)}"
            return f"{told}; output_fn picks the output that counts" if len(reference) > 1 else told
        wanted, got = tensor[indices.to(tensor.device)].double(), other.double()
        scale = float(wanted.norm())
        # Other batch sizes sum in another order, which adds up over layers like a random walk; at most half the digits.
        eps = torch.finfo(tensor.dtype).eps
        allowed = min(UNITS * eps * math.sqrt(max(depth, 1)), eps**0.5)
        if not float((wanted - got).norm()) <= allowed * max(scale, 1e-30):
            return f"{_called(path)} at an index changes when other indices are left out"
    return ""


def _called(path: str) -> str:
    return "the output" if path == "output" else f"output {path}"


def _outputs(model: nn.Module, batch: Batch, name: str, output_fn: OutputFn | None) -> dict[str, Tensor]:
    with evaluating(model):
        try:
            output = batch.run(model)
        except IndexError as error:
            raise CalibrationError(
                f"{name}: the model refused batch 0 ({error}); is a token id outside the vocabulary?"
            ) from error
        except _REFUSALS as error:
            raise CalibrationError(
                f"{name}: the model refused batch 0 with {type(error).__name__}: {error}; forward_fn=lambda model, batch: … calls "
                "it in a way of your own"
            ) from error
    try:
        return {path: tensor.detach().clone() for path, tensor in measured_tensors(output, output_fn).items()}
    except UsageError:
        raise
    except CalibrationError:
        if output_fn is not None:
            raise
        return {}


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Give the input embedding of a model in transformers' manner; ``None`` where it has none, or more than one.

    Example:
        >>> input_embedding(nn.Linear(2, 2)) is None
        True
    """
    find = getattr(model, "get_input_embeddings", None)
    if not callable(find):
        return None
    try:
        found = find()
    except (NotImplementedError, AttributeError, KeyError, TypeError):
        # Models of images, sounds, or of two kinds of input have none of that name, and say so by raising.
        return None
    return found if isinstance(found, nn.Module) else None


def _check_ids(model: nn.Module, batches: Sequence[Batch], name: str) -> None:
    """Refuse token ids outside the vocabulary of a model in transformers' manner, which says what its input embedding is."""
    limit = getattr(input_embedding(model), "num_embeddings", None)
    if not isinstance(limit, int):
        return
    for index, batch in enumerate(batches):
        ids = batch.token_ids
        if ids is not None and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= limit:
                bad = high if high >= limit else low
                raise CalibrationError(
                    f"{name}: batch {index} holds token id {bad}; the vocabulary has ids 0 to {limit - 1}"
                )
