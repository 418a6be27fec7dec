"""Errors of matrices that come in stacks, a mixture's experts, each in the norm of the tokens that were routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowrank.calibration.experts import ExpertInputs
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.sampled_moments import Moment, moment_squares
from lowrank.reporting.text import counted

__all__ = ["expert_moment", "few_tokens", "row_squares", "stacked_error"]


def expert_moment(statistics: InputStatistics | None, device: torch.device) -> Moment | None:
    """Give Σ of what flows into one expert's matrix; ``None`` where nothing did."""
    if statistics is None or not statistics.count:
        return None
    return statistics.metric(centred=False).to(device)


def row_squares(matrix: Tensor, moment: Moment | None) -> Tensor:
    """Compute the squared norm of each row, (rows,) float64, in the norm of the inputs where they are known.

    Example:
        >>> row_squares(torch.tensor([[3.0, 4.0]]), None).tolist()
        [25.0]
    """
    matrix = matrix.to(torch.float64)
    return matrix.square().sum(dim=-1) if moment is None else moment_squares(matrix, moment)


def stacked_error(
    stacks: Mapping[str, Tensor],
    approximations: Mapping[str, Tensor],
    known: ExpertInputs | None,
    moment_of: Callable[[str, int], Moment | None] | None = None,
) -> float:
    """Compute the squared relative error of the matrices, the mean over the parameters.

    Of a parameter ``Σ_e n_e tr(ΔW_e Σ_e ΔW_eᵀ) / Σ_e n_e tr(W_e Σ_e W_eᵀ)`` over the experts e with n_e tokens; where none is known
    to have met any ``‖ΔW‖² / ‖W‖²``. The mean, since what flows through two matrices in turn errs relatively by the sum of both.

    Args:
        stacks: (experts, out, in) by name.
        approximations: of the same numbers, by the same names.
        known: what flows into them.
        moment_of: gives Σ of a parameter's expert, where it was made before; else it is made of what is known.

    Example:
        >>> stacked_error({"up": torch.ones(2, 3, 4)}, {"up": torch.full((2, 3, 4), 0.5)}, None)
        0.25
    """
    errors = []
    for name, stack in stacks.items():
        made = approximations[name].view(stack.shape)
        lost = energy = 0.0
        for expert in range(stack.shape[0]):
            moment = None
            if known is not None:
                moment = moment_of(name, expert) if moment_of else expert_moment(known.of(name, expert), stack.device)
            if known is not None and moment is None:
                continue
            tokens = 1 if known is None else known.count(name, expert)
            difference = stack[expert].to(torch.float64) - made[expert].to(stack.device, torch.float64)
            lost += tokens * float(row_squares(difference, moment).sum())
            energy += tokens * float(row_squares(stack[expert], moment).sum())
        if not energy > 0.0:
            if known is not None:
                errors.append(stacked_error({name: stack}, approximations, None))
            continue
        errors.append(max(lost, 0.0) / energy)
    return sum(errors) / len(errors) if errors else 0.0


def few_tokens(layer: str, stacks: Mapping[str, Tensor], known: ExpertInputs) -> list[str]:
    """Name the experts that met fewer tokens than their matrices have inputs, and so are rounded without data.

    Example:
        >>> few_tokens("moe", {"up": torch.ones(2, 3, 4), "down": torch.ones(2, 4, 3)}, ExpertInputs())
        ['moe: experts 0 (no token), 1 (no token) met fewer tokens than they have inputs: rounded without data']
    """
    thin: dict[int, int] = {}
    for name, stack in stacks.items():
        for expert in range(stack.shape[0]):
            if known.is_thin(name, expert, stack.shape[1]):
                thin[expert] = min(known.count(name, expert), thin.get(expert, known.count(name, expert)))
    if not thin:
        return []
    listed = ", ".join(
        f"{expert} ({counted(tokens, 'token') if tokens else 'no token'})" for expert, tokens in sorted(thin.items())
    )
    return [f"{layer}: experts {listed} met fewer tokens than they have inputs: rounded without data"]
