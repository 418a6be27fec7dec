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
from lowrank.numerics.sampled_moments import rows_to_keep

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


class _Draw:
    """What a layer draws out of its rows: by its own name and the seed, an even share of each batch."""

    def __init__(self, name: str = "", seed: int = 0, samples: int = 1) -> None:
        self.samples = samples
        self.generator = torch.Generator()
        self.generator.manual_seed((seed ^ zlib.crc32(name.encode())) & (2**63 - 1))

    def share(self, allowed: int, batch: Batch) -> int:
        return max(allowed * batch.size // self.samples, 1)

    def some(self, rows: Tensor, limit: int) -> Tensor:
        if rows.shape[0] <= limit:
            return rows
        return rows[torch.randperm(rows.shape[0], generator=self.generator)[:limit].to(rows.device)]


class TokenObserver(Observer[InputStatistics]):
    """See each position of the last dimension as one row; of very wide ones an even share of those that it keeps.

    Args:
        rows: to keep in place of their moment, see :func:`lowrank.numerics.sampled_moments.rows_to_keep`.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.key = rows
        self._draw = _Draw()

    def begin(self, name: str, seed: int, samples: int) -> None:
        """Start a generator of the layer's own."""
        self._draw = _Draw(name, seed, samples)

    def empty(self, value: Tensor) -> InputStatistics:
        """Make moments of the last dimension's features."""
        return InputStatistics(value.shape[-1], device=value.device, sampled=self.rows is not None)

    def add(self, statistics: InputStatistics, value: Tensor, batch: Batch, name: str = "") -> None:
        """Add every position, or as many as are to be kept of them."""
        tokens = _kept(value, batch, name)
        if self.rows is None:
            statistics.update(tokens)
            return
        tokens = tokens.reshape(-1, tokens.shape[-1])
        statistics.update(self._draw.some(tokens, self._draw.share(self.rows, batch)), tokens.shape[0])


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
    """See each patch under a convolution's kernel as one row, or an even share of those it is allowed, drawn at random.

    Args:
        geometry: of the convolution.
        rows: as of :class:`TokenObserver`.
    """

    def __init__(self, geometry: ConvGeometry, rows: int | None = None) -> None:
        self.geometry = geometry
        self.rows = rows
        self.key = (geometry, rows)
        self._draw = _Draw()

    def begin(self, name: str, seed: int, samples: int) -> None:
        """Start a generator of the layer's own."""
        self._draw = _Draw(name, seed, samples)

    def empty(self, value: Tensor) -> InputStatistics:
        """Make moments of the patches' features, block by block where there are groups."""
        groups, sampled = self.geometry.groups, self.rows is not None
        return InputStatistics(self._features(value), device=value.device, blocks=groups, sampled=sampled)

    def _features(self, value: Tensor) -> int:
        channels = value.shape[-self.geometry.dims - 1]
        return int(channels * math.prod(self.geometry.kernel_size))

    def add(self, statistics: InputStatistics, value: Tensor, batch: Batch, name: str = "") -> None:
        """Add at most ``PATCHES_PER_LAYER`` patches (or 8 a feature, or as many as are kept) over all batches."""
        geometry, generator, dims = self.geometry, self._draw.generator, self.geometry.dims
        allowed = max(PATCHES_PER_LAYER, PATCHES_PER_FEATURE * self._features(value) // geometry.groups)
        limit = self._draw.share(allowed if self.rows is None else self.rows, batch)
        positions = geometry.output_size(value.shape[-dims:])
        images = value.shape[0] if value.ndim == dims + 2 else 1
        offered = images * math.prod(positions)
        mask = batch.kept((images, *positions), name) if value.ndim == 3 else None
        if mask is not None:
            # A convolution along a text: what lies on padding is left out.
            rows = patches(value, geometry)[mask.to(value.device)]
            offered = rows.shape[0]
            rows = self._draw.some(rows, limit)
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
    weight = getattr(module, "weight", None)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        rows = rows_to_keep(module.in_channels * math.prod(module.kernel_size), module.out_channels, module.groups)
        return PatchObserver(ConvGeometry.of(module), rows)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        # transformers' Conv1D has no such attributes; its weight is (in, out).
        inputs = getattr(module, "in_features", weight.shape[0])
        return TokenObserver(rows_to_keep(inputs, weight.numel() // max(inputs, 1)))
    return TokenObserver()
