"""What flows into each layer while calibration data runs, by hooks inside a context manager that restores everything."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.batches import Batch, evaluating, prepare_batches, sample_count
from lowrank.errors import NumericsError
from lowrank.numerics.convolutions import ConvGeometry, patches, sample_patches
from lowrank.numerics.moments import InputStatistics, TokenCounts

__all__ = ["PATCHES_PER_LAYER", "collect_statistics", "first_nonfinite", "no_fast_path"]

# Patches of a convolution that go into its moments. Neighbouring patches overlap, so more add little; at least so many for each
# feature keep the moment of a wide layer well above its noise. Heuristics both.
PATCHES_PER_LAYER = 2**14
PATCHES_PER_FEATURE = 8


class _SharingChanged(Exception):
    """Two modules that shared an input in one batch did not in another."""


class _NonFinite(Exception):
    """NaN or Inf flows into a layer."""


class _Collector:
    """Hooks that accumulate what flows into modules; modules that are handed the same tensor share one statistic."""

    def __init__(self, modules: Mapping[str, nn.Module], share: bool, samples: int, seed: int) -> None:
        self.modules = modules
        self.share = share
        self.samples = samples
        # A generator for each layer, so that what one draws does not depend on which others there are.
        self.generators = {
            name: torch.Generator().manual_seed((seed ^ zlib.crc32(name.encode())) & (2**63 - 1))
            for name, module in modules.items()
            if isinstance(module, (nn.Conv1d, nn.Conv2d))
        }
        self.statistics: dict[str, InputStatistics | TokenCounts] = {}
        self.leaders: dict[str, str] = {}
        self.mask: Tensor | None = None
        self.batch_size = 1
        self._seen: dict[tuple[object, ...], tuple[str, Tensor]] = {}

    def new_batch(self, batch: Batch) -> None:
        self.mask, self.batch_size = batch.mask, batch.size
        self._seen = {}

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            if isinstance(module, nn.Embedding):
                counts = self.statistics.setdefault(name, TokenCounts(module.num_embeddings, device=value.device))
                counts.update(self._kept(value[..., None]))
                return
            # The version tells apart two uses of one tensor with an in-place change between them.
            geometry = ConvGeometry.of(module) if name in self.generators else None
            leader = name
            # In inference mode nothing tells, so nothing is shared.
            if self.share and not value.is_inference():
                leader = self._seen.setdefault((id(value), value._version, geometry), (name, value))[0]
            known = self.leaders.setdefault(name, leader)
            if known != leader:
                raise _SharingChanged
            if leader != name:
                return
            if not bool(torch.isfinite(value).all()):
                raise _NonFinite(name)
            if geometry is not None:
                self._add_patches(leader, value, geometry)
                return
            if leader not in self.statistics:
                self.statistics[leader] = InputStatistics(value.shape[-1], device=value.device)
            statistics = self.statistics[leader]
            assert isinstance(statistics, InputStatistics)
            statistics.update(self._kept(value))

        return record

    def _add_patches(self, name: str, value: Tensor, geometry: ConvGeometry) -> None:
        """Add the patches under the kernel, or an even share of those the layer is allowed, drawn at random."""
        generator, dims = self.generators[name], geometry.dims
        channels = value.shape[-dims - 1]
        features = channels * math.prod(geometry.kernel_size)
        if name not in self.statistics:
            self.statistics[name] = InputStatistics(features, device=value.device, blocks=geometry.groups)
        statistics = self.statistics[name]
        assert isinstance(statistics, InputStatistics)
        allowed = max(PATCHES_PER_LAYER, PATCHES_PER_FEATURE * features // geometry.groups)
        limit = max(allowed * self.batch_size // self.samples, 1)
        positions = geometry.output_size(value.shape[-dims:])
        images = value.shape[0] if value.ndim == dims + 2 else 1
        offered = images * math.prod(positions)
        mask = self.mask
        if mask is not None and value.ndim == 3 and (images, *positions) == mask.shape:
            # A convolution along a text: what lies on padding is left out.
            rows = patches(value, geometry)[mask.to(value.device)]
            offered = rows.shape[0]
            if offered > limit:
                rows = rows[torch.randperm(offered, generator=generator)[:limit].to(rows.device)]
        else:
            rows = sample_patches(value, geometry, limit, generator) if offered > limit else patches(value, geometry)
        statistics.update(rows, offered)

    def _kept(self, value: Tensor) -> Tensor:
        """The tokens that are not padding."""
        mask = self.mask
        if mask is not None and value.ndim >= 3 and value.shape[:2] == mask.shape:
            return value[mask.to(value.device)]
        return value


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
    progress: bool = False,
    seed: int = 0,
) -> dict[str, InputStatistics | TokenCounts]:
    """Run the batches and gather, for each module named, the moments of its inputs (or the look-ups of an embedding).

    For a convolution the moments are those of the patches under its kernel, of at most ``PATCHES_PER_LAYER`` (or 8 a feature) of them,
    drawn with the seed. Padding (by ``attention_mask``) is left out. Modules that share an input (convolutions: and a geometry) share
    one object. Hooks and modes are restored whatever happens. A module that no input reached is absent from the result.

    Raises:
        NumericsError: NaN or Inf flows into a layer; names the first.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> collect_statistics(model, [torch.ones(4, 3)], {"0": model[0]})
        {'0': InputStatistics(n_features=3, count=4)}
    """
    listed = list(batches)
    if not all(isinstance(batch, Batch) for batch in listed):
        listed = prepare_batches(model, listed)
    try:
        return _collect(model, listed, targets, share=True, progress=progress, seed=seed)
    except _SharingChanged:
        return _collect(model, listed, targets, share=False, progress=progress, seed=seed)


def _collect(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    *,
    share: bool,
    progress: bool,
    seed: int,
) -> dict[str, InputStatistics | TokenCounts]:
    collector = _Collector(targets, share, max(sample_count(batches), 1), seed)
    culprit: Batch | None = None
    seen_by = ""
    with contextlib.ExitStack() as stack:
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
    """The name of the first module without children whose output is not finite, or None.

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
