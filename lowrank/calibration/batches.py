"""Calibration data: one call of the model, and the samples of many calls cut into parts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.masks import Mask, mask_of, masks_in
from lowrank.calibration.outputs import tensors_in
from lowrank.calibration.untouched import in_evaluation
from lowrank.errors import CalibrationError

__all__ = ["Batch", "Batches", "ForwardFn", "Split", "evaluating", "sample_count", "split_batches"]

# Fewer verification samples than this leave a 95 % test nothing to stand on (the t quantile at 1 degree of freedom is 6.3).
MIN_VERIFICATION_SAMPLES = 4
ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args, kwargs: what the model is called with; tensors may stand in lists, tuples and dicts.
        size: number of samples; 1 where dimension 0 does not count samples.
        names: of the model's parameters that ``args`` fill, as far as they are known.
        forward_fn: calls the model with the only one of ``args``, in the user's own way.
        writes: the model has a decoder, which reads the labels where it is given nothing else.
        group: of samples for which a promise is to hold by itself; "" where there are no groups.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1
    names: tuple[str, ...] = ()
    forward_fn: ForwardFn | None = None
    writes: bool = False
    group: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """What is known by name of the call; with a ``forward_fn`` the batch itself, where that is a dict."""
        if self.forward_fn is not None and self.args and isinstance(self.args[0], Mapping):
            return dict(self.args[0])
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Which positions are padding, for each sequence that has a mask."""
        return masks_in(self.arguments, writes=self.writes)

    @property
    def mask(self) -> Tensor | None:
        """(samples, positions) bool of the sequence that the output belongs to: False where the position is padding."""
        masks = self.masks
        return masks[-1].kept if masks else None

    def kept(self, shape: Sequence[int], name: str = "", *, side: str = "") -> Tensor | None:
        """Give the mask of a tensor of this shape; see :func:`lowrank.calibration.masks.mask_of`."""
        masks = self.masks
        return mask_of(masks, shape, name, side=side) if masks and len(shape) >= 2 else None

    @property
    def token_ids(self) -> Tensor | None:
        """(samples, positions) integer ids, where the model reads such."""
        candidate = self.arguments.get("input_ids", self.args[0] if self.args else None)
        if isinstance(candidate, Tensor) and candidate.ndim == 2 and not candidate.is_floating_point():
            return candidate
        return None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the call, however deep."""
        return list(tensors_in((self.args, dict(self.kwargs))))

    def run(self, model: nn.Module) -> Any:
        """Call the model, with copies of the tensors: a model that works in place leaves the batch as it is."""
        call = self._mapped(lambda value: value.clone() if isinstance(value, Tensor) else value, self.size)
        if self.forward_fn is not None:
            return self.forward_fn(model, call.args[0])
        return model(*call.args, **call.kwargs)

    def select(self, indices: Tensor) -> Batch:
        """Give the batch of these samples."""
        if self.size == 1:
            return self

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
                return value[indices.to(value.device)]
            return value

        return self._mapped(pick, len(indices), among=indices.tolist())

    def pieces(self, samples: int) -> Iterator[Batch]:
        """Give the batch in parts of at most so many samples."""
        for indices in torch.arange(self.size).split(samples):
            yield self.select(indices) if len(indices) < self.size else self

    def widened(self) -> Batch:
        """Floating tensors in float32."""
        return self._mapped(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, self.size)

    def to(self, device: torch.device) -> Batch:
        """Give the batch on another device."""
        return self._mapped(lambda x: x.to(device) if isinstance(x, Tensor) else x, self.size)

    def whole(self) -> Batch:
        """Give the batch as one sample."""
        return dataclasses.replace(self, size=1)

    def _mapped(self, fn: Callable[[Any], Any], size: int, *, among: list[int] | None = None) -> Batch:
        """The batch with every leaf mapped; of lists of as many objects as there are samples only these are kept."""

        def walk(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: walk(item) for key, item in value.items()} if type(value) is dict else value
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*map(walk, value))
            if type(value) in (list, tuple):
                if among is not None and len(value) == self.size and not any(map(_counts, value)):
                    value = type(value)(value[index] for index in among)
                return type(value)(map(walk, value))
            return fn(value)

        args = tuple(map(walk, self.args))
        return dataclasses.replace(
            self, args=args, kwargs={key: walk(item) for key, item in self.kwargs.items()}, size=size
        )


def _counts(value: Any) -> bool:
    """Whether a list's item counts samples itself, so that the list does not."""
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple, Mapping)) and any(True for _ in tensors_in(value))
    )


class Batches(list[Batch]):
    """Prepared batches, with what the reader should know of them.

    Attributes:
        notes: sentences for the report.
        warnings: the same, of what takes away from the promise.
    """

    def __init__(self, batches: Sequence[Batch] = (), notes: Sequence[str] = (), warnings: Sequence[str] = ()) -> None:
        super().__init__(batches)
        self.notes = list(notes)
        self.warnings = list(warnings)


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


def sample_count(batches: Sequence[Batch]) -> int:
    """Count the number of samples in all batches."""
    return sum(batch.size for batch in batches)


def split_batches(
    batches: Sequence[Batch], validation: Sequence[Batch] | None, seed: int, *, verify: bool = True
) -> Split:
    """Shuffle the samples with the seed and cut them in three: statistics (half), search and verification (a quarter each).

    With validation batches those are the verification part, and the calibration samples are cut two to one. Samples stay in batches
    of the shape they came in; each group of samples is cut by itself. Without ``verify`` (a callable metric, whose own value
    counts) nothing is set aside.

    Raises:
        CalibrationError: too few samples.

    Example:
        >>> parts = split_batches([Batch((torch.zeros(16, 1),), size=16)], None, seed=0)
        >>> [sample_count(part) for part in (parts.statistics, parts.search, parts.verification)]
        [8, 4, 4]
    """
    generator = torch.Generator().manual_seed(seed)
    part = torch.zeros(sample_count(batches), dtype=torch.int64)
    owners = [batch.group for batch in batches for _ in range(batch.size)]
    for group in dict.fromkeys(owners):
        places = torch.tensor([index for index, owner in enumerate(owners) if owner == group])
        where = f"calibration, group {group!r}" if group else "calibration"
        verification, search = _sizes(len(places), validation, where, verify=verify)
        order = places[torch.randperm(len(places), generator=generator)]
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


def _sizes(total: int, validation: Sequence[Batch] | None, where: str, *, verify: bool) -> tuple[int, int]:
    """Samples of so many for verification and for the search."""
    if not verify:
        if total < 2:
            raise CalibrationError(f"{where}: at least 2 samples (index of dimension 0) are needed, got {total}")
        return 0, max(total // 3, 1)
    if validation is None:
        if total // 4 < MIN_VERIFICATION_SAMPLES:
            raise CalibrationError(
                f"{where}: {total} samples (index of dimension 0) leave {total // 4} for verification; at least "
                f"{4 * MIN_VERIFICATION_SAMPLES} samples are needed, or pass validation batches"
            )
        return total // 4, total // 4
    if total < 2 or sample_count(validation) < MIN_VERIFICATION_SAMPLES:
        raise CalibrationError(
            f"{where} needs at least 2 samples and validation {MIN_VERIFICATION_SAMPLES}, "
            f"got {total} and {sample_count(validation)}"
        )
    return 0, max(total // 3, 1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards, by its own ``train``."""
    with in_evaluation(model), torch.no_grad():
        yield
