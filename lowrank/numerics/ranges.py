"""Which range a group of weights is rounded in: scale and zero point by squared error, before any code is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import NumericsError
from lowrank.numerics.grids import Grid, in_groups, spread

__all__ = ["fitted_ranges", "rounded_to", "storable"]

# Numbers worked on at a time, so that the passes of the search stay in the cache.
CHUNK = 1 << 17
# Shrunk ranges that are tried, as shares of the whole range: with few levels it pays to cut off the largest weights.
_LEAST_SHARE = {2: 0.3, 3: 0.35, 4: 0.5, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}
_SHARES = 12
# Least-squares scales for the codes that were found, and codes for these scales, so often.
_REFITS = 2


def fitted_ranges(
    weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose each group's scale, and zero where the grid has one, by the squared error of rounding to the nearest level.

    For each group, with importance h: the least ``Σ_k h_k (w_k − s (u_k − z))²`` over shrunk ranges (and, where there are few levels,
    neighbouring zeros and both signs), each followed by the scale that is best for the codes found, by least squares.

    Args:
        weight: (rows, columns), finite, float32 or float64.
        grid: the levels.
        dtype: of the scales, which are rounded to it.
        importance: (columns,) or (rows, columns), not negative; ``None`` weighs all alike.

    Returns:
        scale (rows, groups) of that dtype, never 0; zero (rows, groups) uint8, or ``None`` where the grid has none.

    Raises:
        NumericsError: weights too large for such a scale.

    Example:
        >>> fitted_ranges(torch.tensor([[-8.0, 7.0, 1.0]]), Grid(4), torch.float16)[0].tolist()
        [[1.0]]
    """
    rows, columns = weight.shape
    groups, span = grid.groups(columns), grid.span(columns)
    scale = weight.new_ones(rows, groups, dtype=torch.float64)
    zero = weight.new_zeros(rows, groups, dtype=torch.uint8) if grid.zero_point else None
    if not weight.numel():
        return scale.to(dtype), zero
    heavy = _importances(importance, weight, span)
    step = max(CHUNK // (groups * span), 1)
    for start in range(0, rows, step):
        chosen = slice(start, start + step)
        parts = in_groups(weight[chosen], span).flatten(0, 1)
        # Relative to the group's largest weight, so that squares neither overflow nor vanish in float32.
        largest = parts.abs().amax(dim=1, keepdim=True).to(torch.float64)
        unit = torch.where(largest > 0.0, largest, 1.0)
        parts = (parts / unit).to(torch.float32)
        part_heavy = None if heavy is None else heavy[chosen if heavy.shape[0] > 1 else slice(None)]
        if part_heavy is not None:
            part_heavy = part_heavy.expand(parts.shape[0] // groups, -1, -1).flatten(0, 1)
        found, at = _searched(parts, grid, part_heavy)
        found = torch.where(largest > 0.0, found.to(torch.float64) * unit, 1.0)
        scale[chosen] = found.view(-1, groups)
        if zero is not None:
            zero[chosen] = at.view(-1, groups).to(torch.uint8)
    return storable(scale, dtype), zero


def _importances(importance: Tensor | None, weight: Tensor, span: int) -> Tensor | None:
    """(1 or rows, groups, span) float32 with a mean of about 1 in each group; a group that nothing reaches weighs all alike."""
    if importance is None:
        return None
    grouped = in_groups(importance.to(torch.float64).view(-1, weight.shape[1]), span)
    mean = grouped.mean(dim=2, keepdim=True)
    return torch.where(mean > 0.0, grouped / torch.where(mean > 0.0, mean, 1.0), 1.0).to(torch.float32)


def _searched(parts: Tensor, grid: Grid, heavy: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n, span) with entries in [−1, 1] to scale (n, 1) and zero (n, 1), float32."""
    high, low = parts.amax(dim=1, keepdim=True), parts.amin(dim=1, keepdim=True)
    if grid.zero_point:
        high, low = high.clamp_min(0.0), low.clamp_max(0.0)
        whole = ((high - low) / grid.top).clamp_min(1e-12)
        middle = -low / whole
    else:
        # The extra level, the lowest, goes to the side that reaches farther.
        turned = high > -low
        reach, other = torch.where(turned, high, -low), torch.where(turned, -low, high)
        whole = torch.maximum(reach / grid.middle, other / (grid.middle - 1)).clamp_min(1e-12)
        whole = torch.where(turned, -whole, whole)
        middle = torch.full_like(whole, grid.middle)
    best = _Best(parts, heavy, grid)
    least = _LEAST_SHARE[grid.bits]
    for index in range(_SHARES):
        share = 1.0 - (1.0 - least) * index / (_SHARES - 1)
        if not grid.zero_point:
            best.offer(whole * share, middle)
            if grid.bits <= 3:
                best.offer(-whole * share, middle)
            continue
        for shift in (-1.0, 0.0, 1.0) if grid.bits <= 4 else (0.0,):
            best.offer(whole * share, (torch.round(middle) + shift).clamp(0, grid.top))
    for _ in range(_REFITS):
        best.refit()
    return best.scale, best.zero


class _Best:
    """The best range of each group so far."""

    def __init__(self, parts: Tensor, heavy: Tensor | None, grid: Grid) -> None:
        self.parts, self.heavy, self.grid = parts, heavy, grid
        self.scale = self.zero = self.error = parts.new_full((parts.shape[0], 1), float("inf"))

    def _codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        codes = torch.round(self.parts * scale.reciprocal())
        return torch.clamp(codes, -zero, self.grid.top - zero)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take a range for the groups in which it errs less."""
        lost = torch.addcmul(self.parts, self._codes(scale, zero), scale, value=-1.0).square_()
        if self.heavy is not None:
            lost *= self.heavy
        error = lost.sum(dim=1, keepdim=True)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Offer the scale that is best for the codes of the best one: Σ h w q / Σ h q²."""
        codes = self._codes(self.scale, self.zero)
        weighed = codes if self.heavy is None else codes * self.heavy
        down = (weighed * codes).sum(dim=1, keepdim=True)
        fitted = (weighed * self.parts).sum(dim=1, keepdim=True) / torch.where(down > 0.0, down, 1.0)
        self.offer(torch.where((down > 0.0) & (fitted != 0.0), fitted, self.scale), self.zero)


def rounded_to(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Give the nearest codes, (rows, columns) uint8, for scales (and zeros) that are settled.

    Example:
        >>> rounded_to(torch.tensor([[-8.0, 7.4]]), torch.tensor([[1.0]]), None, Grid(4)).tolist()
        [[0, 15]]
    """
    rows, columns = weight.shape
    span = grid.span(columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    step = max(CHUNK // max(columns, 1), 1)
    for start in range(0, rows, step):
        chosen = slice(start, start + step)
        steps = spread(scale[chosen].to(torch.float64), span, columns)
        offsets = grid.middle if zero is None else spread(zero[chosen].to(torch.float64), span, columns)
        # The zero is added to the whole number: a half would be rounded elsewhere with it.
        codes[chosen] = (torch.round(weight[chosen] / steps) + offsets).clamp_(0, grid.top).to(torch.uint8)
    return codes


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Give scales in the dtype that is stored; one that vanishes there is 1, so that its group becomes zeros.

    Raises:
        NumericsError: a scale beyond that dtype.
    """
    stored = scale.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        row = int(torch.nonzero(~torch.isfinite(stored))[0, 0])
        raise NumericsError(f"weight: row {row} is too large for a {dtype} scale; rescale the layer or leave it dense")
    return torch.where(stored == 0, torch.ones_like(stored), stored)
