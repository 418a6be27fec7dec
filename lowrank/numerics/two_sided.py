"""Rounding by what an error costs the model: feedback over the inputs and over the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.factored_moments import DAMPING, FactoredMoment
from lowrank.numerics.feedback import check_moment, gptq, importance, rounded_by_feedback
from lowrank.numerics.grids import Grid, Rounded, dequantize_groups, scale_dtype
from lowrank.numerics.linalg import check_finite
from lowrank.numerics.ranges import fitted_ranges
from lowrank.numerics.rounding import require_finite
from lowrank.numerics.sampled_moments import Moment, SampledMoment

__all__ = ["OUTPUT_DAMPING", "two_sided"]

# Relative to the mean diagonal of C: more than of Σ, as C is known from random directions. On MiniLM at 3 bits the drift was 0.0249 without
# C, 0.0222 with 0.03, 0.0218 with 0.1 and 0.0215 with 0.3.
OUTPUT_DAMPING = 0.3
# Rows rounded together, which do not make up for each other. Fewer would be better by little, and slower.
ROWS = 32
# Of each few rows; a second one pays where levels are few.
SWEEPS = 1
FEW_BITS, SWEEPS_OF_FEW = 2, 2


def two_sided(
    weight: Tensor,
    grid: Grid,
    moment: Moment | FactoredMoment | None = None,
    gradients: Tensor | None = None,
    *,
    damping: float = DAMPING,
    output_damping: float = OUTPUT_DAMPING,
    rows_at_once: int = ROWS,
    sweeps: int | None = None,
    name: str = "weight",
) -> Rounded:
    """Round rows one after the other, a few at a time, each aimed at what the errors of those before it cost the model.

    Minimises ``tr(C ΔW Σ ΔWᵀ)``, the second-order cost of an error (Tseng et al. 2025, "Model-preserving adaptive rounding", YAQA).
    With ``C = (I + U) D (I + U)ᵀ``, U strictly upper triangular, row i is rounded by :func:`lowrank.numerics.feedback.gptq` from
    ``w_i + Σ_{a<i} U_ai (w_a − ŵ_a)``, the largest diagonal entries of C first (of rows that are rounded together: by the block form of U).

    Args:
        weight: (out, in), any floating dtype.
        grid: the levels.
        moment: Σ, (in, in), in any form that :func:`lowrank.numerics.feedback.gptq` takes; of blocks, see there.
        gradients: C, (out, out) float64, the second moment of the gradients at the layer's outputs; of blocks what different ones
            share is left out. ``None``, or all zeros: rounded by Σ alone.
        damping, output_damping: of Σ and of C, relative to their mean diagonals.
        rows_at_once: which share no error.
        sweeps: of each few rows, as there; ``None``: two at 2 bits, else one.
        name: for messages.

    Raises:
        NumericsError, RankError: as gptq, and of gradients that are not finite or of another size.

    Example:
        >>> weight = torch.tensor([[0.3, 0.3], [0.3, 0.3]])
        >>> c = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
        >>> two_sided(weight, Grid(2), torch.eye(2).double(), c).codes.shape
        torch.Size([2, 2])
    """
    if gradients is None:
        return gptq(weight, grid, moment, damping=damping, name=name)
    outputs = weight.shape[0]
    if gradients.shape != (outputs, outputs):
        raise RankError(
            f"{name}: has {outputs} outputs, so the moment of its gradients must be ({outputs}, {outputs}), got "
            f"{tuple(gradients.shape)}"
        )
    check_finite(gradients, f"{name} (gradients)")
    if moment is None or isinstance(moment, SampledMoment):
        # Rows that stand for Σ are taken some columns at a time; C is left out.
        return gptq(weight, grid, moment, damping=damping, name=name)
    inputs = moment if isinstance(moment, FactoredMoment) else FactoredMoment.of(moment.cpu(), damping, name=name)
    check_moment(weight, inputs, name)
    matrix, dtype = require_finite(weight.detach().cpu(), name).to(torch.float64), scale_dtype(weight, grid)
    if sweeps is None:
        sweeps = SWEEPS_OF_FEW if grid.bits <= FEW_BITS else SWEEPS
    blocks = inputs.metric.shape[0]
    height = outputs // blocks
    found = []
    for index in range(blocks):
        own = slice(index * height, (index + 1) * height)
        costs = FactoredMoment.of(gradients[own, own].cpu(), output_damping, name=f"{name} (gradients)")
        found.append(_one_block(matrix[own], grid, inputs.block(index), costs, rows_at_once, sweeps, dtype))
    zero = None if found[0].zero is None else torch.cat([each.zero for each in found if each.zero is not None])
    codes, scale = torch.cat([each.codes for each in found]), torch.cat([each.scale for each in found])
    return Rounded(codes, scale, zero).to(weight.device)


def _one_block(
    weight: Tensor,
    grid: Grid,
    inputs: FactoredMoment,
    costs: FactoredMoment,
    rows_at_once: int,
    sweeps: int,
    dtype: torch.dtype,
) -> Rounded:
    order, upper = costs.order[0], costs.upper[0].to(torch.float64)
    lost = torch.zeros_like(weight)
    groups = grid.groups(weight.shape[1])
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(weight.shape[0], groups, dtype=dtype)
    zeros = torch.empty(weight.shape[0], groups, dtype=torch.uint8) if grid.zero_point else None
    for places in torch.arange(weight.shape[0]).split(rows_at_once):
        before, rows = slice(0, int(places[0])), order[places]
        # (I + U) of a few rows together: what those before send to all of them at once, as none of these sees what another took up.
        sent = torch.linalg.solve_triangular(upper[places][:, places], upper[before][:, places], upper=True, left=False)
        aim = weight[rows] + sent.T @ lost[order[before]]
        scale, zero = fitted_ranges(aim, grid, dtype, importance(aim, inputs))
        part = rounded_by_feedback(aim, grid, inputs, scale, zero, sweeps)
        codes[rows], scales[rows] = part.codes, part.scale
        if zeros is not None and part.zero is not None:
            zeros[rows] = part.zero
        lost[rows] = weight[rows] - dequantize_groups(*part, grid, torch.float64)
    return Rounded(codes, scales, zeros)
