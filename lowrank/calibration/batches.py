"""Calibration data: batches of any shape, how the model is called with them, and their samples cut into parts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.modes import evaluating
from lowrank.errors import CalibrationError

__all__ = ["Batch", "Split", "evaluating", "fresh", "model_tensor", "prepare_batches", "sample_count", "split_batches"]

# Fewer verification samples than this leave a 95 % test nothing to stand on (the t quantile at 1 degree of freedom is 6.3).
MIN_VERIFICATION_SAMPLES = 4


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args, kwargs: what the model is called with.
        size: number of samples; 1 where dimension 0 does not count samples.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1

    @property
    def mask(self) -> Tensor | None:
        """(samples, positions) bool: False where the position is padding."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @property
    def token_ids(self) -> Tensor | None:
        """(samples, positions) integer ids, where the model reads such."""
        candidate = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        if isinstance(candidate, Tensor) and candidate.ndim == 2 and not candidate.is_floating_point():
            return candidate
        return None

    def run(self, model: nn.Module) -> Any:
        """Call the model with copies of the inputs, which its forward may change in place."""
        copies: dict[int, Any] = {}
        args = [fresh(value, copies) for value in self.args]
        return model(*args, **{key: fresh(value, copies) for key, value in self.kwargs.items()})

    def select(self, indices: Tensor) -> Batch:
        """Give the batch of these samples."""
        if self.size == 1:
            return self

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
                return value[indices.to(value.device)]
            return value

        return self._mapped(pick, len(indices))

    def widened(self) -> Batch:
        """Floating tensors in float32."""
        return self._mapped(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, self.size)

    def to(self, device: torch.device) -> Batch:
        """Give the batch on another device."""
        return self._mapped(lambda x: x.to(device) if isinstance(x, Tensor) else x, self.size)

    def _mapped(self, fn: Callable[[Any], Any], size: int) -> Batch:
        return Batch(tuple(map(fn, self.args)), {key: fn(value) for key, value in self.kwargs.items()}, size)


@dataclass(frozen=True)
class Split:
    """Three parts that share no sample.

    Attributes:
        ways: 3 where all parts come from one set of samples; 2 where verification has data of its own, or none.
    """

    statistics: list[Batch]
    search: list[Batch]
    verification: list[Batch]
    ways: int = 3


