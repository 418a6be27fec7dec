"""Rounding behind layers that were compressed already: what they changed is corrected where held-out tokens say that it helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.factored_moments import DAMPING, FactoredMoment
from lowrank.numerics.feedback import gptq
from lowrank.numerics.grids import Grid, Rounded, dequantize_groups
from lowrank.numerics.linalg import check_finite

__all__ = ["RIDGES", "Propagated", "choose_propagation", "propagated_aim", "qronos"]

# Relative to the mean diagonal of the moment of X'. Small ones learn the calibration tokens by heart where these are few.
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Propagated:
    """What flows into a layer of the original model, x, and of the compressed one, x', on the same tokens.

    Attributes:
        moment: ``E[x' x'ᵀ]``, (in, in) float64; both centred where a bias takes the means.
        cross: ``E[x x'ᵀ]``, (in, in) float64.
    """

    moment: Tensor
    cross: Tensor

    def cost(self, weight: Tensor, approximation: Tensor) -> float:
        """Compute ``E‖W x − Ŵ x'‖² − E‖W x‖²`` of float64 weights; the last is the same for every Ŵ, and not known here."""
        missed = approximation @ self.moment - 2.0 * (weight @ self.cross)
        return float((missed * approximation).sum())


def propagated_aim(weight: Tensor, inputs: Propagated, ridge: float) -> Tensor:
    """Give what to round in the weight's place: ``W* = W + W (E[x x'ᵀ] − E[x' x'ᵀ]) (E[x' x'ᵀ] + ridge)⁻¹``, (out, in) float64.

    Without a ridge ``E‖W x − Ŵ x'‖² = E‖(W* − Ŵ) x'‖² + a constant``, so that error feedback in the moment of x' from W* does what
    can be done; a ridge draws W* back to W, not to 0.

    Args:
        weight: (out, in), any floating dtype.
        inputs: see there.
        ridge: relative to the mean diagonal of the moment.

    Raises:
        NumericsError: NaN or Inf in either moment.
        RankError: moments of another size.

    Example:
        >>> halved = Propagated(0.25 * torch.eye(2).double(), 0.5 * torch.eye(2).double())
        >>> propagated_aim(torch.eye(2), halved, 0.0).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    columns = weight.shape[1]
    for name in ("moment", "cross"):
        held = getattr(inputs, name)
        if held.shape != (columns, columns):
            raise RankError(
                f"{name}: must be ({columns}, {columns}), as the weight has inputs; got {tuple(held.shape)}"
            )
        check_finite(held, name)
    matrix = weight.detach().to(torch.float64)
    mean = inputs.moment.diagonal().mean()
    if not float(mean) > 0.0:
        return matrix
    damped = inputs.moment + ridge * mean * torch.eye(columns, dtype=torch.float64, device=matrix.device)
    change, info = torch.linalg.solve_ex(damped, (matrix @ (inputs.cross - inputs.moment)).T)
    # Singular without a ridge: as small a solution as there is.
    if int(info) or not bool(torch.isfinite(change).all()):
        change = torch.linalg.pinv(damped, hermitian=True) @ (matrix @ (inputs.cross - inputs.moment)).T
    aim: Tensor = matrix + change.T
    return aim


def qronos(
    weight: Tensor, grid: Grid, inputs: Propagated, *, ridge: float, damping: float = DAMPING, name: str = "weight"
) -> Rounded:
    """Correct for what earlier layers changed, then round with error feedback (Zhang et al. 2025, "Qronos").

    Args:
        weight: (out, in), any floating dtype.
        grid: the levels.
        inputs: of the layer in either model.
        ridge: of :func:`propagated_aim`.
        damping: of :func:`lowrank.numerics.feedback.gptq`.
        name: for messages.

    Raises:
        NumericsError, RankError: as these two.

    Example:
        >>> eye = torch.eye(2).double()
        >>> qronos(torch.eye(2), Grid(4), Propagated(eye, eye), ridge=0.1).codes.shape
        torch.Size([2, 2])
    """
    return gptq(propagated_aim(weight, inputs, ridge), grid, inputs.moment, damping=damping, name=name)


def choose_propagation(
    weight: Tensor,
    grid: Grid,
    inputs: Propagated,
    held_out: Propagated,
    *,
    ridges: Sequence[float] = RIDGES,
    damping: float = DAMPING,
    name: str = "weight",
) -> tuple[float | None, Rounded]:
    """Choose the ridge of :func:`qronos`, or plain error feedback, by the error on held-out tokens.

    Args:
        weight: (out, in), any floating dtype.
        grid: the levels.
        inputs: of the tokens that are rounded by.
        held_out: of other tokens.
        ridges: to choose from.
        damping, name: as there.

    Returns:
        The ridge and its codes; ``None`` where GPTQ from the weight itself errs no more than any.

    Raises:
        NumericsError, RankError: as :func:`qronos`.

    Example:
        >>> eye = torch.eye(2).double()
        >>> choose_propagation(torch.eye(2), Grid(4), Propagated(eye, eye), Propagated(eye, eye))[0] is None
        True
    """
    matrix = weight.detach().to(torch.float64)
    factored = FactoredMoment.of(inputs.moment, damping, name=name)
    best: tuple[float | None, Rounded] | None = None
    least = float("inf")
    for ridge in (None, *ridges):
        aim = matrix if ridge is None else propagated_aim(matrix, inputs, ridge)
        rounded = gptq(aim, grid, factored, name=name)
        cost = held_out.cost(matrix, dequantize_groups(*rounded, grid, torch.float64))
        if best is None or cost < least:
            best, least = (ridge, rounded), cost
    assert best is not None
    return best
