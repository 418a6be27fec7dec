"""Rounding with error feedback: what a column loses, the columns still to come make up for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.column_loops import Columns
from lowrank.numerics.factored_moments import DAMPING, FactoredMoment
from lowrank.numerics.grids import Grid, Rounded, dequantize_groups, scale_dtype, spread
from lowrank.numerics.linalg import check_finite, power_of_two_scale
from lowrank.numerics.ranges import fitted_ranges, rounded_to, storable
from lowrank.numerics.sampled_moments import Moment, SampledMoment, moment_squares

__all__ = ["DAMPING", "choose_damping", "gptq", "lost_energy"]

# What held-out tokens choose from where there are few tokens; 1 and more is near to rounding without data.
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
# Passes over all columns after the first: scales refitted, then each code set anew with all others as they are.
SWEEPS = 2
# Of more columns one: on 4096 × 4096 a sweep takes ten seconds of one core.
WIDE, SWEEPS_OF_WIDE = 2048, 1
# Of rows that stand for a moment: so many columns at a time, and what different ones share is left out.
SAMPLED_COLUMNS = 512
# Of the scales' equations, relative; groups of which all codes are zero make them singular.
_SCALE_RIDGE = 1e-6


def gptq(
    weight: Tensor,
    grid: Grid,
    moment: Moment | FactoredMoment | None = None,
    gradients: Tensor | None = None,
    *,
    damping: float = DAMPING,
    sweeps: int | None = None,
    name: str = "weight",
) -> Rounded:
    """Round columns one after the other, each aimed at what the errors of those before it left undone.

    Minimises ``tr(ΔW Σ ΔWᵀ)``. With ``Σ = (I + U) D (I + U)ᵀ``, U strictly upper triangular, column k is rounded from
    ``w_k + Σ_{j<k} (w_j − ŵ_j) U_jk``, the largest diagonal entries of Σ first (Frantar et al. 2023, "GPTQ", in the form of LDLQ: Chee
    et al. 2023, "QuIP"). Scales and zeros are fitted beforehand to each group's own weights. Then ``sweeps`` times: the scales of a row by
    least squares in the norm of Σ with the codes as they are, and every code by coordinate descent; neither can raise the error but
    for the scales' rounding, and what is worse is not taken.

    Args:
        weight: (out, in), any floating dtype.
        grid: the levels.
        moment: Σ, (in, in), or (blocks, in, in) for as many equal runs of rows; or the rows it is made of, which are taken a few hundred
            columns at a time. ``None``, or all zeros: nearest levels.
        gradients: not used; see :func:`lowrank.numerics.two_sided.two_sided`.
        damping: added to Σ's diagonal, relative to its mean, and more where Σ is not positive definite with it: it never fails.
        sweeps: see above; ``None``: two, of more than 2048 inputs one.
        name: for messages.

    Raises:
        NumericsError: NaN or Inf in the weight or the moment, or weights too large for a float32 scale.
        RankError: a moment of another size.

    Example:
        >>> moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
        >>> gptq(torch.tensor([[4.0, 1.4], [4.0, 1.4]]), Grid(3), moment).codes.dtype
        torch.uint8
    """
    check_finite(weight, name)
    if weight.device.type != "cpu":
        # Column after column of short work is the processor's; a moment comes along.
        beside = None if moment is None else moment.to(torch.device("cpu"))
        return gptq(weight.cpu(), grid, beside, damping=damping, sweeps=sweeps, name=name).to(weight.device)
    matrix = weight.detach()
    if sweeps is None:
        sweeps = SWEEPS if matrix.shape[1] <= WIDE else SWEEPS_OF_WIDE
    dtype = scale_dtype(matrix, grid)
    check_moment(matrix, moment, name)
    scale, zero = fitted_ranges(matrix, grid, dtype, importance(matrix, moment))
    if not matrix.numel():
        return Rounded(torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device), scale, zero)
    if isinstance(moment, SampledMoment):
        return _by_parts(matrix, grid, moment, damping, sweeps, scale, zero)
    if moment is None:
        return Rounded(rounded_to(matrix, scale, zero, grid), scale, zero)
    factored = moment if isinstance(moment, FactoredMoment) else FactoredMoment.of(moment, damping, name=name)
    return rounded_by_feedback(matrix, grid, factored, scale, zero, sweeps)


def check_moment(weight: Tensor, moment: Moment | FactoredMoment | None, name: str) -> None:
    """Refuse a moment that is not finite, or not of the weight's inputs.

    Raises:
        NumericsError, RankError: as :func:`gptq` says.

    Example:
        >>> check_moment(torch.eye(2), torch.eye(2), "fc")
    """
    if moment is None:
        return
    rows, columns = weight.shape
    if isinstance(moment, FactoredMoment):
        held, square = moment.metric, True
    elif isinstance(moment, SampledMoment):
        held, square = moment.rows, True
    else:
        held, square = moment, moment.shape[-2:] == (columns, columns)
    check_finite(held, f"{name} (input moment)")
    blocks = held.shape[0] if held.ndim == 3 else 1
    if held.ndim not in (2, 3) or not square or held.shape[-1] != columns or not blocks or rows % blocks:
        raise RankError(
            f"{name}: has {rows} rows and {columns} inputs, so its moment must be ({columns}, {columns}), or (blocks, {columns}, "
            f"{columns}) with blocks that divide the rows; got shape {tuple(held.shape)}"
        )


def importance(weight: Tensor, moment: Moment | FactoredMoment | None) -> Tensor | None:
    """Give the diagonal of Σ with a little of its mean: (1, columns), or (rows, columns) of blocks with moments of their own; float64."""
    if moment is None:
        return None
    if isinstance(moment, FactoredMoment):
        diagonal = moment.diagonal
    elif isinstance(moment, SampledMoment):
        diagonal = torch.stack([part.square().sum(dim=-2) for part in moment.parts()]).sum(dim=0) / moment.count
        diagonal = (diagonal + moment.ridge).view(-1, weight.shape[1])
    else:
        diagonal = moment.diagonal(dim1=-2, dim2=-1).view(-1, weight.shape[1]).to(torch.float64)
    diagonal = diagonal.clamp_min(0.0)
    # So that inputs which were never seen have a say where they are all that a group has.
    diagonal = diagonal + DAMPING * diagonal.mean(dim=1, keepdim=True)
    return diagonal if diagonal.shape[0] == 1 else diagonal.repeat_interleave(weight.shape[0] // diagonal.shape[0], 0)


def rounded_by_feedback(
    weight: Tensor, grid: Grid, moment: FactoredMoment, scale: Tensor, zero: Tensor | None, sweeps: int = SWEEPS
) -> Rounded:
    """Round a finite weight by a factored moment, from scales and zeros that were chosen; see :func:`gptq`."""
    blocks, columns = moment.metric.shape[0], weight.shape[1]
    span = grid.span(columns)
    order, back = moment.order, torch.argsort(moment.order, dim=1)
    metric, upper = _squeezed(moment.metric), _squeezed(moment.upper)
    # A power of two off everything, so that float32 holds weights of any size.
    unit = 2.0 ** -power_of_two_scale(weight)

    def ordered(values: Tensor) -> Tensor:
        """(rows, columns) by columns, in order."""
        stacked = values.expand(-1, columns).reshape(blocks, -1, columns).transpose(1, 2)
        if blocks == 1:
            return stacked[0][order[0]]
        return stacked.gather(1, order[:, :, None].expand(-1, -1, stacked.shape[2]))

    def by_rows(values: Tensor) -> Tensor:
        """Undo :func:`ordered`: (rows, columns)."""
        if blocks == 1:
            return values[back[0]].T.contiguous()
        return values.gather(1, back[:, :, None].expand_as(values)).transpose(1, 2).reshape(weight.shape)

    def steps_of(scale: Tensor) -> Tensor:
        return ordered(spread((scale.to(torch.float64) * unit).to(torch.float32), span, columns))

    middle = torch.full_like(scale, grid.middle, dtype=torch.float32) if zero is None else zero.to(torch.float32)
    zeros = spread(middle, span, columns)
    rows = (weight.to(torch.float64) * unit).to(torch.float32)
    state = Columns(ordered(rows), steps_of(scale), -ordered(zeros), grid.top)
    state.first_pass(upper)
    for _ in range(sweeps):
        scale = _refitted(state, metric, back, span, scale, unit)
        state.steps = steps_of(scale)
        state.descend(metric)
    return Rounded((by_rows(state.codes) + zeros).to(torch.uint8), scale, zero)


def _squeezed(stacked: Tensor) -> Tensor:
    """Without the blocks where there is one: products of matrices are faster than those of stacks of one."""
    return stacked[0] if stacked.shape[0] == 1 else stacked


def _refitted(state: Columns, metric: Tensor, back: Tensor, span: int, scale: Tensor, unit: float) -> Tensor:
    """Fit the scales of each row by least squares in the metric, codes as they are; a row that storing makes worse keeps its own.

    Scales that change by d change the error by ``dᵀ A d − 2 bᵀ d`` with ``A_gh = q_gᵀ Σ_gh q_h`` and ``b_g = q_gᵀ (Σ e)_g``.

    Args:
        back: where each input stands in the order of the columns, (blocks, columns).
        span: inputs of a group.
        scale: (rows, groups), as it is stored.
        unit: what weights were multiplied by.
    """
    groups, blocks = scale.shape[1], back.shape[0]
    slopes = (metric @ state.error) * state.codes
    found = []
    for block, own in enumerate(scale.chunk(blocks)):
        codes, slope, known = (each if blocks == 1 else each[block] for each in (state.codes, slopes, metric))
        # As the inputs come, so that groups lie together; a short last one is filled up with codes that are 0.
        place, missing = back[block], groups * span - back.shape[1]
        codes, slope = (torch.nn.functional.pad(each[place], (0, 0, 0, missing)) for each in (codes, slope))
        known = torch.nn.functional.pad(known[place][:, place], (0, missing, 0, missing))
        right = slope.view(groups, span, -1).sum(dim=1).T.to(torch.float64)
        left = torch.empty(groups, groups, own.shape[0])
        for index in range(groups):
            start = index * span
            inside = slice(start, start + span)
            product = (known[inside, start:].T @ codes[inside]).mul_(codes[start:])
            left[index, index:] = left[index:, index] = product.view(groups - index, span, -1).sum(dim=1)
        found.append(_least_squares(left.permute(2, 0, 1).to(torch.float64), right, own, unit))
    return torch.cat(found)


def _least_squares(left: Tensor, right: Tensor, scale: Tensor, unit: float) -> Tensor:
    """Solve for each row what :func:`_refitted` says: (rows, groups, groups), (rows, groups) and the scales that were."""
    before = scale.to(torch.float64) * unit
    ridge = _SCALE_RIDGE * left.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None]
    ridge = torch.where(ridge > 0.0, ridge, 1.0)
    change, info = torch.linalg.solve_ex(left + torch.diag_embed(ridge.expand_as(right)), right)
    fits = (info == 0)[:, None] & torch.isfinite(change) & (change.abs() < 3.0 * before.abs())
    stored = storable((before + torch.where(fits, change, 0.0)) / unit, scale.dtype)
    moved = (stored.to(torch.float64) * unit - before)[:, :, None]
    gained = (moved.transpose(1, 2) @ left @ moved)[:, :, 0] - 2.0 * (right[:, None, :] @ moved)[:, :, 0]
    return torch.where(gained < 0.0, stored, scale)


def _by_parts(
    weight: Tensor, grid: Grid, moment: SampledMoment, damping: float, sweeps: int, scale: Tensor, zero: Tensor | None
) -> Rounded:
    """Round a few hundred columns at a time, by the moment of these columns alone."""
    columns = weight.shape[1]
    span = grid.span(columns)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = scale.clone()
    own_scales = span < columns
    width = max(SAMPLED_COLUMNS // span, 1) * span if own_scales else SAMPLED_COLUMNS
    for start in range(0, columns, width):
        inside = slice(start, start + width)
        groups = slice(start // span, -(-min(start + width, columns) // span)) if own_scales else slice(None)
        mean = None if moment.mean is None else moment.mean[..., inside]
        part = SampledMoment(moment.rows[..., inside], mean, moment.ridge)
        factored = FactoredMoment.of(part.between(torch.eye(part.rows.shape[-1], dtype=torch.float64)), damping)
        part_zero = None if zero is None else zero[:, groups]
        # The scale of a whole row cannot be fitted to some of its columns.
        found = rounded_by_feedback(
            weight[:, inside], grid, factored, scale[:, groups], part_zero, sweeps if own_scales else 0
        )
        codes[:, inside], scales[:, groups] = found.codes, found.scale
    return Rounded(codes, scales, zero)


def lost_energy(weight: Tensor, rounded: Rounded, grid: Grid, moment: Moment | None) -> float:
    """Compute ``tr(ΔW Σ ΔWᵀ)`` of codes, block by block where Σ has blocks; of no moment ``‖ΔW‖²``.

    Example:
        >>> lost_energy(torch.tensor([[1.0, 3.0]]), gptq(torch.tensor([[1.0, 3.0]]), Grid(4)), Grid(4), None) < 0.1
        True
    """
    lost = weight.detach().to(torch.float64) - dequantize_groups(*rounded, grid, torch.float64)
    if moment is None:
        return float(lost.square().sum())
    held = moment.rows if isinstance(moment, SampledMoment) else moment
    if held.ndim == 3:
        lost = lost.view(held.shape[0], -1, lost.shape[1])
    return float(moment_squares(lost, moment).sum())


def choose_damping(
    weight: Tensor, grid: Grid, moment: Moment, held_out: Moment, choices: Sequence[float] = DAMPINGS
) -> float:
    """Choose the damping of :func:`gptq` by the error on held-out tokens.

    Where the moment is thin (fewer tokens than a few times the inputs), feedback learns its accidents; damping pulls it towards
    rounding without data.

    Args:
        weight: (out, in).
        grid: the levels.
        moment: of the tokens that are rounded by.
        held_out: of other tokens, in the same form.
        choices: dampings, of which the first of the best is taken.

    Example:
        >>> choose_damping(torch.eye(2), Grid(4), torch.eye(2).double(), torch.eye(2).double(), [0.1, 1.0])
        0.1
    """
    costs = [lost_energy(weight, gptq(weight, grid, moment, damping=each), grid, held_out) for each in choices]
    return choices[costs.index(min(costs))]
