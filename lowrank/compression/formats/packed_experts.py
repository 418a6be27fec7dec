"""Packed codes of a mixture's experts: each rounded with the tokens that were routed to it, those that saw too few without data."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.compression.layer_data import LayerData
from lowrank.compression.stacks import expert_moment, row_squares
from lowrank.layers.experts import expert_scale_dtype
from lowrank.layers.packed import packed_bytes
from lowrank.numerics.rounding_methods import NEAREST, ROUNDINGS, Grid, Rounded, dequantize_groups
from lowrank.numerics.sampled_moments import Moment

__all__ = ["experts_bytes", "experts_error", "rounded_experts"]

# Rows that errors are estimated on, of all experts of a parameter together, and of each at least.
SAMPLED_ROWS, LEAST_ROWS = 256, 4


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


def experts_bytes(data: LayerData, grid: Grid) -> int:
    """Count codes, scales and zero points of all experts."""
    return sum(
        packed_bytes(stack.shape[0] * stack.shape[1], stack.shape[2], grid, _scale_dtype(data, name, grid))
        for name, stack in data.stacks.items()
    )


def _scale_dtype(data: LayerData, name: str, grid: Grid) -> torch.dtype:
    stack = data.stacks[name]
    return data.remembered(("scale_dtype", name, grid.bits, grid.group), lambda: expert_scale_dtype(stack, grid))


def experts_error(data: LayerData, grid: Grid, method: str) -> float:
    """Estimate the squared relative error of a rounding on some rows of every expert; see :func:`stacked_error`."""
    errors = [error for name in data.stacks if (error := _parameter_error(data, name, grid, method)) is not None]
    return sum(errors) / len(errors) if errors else 0.0


def _parameter_error(data: LayerData, name: str, grid: Grid, method: str) -> float | None:
    stack, known = data.stacks[name], data.experts
    experts, outputs, _ = stack.shape
    count = min(max(SAMPLED_ROWS // experts, LEAST_ROWS), outputs)
    rows = torch.arange(count, device=stack.device) * outputs // count
    met = [expert for expert in range(experts) if known is not None and known.count(name, expert)]
    lost = energy = 0.0
    for expert in met or range(experts):
        moment = _moment(data, name, expert) if met else None
        tokens = known.count(name, expert) if met and known is not None else 1
        weight = stack[expert][rows]
        made = dequantize_groups(*_rounded(data, name, expert, weight, grid, method), grid, torch.float64)
        lost += tokens * float(row_squares(weight.to(torch.float64) - made, moment).sum())
        energy += tokens * float(row_squares(weight, moment).sum())
    return max(lost, 0.0) / energy if energy > 0.0 else None
