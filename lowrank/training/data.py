"""Training data: batches with labels, their order over the epochs, and each process's share of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.calibration.batches import Batch, ForwardFn
from lowrank.errors import CalibrationError

__all__ = [
    "Example",
    "TrainingData",
    "derived_seed",
    "examples_fingerprint",
    "language_model_batches",
    "read_examples",
    "seeded_numbers",
]

# What transformers' losses leave out.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A batch and what the model should say to it.

    Attributes:
        batch: how the model is called; holds ``labels`` itself where the model computes its own loss.
        labels: of a pair (inputs, labels), or the dict's ``labels``.
        own_loss: the model is to compute the loss from the labels it is passed.
    """

    batch: Batch
    labels: Any = None
    own_loss: bool = False

    def share(self, rank: int, count: int) -> Example | None:
        """Take every ``count``-th sample from ``rank`` on; ``None`` where there is none."""
        if count == 1:
            return self
        if self.batch.size == 1:
            return self if rank == 0 else None
        mine = torch.arange(rank, self.batch.size, count)
        if not len(mine):
            return None

        def pick(tensor: Tensor) -> Tensor:
            whole = not tensor.ndim or tensor.shape[0] != self.batch.size
            return tensor if whole else tensor[mine.to(tensor.device)]

        return Example(self.batch.select(mine), _each_tensor(self.labels, pick), self.own_loss)

    def to(self, device: torch.device) -> Example:
        """Move the example to another device."""
        return Example(
            self.batch.to(device), _each_tensor(self.labels, lambda tensor: tensor.to(device)), self.own_loss
        )


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The labels with every tensor changed, also those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_tensor(entry, change) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_each_tensor(entry, change) for entry in value)
    return value


