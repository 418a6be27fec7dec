"""What flows into each layer while calibration data runs, by hooks inside a context manager that restores everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.batches import Batch, ForwardFn, evaluating, sample_count
from lowrank.calibration.observers import AnyObserver, observer_of
from lowrank.calibration.preparing import prepare_batches, told
from lowrank.calibration.untouched import untouched
from lowrank.errors import NumericsError
from lowrank.numerics.moments import InputStatistics, TokenCounts

__all__ = ["collect_statistics", "first_nonfinite", "no_fast_path"]


class _SharingChanged(Exception):
    """Two modules that shared an input in one batch did not in another."""


class _NonFinite(Exception):
    """NaN or Inf flows into a layer."""


class _Collector:
    """Hooks that accumulate what flows into modules; modules that are handed the same tensor share one statistic."""

    def __init__(self, observers: Mapping[str, AnyObserver], share: bool) -> None:
        self.observers = observers
        self.share = share
        self.statistics: dict[str, InputStatistics | TokenCounts] = {}
        self.leaders: dict[str, str] = {}
        self.batch: Batch | None = None
        self._seen: dict[tuple[object, ...], tuple[str, Tensor]] = {}

    def new_batch(self, batch: Batch) -> None:
        self.batch = batch
        self._seen = {}

    def hook(self, name: str) -> Any:
        observer: Any = self.observers[name]

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            if observer.shared and not self._leads(name, observer.key, value):
                return
            if name not in self.statistics:
                self.statistics[name] = observer.empty(value)
            observer.add(self.statistics[name], value, self.batch, name)

        return record

    def _leads(self, name: str, key: object, value: Tensor) -> bool:
        """Whether this module adds the tensor; another one that was handed it before does so for both."""
        leader = name
        # The version tells apart two uses of one tensor with an in-place change between them. In inference mode nothing tells, so
        # nothing is shared.
        if self.share and not value.is_inference():
            leader = self._seen.setdefault((id(value), value._version, key), (name, value))[0]
        known = self.leaders.setdefault(name, leader)
        if known != leader:
            raise _SharingChanged
        if leader == name and not bool(torch.isfinite(value).all()):
            raise _NonFinite(name)
        return leader == name


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Within it torch's transformer encoders call their layers, with padded tensors, instead of reading their weights.

    Example:
        >>> with no_fast_path():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def collect_statistics(
    model: nn.Module,
    batches: Sequence[Batch] | Iterable[Any],
    targets: Mapping[str, nn.Module],
    *,
    observers: Mapping[str, AnyObserver] | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
    seed: int = 0,
) -> dict[str, InputStatistics | TokenCounts]:
    """Run the batches and gather, for each module named, the moments of its inputs (or the look-ups of an embedding).

    For a convolution the moments are those of the patches under its kernel, of at most 16,384 (or 8 a feature) of them,
    drawn with the seed. Padding (by ``attention_mask``) is left out. Modules that share an input (convolutions: and a geometry) share
    one object. Hooks and modes are restored whatever happens. A module that no input reached is absent from the result.

    Args:
        model: runs the batches.
        batches: as for :func:`lowrank.compress_model`.
        targets: modules by name.
        forward_fn: ``forward_fn(model, batch) -> output`` calls a model that takes objects.
        observers: of the modules, by name; else the ones that fit torch's layers (:func:`lowrank.calibration.observers.observer_of`).
        progress: a bar on standard error.
        seed: of the patches drawn.

    Raises:
        NumericsError: NaN or Inf flows into a layer; names the first.
        CalibrationError: data that cannot be used.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> collect_statistics(model, [torch.ones(4, 3)], {"0": model[0]})
        {'0': InputStatistics(n_features=3, count=4)}
    """
    if isinstance(batches, list) and batches and all(isinstance(batch, Batch) for batch in batches):
        listed = batches
    else:
        listed = told(prepare_batches(model, batches, forward_fn=forward_fn))
    found = {name: observer_of(module) for name, module in targets.items()} if observers is None else observers

    def collected(share: bool) -> dict[str, InputStatistics | TokenCounts]:
        for name in targets:
            found[name].begin(name, seed, max(sample_count(listed), 1))
        return _collect(model, listed, targets, _Collector(found, share), progress)

    try:
        return collected(share=True)
    except _SharingChanged:
        return collected(share=False)


def _collect(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    collector: _Collector,
    progress: bool,
) -> dict[str, InputStatistics | TokenCounts]:
    culprit: Batch | None = None
    seen_by = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(no_fast_path())
        for name, module in targets.items():
            handle = module.register_forward_pre_hook(collector.hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in tqdm(batches, desc="statistics", delay=2, disable=not progress):
            collector.new_batch(batch)
            try:
                batch.run(model)
            except _NonFinite as error:
                seen_by, culprit = str(error), batch
                break
    if culprit is not None:
        # Asked again only now that the hooks of this function are gone.
        name = first_nonfinite(model, culprit) or f"before {seen_by}"
        raise NumericsError(
            f"layer {name}: is the first to make NaN or Inf on the calibration data; repair its weights or take the sample out"
        )
    found = dict(collector.statistics)
    for name, leader in collector.leaders.items():
        if leader in collector.statistics:
            found[name] = collector.statistics[leader]
    return {name: found[name] for name in targets if name in found}


def first_nonfinite(model: nn.Module, batch: Batch) -> str | None:
    """Find the first module without children whose output is not finite, by name; ``None`` where there is none.

    Example:
        >>> bad = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = bad[0].weight.data.fill_(float("nan"))
        >>> first_nonfinite(bad, Batch((torch.ones(1, 2),)))
        '0'
    """
    found: list[str] = []

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Recurrent layers give their states too, and take packed sequences.
            output = output[0] if isinstance(output, tuple) else output
            if (
                not found
                and isinstance(output, Tensor)
                and output.is_floating_point()
                and not bool(torch.isfinite(output).all())
            ):
                found.append(name)

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(no_fast_path())
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(check(name)).remove)
        batch.run(model)
    return found[0] if found else None
