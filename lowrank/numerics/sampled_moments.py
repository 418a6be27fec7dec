"""Second moments of layers with very many inputs: kept as the rows they are made of, never multiplied out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moment", "SampledMoment", "rows_to_keep", "moment_squares", "times_moment"]

# Up to so many features (of a group) the whole moment is cheap: 32 MB and, for 16,384 patches, two seconds of one core.
NARROW = 2048
# Beyond this no whole moment is made of a layer with fewer outputs than inputs. A fixed number and not the memory that happens to be
# free: the same input has to give the same bytes on every machine.
MOMENT_BYTES = 1 << 30
# Rows that are kept of a wide layer: W X^T of so many columns leave the outputs' moment well conditioned.
ROWS_PER_OUTPUT = 8
LEAST_ROWS = 1024
# Of rows in float32, where the layer's own weight is not larger still.
ROW_BYTES = 1 << 29
_CHUNK = 1 << 24


def rows_to_keep(features: int, outputs: int, blocks: int = 1) -> int | None:
    """Say how many rows of its inputs are to be kept of a layer in place of their second moment; ``None`` where that is made whole.

    Factors need only ``W Σ Wᵀ``, the moment of the outputs, and errors ``tr(ΔW Σ ΔWᵀ)``. With the rows of X drawn at random both follow
    from ``W Xᵀ``, without the (features, features) matrix Σ, and both are unbiased. So the number of rows follows the outputs, and Σ is
    left out where it would be twice as large as they are, or over 1 GiB.

    Args:
        features: of all groups.
        outputs: of all groups.
        blocks: groups that never meet.

    Example:
        >>> rows_to_keep(768, 3072), rows_to_keep(8192, 16), rows_to_keep(65536, 128)
        (None, 1024, 1024)
    """
    width, height = features // blocks, outputs // blocks
    whole = 8 * blocks * width * width
    wanted = max(LEAST_ROWS, ROWS_PER_OUTPUT * height)
    if whole <= MOMENT_BYTES and (width <= NARROW or 2 * wanted > width):
        return None
    if height >= width > NARROW:
        # Σ is then at most twice as large as the float32 weight itself.
        return None
    return max(min(wanted, max(ROW_BYTES // 4, features * height) // features), 1)


@dataclass(frozen=True)
class SampledMoment:
    """``Σ = XᵀX / count + ridge · I``, as the rows X.

    Attributes:
        rows: (count, features), or (blocks, count, features of a block) whose blocks never meet; any floating dtype.
        mean: what is taken off each row first, (features) or (blocks, 1, features of a block); ``None`` for the uncentred moment.
        ridge: absolute.

    Example:
        >>> moment = SampledMoment(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([2.0, 0.0]).double(), 0.5)
        >>> moment.times(torch.eye(2)).tolist(), moment.between(torch.eye(2)).tolist()
        ([[1.5, 0.0], [0.0, 0.5]], [[1.5, 0.0], [0.0, 0.5]])
    """

    rows: Tensor
    mean: Tensor | None = None
    ridge: float = 0.0

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.shape[-2]

    def to(self, device: torch.device) -> SampledMoment:
        """Give the same on a device."""
        mean = None if self.mean is None else self.mean.to(device)
        return SampledMoment(self.rows.to(device), mean, self.ridge)

    def seen(self, matrix: Tensor) -> Tensor:
        """Compute ``matrix · Xᵀ``, (…, count) float64: the layer's outputs on the rows."""
        matrix = matrix.to(torch.float64)
        parts = [matrix @ part.transpose(-1, -2) for part in self.parts()]
        return torch.cat(parts, dim=-1)

    def times(self, matrix: Tensor) -> Tensor:
        """Compute ``matrix · Σ``, of the matrix's shape, float64."""
        matrix = matrix.to(torch.float64)
        product = self.ridge * matrix
        for part in self.parts():
            product = product + (matrix @ part.transpose(-1, -2)) @ part / self.count
        return product

    def squares(self, matrix: Tensor) -> Tensor:
        """Compute the diagonal of ``matrix · Σ · matrixᵀ``, (…, rows of the matrix) float64."""
        matrix = matrix.to(torch.float64)
        return self.seen(matrix).square().sum(dim=-1) / self.count + self.ridge * matrix.square().sum(dim=-1)

    def between(self, matrix: Tensor) -> Tensor:
        """Compute ``matrix · Σ · matrixᵀ``, float64."""
        matrix = matrix.to(torch.float64)
        seen = self.seen(matrix)
        return seen @ seen.transpose(-1, -2) / self.count + self.ridge * (matrix @ matrix.transpose(-1, -2))

    def parts(self) -> Iterator[Tensor]:
        """The rows, a few at a time, as float64 and centred."""
        blocks = self.rows.shape[0] if self.rows.ndim == 3 else 1
        for part in self.rows.split(max(_CHUNK // (self.rows.shape[-1] * blocks), 1), dim=-2):
            yield part.to(torch.float64) if self.mean is None else part.to(torch.float64) - self.mean


Moment = Tensor | SampledMoment


def times_moment(matrix: Tensor, moment: Moment) -> Tensor:
    """Compute ``matrix · Σ`` of either form of a moment, block by block where there are blocks; float64."""
    return moment.times(matrix) if isinstance(moment, SampledMoment) else matrix.to(torch.float64) @ moment


def moment_squares(matrix: Tensor, moment: Moment) -> Tensor:
    """Compute the diagonal of ``matrix · Σ · matrixᵀ`` of either form of a moment; float64."""
    if isinstance(moment, SampledMoment):
        return moment.squares(matrix)
    matrix = matrix.to(torch.float64)
    return ((matrix @ moment) * matrix).sum(dim=-1)