def fresh(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Copy an input: tensors by value, containers with what they hold, other objects (a cache of keys) as ``copy.deepcopy`` does.

    Args:
        copies: by the id of the original: what is given twice is one copy.

    Example:
        >>> x = torch.zeros(2)
        >>> fresh({"x": [x]})["x"][0].add_(1.0), x
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    copies = {} if copies is None else copies
    if value is None or isinstance(value, (str, bytes, int, float, complex, nn.Module)) or callable(value):
        return value
    if id(value) not in copies:
        if isinstance(value, Tensor):
            copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        elif type(value) in (list, tuple, dict):
            items = value.values() if isinstance(value, dict) else value
            held = [fresh(item, copies) for item in items]
            copies[id(value)] = dict(zip(value, held, strict=True)) if isinstance(value, dict) else type(value)(held)
        else:
            try:
                copies[id(value)] = copy.deepcopy(value, copies)
            except (TypeError, RuntimeError, NotImplementedError):
                # An object that cannot be copied (it holds a lock, say) goes to the model as it is.
                copies[id(value)] = value
    return copies[id(value)]


def model_tensor(output: Any) -> Tensor:
    """Give the tensor that an output is judged by: ``logits``, else ``last_hidden_state``, else the first floating tensor.

    Raises:
        CalibrationError: the output holds no floating tensor.

    Example:
        >>> model_tensor({"loss": None, "logits": torch.ones(2)})
        tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list, Mapping)) and value:
            return model_tensor(value)
    raise CalibrationError(
        f"the model's output of type {type(output).__name__} holds no tensor to measure; pass output_fn=lambda output: <tensor>"
    )


def prepare_batches(model: nn.Module, data: Iterable[Any], name: str = "calibration") -> list[Batch]:
    """Read the data once and say how the model is called with each batch.

    A tensor or tuple is positional, a dict is keyword arguments; of a pair from a ``DataLoader``, or a pair that the model's forward
    cannot take, only the first (the inputs) is used; ``labels`` in a dict are left out where the forward does not take them.
    Tensors are moved to the model's device when they run.

    Raises:
        CalibrationError: no batch, a batch of another type, an iterator that failed, token ids outside the vocabulary.

    Example:
        >>> batches = prepare_batches(nn.Sequential(nn.Linear(3, 2)), [torch.zeros(4, 3), (torch.zeros(5, 3), torch.zeros(5))])
        >>> [batch.size for batch in batches]
        [4, 5]
    """
    if isinstance(data, (Tensor, str, Mapping)):
        raise CalibrationError(
            f"{name}: must be an iterable of batches, got a single {type(data).__name__}; wrap it in a list"
        )
    from_loader = isinstance(data, torch.utils.data.DataLoader)
    batches: list[Batch] = []
    try:
        for item in data:
            batches.append(_batch(model, item, from_loader, f"{name}: batch {len(batches)}"))
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{name}: reading batch {len(batches)} failed with {type(error).__name__}: {error}"
        ) from error
    if not any(batch.size for batch in batches):
        raise CalibrationError(f"{name}: is empty; at least {4 * MIN_VERIFICATION_SAMPLES} samples are needed")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return _whole_where_needed(model, [batch.to(device) for batch in batches if batch.size], name)


def _batch(model: nn.Module, item: Any, from_loader: bool, name: str) -> Batch:
    if isinstance(item, Batch):
        return item
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    if pair and (from_loader or not _takes_two(model)):
        item = item[0]
    kwargs: Mapping[str, Any] = {}
    args: tuple[Any, ...] = ()
    if isinstance(item, Tensor):
        args = (item,)
    elif isinstance(item, Mapping):
        if not all(isinstance(key, str) for key in item):
            raise CalibrationError(f"{name}: the keys of a dict are the model's argument names, got {list(item)[:3]!r}")
        kwargs = _without_labels(model, item)
    elif isinstance(item, (tuple, list)):
        args = tuple(item)
    else:
        raise CalibrationError(f"{name}: must be a tensor, a tuple or a dict, got {type(item).__name__}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise CalibrationError(f"{name}: holds no tensor")
    size = tensors[0].shape[0] if tensors[0].ndim else 1
    return Batch(args, kwargs, size)


def _without_labels(model: nn.Module, item: Mapping[str, Any]) -> dict[str, Any]:
    """Less ``labels`` where the forward would refuse them."""
    if "labels" not in item:
        return dict(item)
    kinds = {name: parameter.kind for name, parameter in inspect.signature(model.forward).parameters.items()}
    if "labels" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values():
        return dict(item)
    return {name: value for name, value in item.items() if name != "labels"}


def _takes_two(model: nn.Module) -> bool:
    if isinstance(model, nn.Sequential):
        return False
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _whole_where_needed(model: nn.Module, batches: list[Batch], name: str) -> list[Batch]:
    """Make a batch one sample where the output's dimension 0 is not the input's; the first batch stands for all."""
    first = batches[0]
    _check_ids(model, batches, name)
    with evaluating(model):
        try:
            output = model_tensor(first.run(model))
        except IndexError as error:
            raise CalibrationError(
                f"{name}: the model refused batch 0 ({error}); is a token id outside the vocabulary?"
            ) from error
        except (TypeError, RuntimeError, ValueError, KeyError) as error:
            raise CalibrationError(f"{name}: the model refused batch 0 with {type(error).__name__}: {error}") from error
    if output.ndim == 0 or output.shape[0] != first.size:
        return [Batch(batch.args, batch.kwargs, 1) for batch in batches]
    return batches


def _check_ids(model: nn.Module, batches: Sequence[Batch], name: str) -> None:
    """Refuse token ids outside the vocabulary of a model in transformers' manner, which says what its input embedding is."""
    find = getattr(model, "get_input_embeddings", None)
    limit = getattr(find(), "num_embeddings", None) if callable(find) else None
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


def sample_count(batches: Sequence[Batch]) -> int:
    """Count the number of samples in all batches."""
    return sum(batch.size for batch in batches)


def split_batches(
    batches: Sequence[Batch], validation: Sequence[Batch] | None, seed: int, *, verify: bool = True
) -> Split:
    """Shuffle the samples with the seed and cut them in three: statistics (half), search and verification (a quarter each).

    With validation batches those are the verification part, and the calibration samples are cut two to one. Samples stay in batches
    of the shape they came in. Without ``verify`` (a callable metric, whose own value counts) nothing is set aside.

    Raises:
        CalibrationError: too few samples.

    Example:
        >>> parts = split_batches([Batch((torch.zeros(16, 1),), size=16)], None, seed=0)
        >>> [sample_count(part) for part in (parts.statistics, parts.search, parts.verification)]
        [8, 4, 4]
    """
    total = sample_count(batches)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if not verify:
        verification, search = 0, max(total // 3, 1)
        if total < 2:
            raise CalibrationError(f"calibration: at least 2 samples (index of dimension 0) are needed, got {total}")
    elif validation is None:
        verification = total // 4
        search = total // 4
        if verification < MIN_VERIFICATION_SAMPLES:
            raise CalibrationError(
                f"calibration: {total} samples (index of dimension 0) leave {verification} for verification; at least "
                f"{4 * MIN_VERIFICATION_SAMPLES} samples are needed, or pass validation batches"
            )
    else:
        verification = 0
        search = max(total // 3, 1)
        if total < 2 or sample_count(validation) < MIN_VERIFICATION_SAMPLES:
            raise CalibrationError(
                f"calibration needs at least 2 samples and validation {MIN_VERIFICATION_SAMPLES}, "
                f"got {total} and {sample_count(validation)}"
            )
    part = torch.zeros(total, dtype=torch.int64)
    part[order[:verification]] = 2
    part[order[verification : verification + search]] = 1
    parts: tuple[list[Batch], ...] = ([], [], [])
    start = 0
    for batch in batches:
        own = part[start : start + batch.size]
        start += batch.size
        for index in range(3):
            chosen = torch.nonzero(own == index).flatten()
            if len(chosen):
                parts[index].append(batch.select(chosen))
    if validation is None and verify:
        return Split(parts[0], parts[1], parts[2])
    return Split(parts[0], parts[1], list(validation or ()), ways=2)
