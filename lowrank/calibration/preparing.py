"""From a user's data to batches: how the model is called, what a sample is, and which samples are the same."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import (
    MIN_VERIFICATION_SAMPLES,
    Batch,
    Batches,
    ForwardFn,
    evaluating,
    sample_count,
)
from lowrank.calibration.binding import Call, calls_of, items_of, signature_of
from lowrank.calibration.outputs import OutputFn, measured_tensors
from lowrank.errors import CalibrationError, UsageError

__all__ = ["input_embedding", "prepare_batches", "sample_digests", "without_shared"]

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
ENOUGH = 4 * MIN_VERIFICATION_SAMPLES


def prepare_batches(
    model: nn.Module,
    data: Iterable[Any],
    name: str = "calibration",
    *,
    output_fn: OutputFn | None = None,
    forward_fn: ForwardFn | None = None,
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

    Raises:
        CalibrationError: no batch, a batch that the model refuses, an iterator that failed, token ids outside the vocabulary.

    Example:
        >>> batches = prepare_batches(nn.Sequential(nn.Linear(3, 2)), [torch.rand(4, 3), (torch.rand(5, 3), torch.zeros(5))])
        >>> [batch.size for batch in batches]
        [4, 5]
    """
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
    listed = [batch.to(device) for batch in listed if batch.size]
    if not listed:
        raise CalibrationError(f"{name}: is empty; at least {ENOUGH} samples are needed")
    _check_ids(model, listed, name)
    listed, told = _whole_where_needed(model, listed, name, output_fn)
    notes += told
    distinct, warnings = _distinct(listed, name)
    return Batches(distinct, notes, warnings)


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
            raise CalibrationError(f"{where}: must be a tensor, a tuple or a dict, got {type(item).__name__} ({item[:40]!r})")
        if all(value is None or isinstance(value, (str, bytes, int, float)) for value in values):
            raise CalibrationError(f"{where}: holds no tensor, got {_described(item)}")
        batches.append(batch)
    return batches, left_out


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
        if isinstance(value, (list, tuple)) and value and not any(_holds_tensors(item) for item in value):
            return Batch(batch.args, batch.kwargs, len(value), batch.names, batch.forward_fn)
    tensors = _leaves(values)
    size = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    return Batch(batch.args, batch.kwargs, size, batch.names, batch.forward_fn)


def _holds_tensors(value: Any) -> bool:
    return bool(_leaves([value]))


