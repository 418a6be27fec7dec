"""What is seen of the tensors that flow into a module, and of the gradients that flow back to its outputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.numerics.convolutions import ConvGeometry, patches, sample_patches
from lowrank.numerics.moments import InputStatistics, TokenCounts

__all__ = ["AnyObserver", "LookupObserver", "Observer", "PatchObserver", "TokenObserver", "observer_of"]

# Patches of a convolution that go into its moments. Neighbouring patches overlap, so more add little; at least so many for each
# feature keep the moment of a wide layer well above its noise. Heuristics both.
PATCHES_PER_LAYER = 2**14
PATCHES_PER_FEATURE = 8
_Statistics = TypeVar("_Statistics", InputStatistics, TokenCounts)


class Observer(Generic[_Statistics]):
    """Say which rows of an input meet the weight, and add them to statistics; a layer kind has one for its modules.

    Attributes:
        shared: whether modules that are handed the same tensor (and have the same :attr:`key`) may share one statistic.
        key: what beside the tensor the rows depend on.
    """

    shared: bool = True
    key: Hashable = None

    def begin(self, name: str, seed: int, samples: int) -> None:
        """Start anew.

        Args:
            name: of the module; what one draws does not depend on which others there are.
            seed: of what is drawn.
            samples: that will come, in all batches together.
        """

    def empty(self, value: Tensor) -> _Statistics:
        """Make the statistics that inputs like this one are added to."""
        raise NotImplementedError

    def add(self, statistics: _Statistics, value: Tensor, batch: Batch, name: str = "") -> None:
        """Add the rows of an input, without padding.

        Args:
            name: of the module, which says on which of two sequences it works.
        """
        raise NotImplementedError

    def gradient_rows(self, gradient: Tensor, batch: Batch, name: str = "") -> Tensor:
        """Give the gradients at the module's outputs as rows (positions, out), without padding."""
        mask = batch.kept(gradient.shape, name) if gradient.ndim >= 3 else None
        return gradient.reshape(-1, gradient.shape[-1]) if mask is None else gradient[mask.to(gradient.device)]


class TokenObserver(Observer[InputStatistics]):
    """See each position of the last dimension as one row."""

    def empty(self, value: Tensor) -> InputStatistics:
        """Make moments of the last dimension's features."""
        return InputStatistics(value.shape[-1], device=value.device)

    def add(self, statistics: InputStatistics, value: Tensor, batch: Batch, name: str = "") -> None:
        """Add every position."""
        statistics.update(_kept(value, batch, name))


class LookupObserver(Observer[TokenCounts]):
    """Count which rows of a table are looked up."""

    shared = False

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def empty(self, value: Tensor) -> TokenCounts:
        """Make counts of the table's rows."""
        return TokenCounts(self.rows, device=value.device)

    def add(self, statistics: TokenCounts, value: Tensor, batch: Batch, name: str = "") -> None:
        """Count the ids."""
        statistics.update(_kept(value[..., None], batch, name))


class PatchObserver(Observer[InputStatistics]):
    """See each patch under a convolution's kernel as one row, or an even share of those it is allowed, drawn at random."""

    def __init__(self, geometry: ConvGeometry) -> None:
        self.geometry = geometry
        self.key = geometry
        self.samples = 1
        self._generator = torch.Generator()

    def begin(self, name: str, seed: int, samples: int) -> None:
        """Start a generator of the layer's own."""
        self.samples = samples
        self._generator.manual_seed((seed ^ zlib.crc32(name.encode())) & (2**63 - 1))

    def empty(self, value: Tensor) -> InputStatistics:
        """Make moments of the patches' features, block by block where there are groups."""
        return InputStatistics(self._features(value), device=value.device, blocks=self.geometry.groups)

    def _features(self, value: Tensor) -> int:
        channels = value.shape[-self.geometry.dims - 1]
        return int(channels * math.prod(self.geometry.kernel_size))

    def add(self, statistics: InputStatistics, value: Tensor, batch: Batch, name: str = "") -> None:
        """Add at most ``PATCHES_PER_LAYER`` patches (or 8 a feature) over all batches."""
        geometry, generator, dims = self.geometry, self._generator, self.geometry.dims
        allowed = max(PATCHES_PER_LAYER, PATCHES_PER_FEATURE * self._features(value) // geometry.groups)
        limit = max(allowed * batch.size // self.samples, 1)
        positions = geometry.output_size(value.shape[-dims:])
        images = value.shape[0] if value.ndim == dims + 2 else 1
        offered = images * math.prod(positions)
        mask = batch.kept((images, *positions), name) if value.ndim == 3 else None
        if mask is not None:
            # A convolution along a text: what lies on padding is left out.
            rows = patches(value, geometry)[mask.to(value.device)]
            offered = rows.shape[0]
            if offered > limit:
                rows = rows[torch.randperm(offered, generator=generator)[:limit].to(rows.device)]
        else:
            rows = sample_patches(value, geometry, limit, generator) if offered > limit else patches(value, geometry)
        statistics.update(rows, offered)

    def gradient_rows(self, gradient: Tensor, batch: Batch, name: str = "") -> Tensor:
        """Give one row a position: channels stand second in a convolution's output."""
        return super().gradient_rows(gradient.movedim(1, -1), batch, name)


def _kept(value: Tensor, batch: Batch, name: str) -> Tensor:
    """The tokens that are not padding."""
    mask = batch.kept(value.shape, name) if value.ndim >= 3 else None
    return value if mask is None else value[mask.to(value.device)]


AnyObserver = Observer[InputStatistics] | Observer[TokenCounts]


def observer_of(module: nn.Module) -> AnyObserver:
    """Find the observer that fits a dense layer of torch's, or a layer that has taken the place of one.

    Example:
        >>> type(observer_of(nn.Conv1d(2, 2, 3))).__name__, type(observer_of(nn.Linear(2, 2))).__name__
        ('PatchObserver', 'TokenObserver')
    """
    if isinstance(module, nn.Embedding):
        return LookupObserver(module.num_embeddings)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return PatchObserver(ConvGeometry.of(module))
    return TokenObserver()
