"""Packed codes of a mixture's experts: each rounded with the tokens that were routed to it, those that saw too few without data."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.compression.layer_data import SAMPLED_ROWS, LayerData, spread_rows
from lowrank.compression.stacks import expert_moment, stacked_error
from lowrank.numerics.rounding_methods import NEAREST, ROUNDINGS, Grid, Rounded, dequantize_groups
from lowrank.numerics.sampled_moments import Moment

__all__ = ["experts_error", "rounded_experts"]

# Rows of each expert that errors are estimated on, at least.
LEAST_ROWS = 4


def rounded_experts(data: LayerData, grid: Grid, method: str) -> dict[str, list[Rounded]]:
    """Choose the codes of every expert, by the parameter's name; to the nearest where too few tokens came by."""
    return {
        name: [_rounded(data, name, expert, stack[expert], grid, method) for expert in range(stack.shape[0])]
        for name, stack in data.stacks.items()
    }


def _rounded(data: LayerData, name: str, expert: int, matrix: Tensor, grid: Grid, method: str) -> Rounded:
    known = data.experts
    rows = data.stacks[name].shape[1]
    if known is None or method == NEAREST or known.is_thin(name, expert, rows):
        return ROUNDINGS[NEAREST](matrix, grid, None)
    return ROUNDINGS[method](matrix, grid, _moment(data, name, expert))


def _moment(data: LayerData, name: str, expert: int) -> Moment | None:
    known = data.experts
    if known is None:
        return None
    return data.remembered(
        ("expert", name, expert), lambda: expert_moment(known.of(name, expert), data.stacks[name].device)
    )


def experts_error(data: LayerData, grid: Grid, method: str) -> float:
    """Estimate the squared relative error of a rounding on some rows of every expert; see :func:`stacked_error`."""
    some, made = {}, {}
    for name, stack in data.stacks.items():
        experts, outputs, _ = stack.shape
        rows = spread_rows(outputs, max(SAMPLED_ROWS // experts, LEAST_ROWS), stack.device)
        some[name] = stack[:, rows]
        made[name] = torch.stack(
            [
                dequantize_groups(*_rounded(data, name, expert, some[name][expert], grid, method), grid, torch.float64)
                for expert in range(experts)
            ]
        )
    return stacked_error(some, made, data.experts, lambda name, expert: _moment(data, name, expert))