def _leaves(value: Any) -> list[Tensor]:
    """Tensors in lists, tuples and dicts, but not in objects, which the model takes as they are."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _leaves(item)]
    return []


def _whole_where_needed(
    model: nn.Module, batches: list[Batch], name: str, output_fn: OutputFn | None
) -> tuple[list[Batch], list[str]]:
    """Make a batch one sample where dimension 0 does not count samples, and say so; one batch stands for all."""
    first = next((batch for batch in batches if batch.size > 1), batches[0])
    whole = [batch.whole() for batch in batches]
    reference = _outputs(model, first, name, output_fn)
    if first.size < 2:
        return whole, []
    indices = torch.arange(first.size - 1, -1, -2)
    reason = ""
    try:
        part = _outputs(model, first.select(indices), name, output_fn)
    except CalibrationError as error:
        reason = f"it refuses a part of a batch ({str(error.__cause__ or error).splitlines()[0][:80]})"
    else:
        reason = _difference(reference, part, indices, first.size)
    if not reason:
        return batches, []
    again = _outputs(model, first, name, output_fn)
    if any(not torch.equal(again[path], tensor) for path, tensor in reference.items() if path in again):
        # Nothing can be told of a model that draws random numbers; its shapes must do.
        if all(tensor.ndim and len(tensor) == first.size for tensor in reference.values()):
            return batches, [f"{name}: the model's output differs from call to call on one batch; errors include that"]
        return whole, [f"{name}: each batch is one sample; the model's output differs from call to call on one batch"]
    return whole, [f"{name}: each batch is taken as one sample, since dimension 0 does not count samples: {reason}"]


def _difference(reference: dict[str, Tensor], part: dict[str, Tensor], indices: Tensor, size: int) -> str:
    """Why f(x[i]) is not f(x)[i], to rounding; "" where it is."""
    for path, tensor in reference.items():
        other = part.get(path)
        if other is None or not tensor.ndim or len(tensor) != size or other.shape != (len(indices), *tensor.shape[1:]):
            if other is not None and other.shape == tensor.shape and torch.equal(other, tensor):
                continue
            shape = None if other is None else tuple(other.shape)
            return f"{_called(path)} has shape {tuple(tensor.shape)} for {size} indices and {shape} for {len(indices)}"
        wanted, got = tensor[indices.to(tensor.device)].double(), other.double()
        scale = float(wanted.norm())
        # Half the digits: other batch sizes sum in another order, through however many layers.
        if not float((wanted - got).norm()) <= torch.finfo(tensor.dtype).eps ** 0.5 * max(scale, 1e-30):
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


def sample_digests(batch: Batch) -> list[bytes]:
    """Compute a digest of each sample: of what the model reads of it, less the padding.

    Example:
        >>> a, b, c = sample_digests(Batch((torch.tensor([[1.0], [2.0], [1.0]]),), size=3))
        >>> a == c, a == b
        (True, False)
    """
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(batch.size)]
    for value in (*batch.args, *(batch.kwargs[key] for key in sorted(batch.kwargs))):
        _digest(value, batch, hashes)
    return [each.digest() for each in hashes]


def _digest(value: Any, batch: Batch, hashes: Sequence[Any]) -> None:
    if isinstance(value, Tensor):
        kept = batch.kept(value.shape) if value.ndim >= 2 else None
        if batch.size > 1 and value.ndim and value.shape[0] == batch.size:
            for index, each in enumerate(hashes):
                row = value[index] if kept is None or kept.shape[0] != batch.size else value[index][kept[index]]
                each.update(_bytes(row))
            return
        for each in hashes:
            each.update(_bytes(value))
    elif isinstance(value, (list, tuple, dict)):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        if batch.size > 1 and len(items) == batch.size and not any(map(_holds_tensors, items)):
            for item, each in zip(items, hashes, strict=True):
                each.update(_object_bytes(item))
            return
        for item in items:
            _digest(item, batch, hashes)
    elif value is not None:
        for each in hashes:
            each.update(_object_bytes(value))


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return str(tuple(plain.shape)).encode() + plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _object_bytes(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, NotImplementedError):
        # Nothing can be said of what it holds; it is taken for different from all others.
        return str(id(value)).encode()


def _distinct(batches: list[Batch], name: str) -> tuple[list[Batch], list[str]]:
    """The batches without repeated samples, as long as enough others remain; and what to say of it."""
    seen: set[bytes] = set()
    kept: list[Batch] = []
    for batch in batches:
        fresh = []
        for index, digest in enumerate(sample_digests(batch)):
            if digest not in seen:
                seen.add(digest)
                fresh.append(index)
        if len(fresh) == batch.size:
            kept.append(batch)
        elif fresh:
            kept.append(batch.select(torch.tensor(fresh)))
    total, warnings = sample_count(batches), []
    if all(
        not bool(tensor.any()) for batch in batches for tensor in batch.tensors if tensor.is_floating_point()
    ) and any(tensor.is_floating_point() for batch in batches for tensor in batch.tensors):
        warnings.append(f"{name}: every input is zero throughout; nothing is learnt of other inputs")
    if len(seen) == total:
        return batches, warnings
    if len(seen) >= ENOUGH:
        return kept, [*warnings, f"{name}: of {total:,} samples {len(seen):,} are distinct; each counts once"]
    few = "all samples are the same sample" if len(seen) == 1 else f"only {len(seen)} are distinct"
    return batches, [
        *warnings,
        f"{name}: of {total:,} samples {few}: the error holds for those and proves nothing for others; "
        f"at least {ENOUGH} distinct samples are needed",
    ]


def without_shared(checks: Batches, batches: Sequence[Batch]) -> Batches:
    """Take out of validation batches the samples that are among the calibration samples too.

    Raises:
        CalibrationError: fewer than 4 remain.

    Example:
        >>> own, other = (Batches([Batch((torch.arange(k, k + 8.0)[:, None],), size=8)]) for k in (0, 4))
        >>> sample_count(without_shared(other, own))
        4
    """
    known = {digest for batch in batches for digest in sample_digests(batch)}
    total, kept = sample_count(checks), []
    for batch in checks:
        fresh = [index for index, digest in enumerate(sample_digests(batch)) if digest not in known]
        if len(fresh) == batch.size:
            kept.append(batch)
        elif fresh:
            kept.append(batch.select(torch.tensor(fresh)))
    left = sample_count(kept)
    if left == total:
        return checks
    if left < MIN_VERIFICATION_SAMPLES:
        raise CalibrationError(
            f"validation: {total - left:,} of {total:,} samples are calibration samples too, so that what chooses would also verify; leave "
            "validation out (a quarter of the calibration samples is then set aside) or pass other samples"
        )
    note = f"validation: {total - left:,} of {total:,} samples are calibration samples too and are left out of the verification"
    return Batches(kept, checks.notes, [*checks.warnings, note])