def read_example(item: Any, name: str, *, own_loss: bool, forward_fn: ForwardFn | None = None) -> Example:
    """Read one item of the data: a pair (inputs, labels), a dict that may hold ``labels``, or inputs alone.

    Args:
        item: inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments.
        name: for messages.
        own_loss: no loss function was given: a dict's labels go to the model, and something must have labels.
        forward_fn: calls the model with the inputs, whatever they are; a dict keeps its labels.

    Raises:
        CalibrationError: of another type, without a tensor, or without labels where they are needed.

    Example:
        >>> read_example((torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)), "train", own_loss=True).batch.size
        4
    """
    labels: Any = None
    inputs = item
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, labels = item
    kwargs: dict[str, Any] = {}
    args: tuple[Any, ...] = ()
    asks_model = False
    if forward_fn is not None:
        return _called_example(inputs, labels, name, own_loss, forward_fn)
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
        if labels is None and "labels" in kwargs:
            labels, asks_model = kwargs["labels"], own_loss
            if not own_loss:
                del kwargs["labels"]
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    elif isinstance(inputs, Tensor):
        args = (inputs,)
    else:
        raise CalibrationError(f"{name}: inputs must be a tensor, a tuple or a dict, got {type(inputs).__name__}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise CalibrationError(f"{name}: holds no tensor")
    _check_labels(labels, name, own_loss)
    size = tensors[0].shape[0] if tensors[0].ndim else 1
    if isinstance(labels, Tensor) and labels.ndim and size > 1 and labels.shape[0] != size:
        raise CalibrationError(f"{name}: {size} samples, but labels of shape {tuple(labels.shape)}")
    return Example(Batch(args, kwargs, size), labels, asks_model)


def _called_example(inputs: Any, labels: Any, name: str, own_loss: bool, forward_fn: ForwardFn) -> Example:
    """Inputs that only ``forward_fn`` knows how to pass; as many samples as there are labels."""
    asks_model = False
    if labels is None and isinstance(inputs, Mapping) and "labels" in inputs:
        labels, asks_model = inputs["labels"], own_loss
    _check_labels(labels, name, own_loss)
    size = len(labels) if isinstance(labels, Tensor) and labels.ndim else 1
    return Example(Batch((inputs,), {}, size, forward_fn=forward_fn), labels, asks_model)


def _check_labels(labels: Any, name: str, own_loss: bool) -> None:
    if own_loss and labels is None:
        raise CalibrationError(
            f"{name}: has no labels; give pairs (inputs, labels), a dict with labels for a model that computes its own loss, "
            "or loss_fn=lambda output, labels: <loss>"
        )


def read_examples(
    data: Iterable[Any], name: str, *, own_loss: bool, forward_fn: ForwardFn | None = None
) -> list[Example]:
    """Read all items of the data, once.

    Raises:
        CalibrationError: as :func:`read_example`, or no item.
    """
    _check_iterable(data, name)
    found = [
        read_example(item, f"{name}: batch {index}", own_loss=own_loss, forward_fn=forward_fn)
        for index, item in enumerate(data)
    ]
    if not found:
        raise CalibrationError(f"{name}: is empty; at least one batch is needed")
    return found


class TrainingData:
    """The batches in the order of each epoch, the same for the same seed wherever a run starts in them.

    A sequence of batches is shuffled every epoch. Anything else that can be read more than once (a ``DataLoader``) is
    read anew with the random numbers of the epoch, and shuffles itself; what can be read only once is kept.

    Args:
        data: batches, see :func:`read_example`.
        seed: of the order.
        own_loss, forward_fn: see :func:`read_example`.

    Raises:
        CalibrationError: not an iterable of batches, or empty.

    Example:
        >>> data = TrainingData([(torch.zeros(2, 3), torch.zeros(2)) for _ in range(5)], seed=0, own_loss=True)
        >>> len(data), [len(data.group(0, index, 2)) for index in range(3)]
        (5, [2, 2, 1])
    """

    def __init__(self, data: Iterable[Any], seed: int, *, own_loss: bool, forward_fn: ForwardFn | None = None) -> None:
        _check_iterable(data, "train")
        once = isinstance(data, Iterator) or not hasattr(data, "__len__")
        self.data: Iterable[Any] = list(data) if once else data
        self.seed = seed
        self.own_loss = own_loss
        self.forward_fn = forward_fn
        self._count = len(self.data)  # type: ignore[arg-type]
        if not self._count:
            raise CalibrationError("train: is empty; at least one batch is needed")
        self._items: Iterator[Any] = iter(())
        self._position: tuple[int, int] = (-1, 0)

    def __len__(self) -> int:
        return self._count

    def group(self, epoch: int, index: int, size: int) -> list[Example]:
        """Take the ``index``-th group of ``size`` batches of an epoch; the last may hold fewer."""
        start = index * size
        if self._position[0] != epoch or self._position[1] > start:
            self._items, self._position = self._epoch(epoch), (epoch, 0)
        found = []
        while self._position[1] < min(start + size, self._count):
            position = self._position[1]
            # Each batch has random numbers of its own, so that augmentation does not depend on where a run started.
            with seeded_numbers(derived_seed(self.seed, 1, epoch, position)):
                item = next(self._items, None)
            if item is None:
                raise CalibrationError(
                    f"train: says it has {self._count} batches, but epoch {epoch} ended at {position}"
                )
            self._position = (epoch, position + 1)
            if position >= start:
                found.append(self._example(item, f"train: batch {position}"))
        return found

    def look_through(self) -> Iterator[Example]:
        """Yield the batches as they were given, or those of epoch 0; every epoch is afterwards what it would have been."""
        if self._listed:
            for index, item in enumerate(self.data):
                yield self._example(item, f"train: batch {index}")
        else:
            for index in range(self._count):
                yield self.group(0, index, 1)[0]

    def fingerprint(self) -> str:
        """Compute the SHA-256 of all batches where they are a sequence; else of their number and the first one of epoch 0."""
        known = [self._example(item, "train") for item in self.data] if self._listed else None
        return f"{self._count}:{examples_fingerprint(known or self.group(0, 0, 1))}"

    def _example(self, item: Any, name: str) -> Example:
        return read_example(item, name, own_loss=self.own_loss, forward_fn=self.forward_fn)

    @property
    def _listed(self) -> bool:
        return isinstance(self.data, (list, tuple))

    def _epoch(self, epoch: int) -> Iterator[Any]:
        seed = derived_seed(self.seed, 0, epoch)
        if isinstance(self.data, Sequence):
            order = torch.randperm(self._count, generator=torch.Generator().manual_seed(seed)).tolist()
            return (self.data[index] for index in order)
        own = getattr(self.data, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(seed)
        with seeded_numbers(seed):
            return iter(self.data)


def examples_fingerprint(examples: Iterable[Example]) -> str:
    """Compute the SHA-256 of the tensors of the examples."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    for example in examples:
        if example.batch.forward_fn is not None:
            for tensor in example.batch.tensors:
                add(tensor)
        _each_tensor(example.batch.args, add)
        _each_tensor({key: example.batch.kwargs[key] for key in sorted(example.batch.kwargs)}, add)
        _each_tensor(example.labels, add)
    return digest.hexdigest()


class seeded_numbers:
    """The CPU's random numbers seeded within the block, and as they were after it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._before = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._before)


def derived_seed(seed: int, *parts: int) -> int:
    """Derive a seed that any change of the parts changes: 63 bits of their SHA-256.

    Example:
        >>> derived_seed(0, 1) != derived_seed(0, 2) != derived_seed(1, 2)
        True
    """
    text = ",".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def language_model_batches(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make training data of a causal language model out of tokenised text: labels are the ids, padding is left out.

    Args:
        batches: dicts of ``input_ids`` and maybe ``attention_mask``, (samples, positions).

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> language_model_batches([{"input_ids": ids, "attention_mask": mask}])[0]["labels"].tolist()
        [[5, 6, -100]]
    """
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, IGNORED)
        found.append({**batch, "labels": labels})
    return found


def _check_iterable(data: object, name: str) -> None:
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"{name}: must be an iterable of batches, got a single {type(data).__name__}; wrap it in a list"
        )
