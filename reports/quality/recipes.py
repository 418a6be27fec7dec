"""Recipes of others, each from its mathematics: a matrix in, what is left of it and its bytes out. Nothing here knows lowrank.

A matrix is (out, in) float64, ``gram`` is XᵀX / tokens of its inputs, (in, in) float64. Codes count at their bits, scales 16 bits a
group, whole zero points at the bits of a code, others 16 bits; low-rank factors 16 bits a number and rounded to float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of the mean diagonal, as in GPTQ's paper.
DAMPING = 0.01
# GPTQ writes errors forward inside so many columns at once.
BLOCK = 128


class Made(NamedTuple):
    """What a recipe made: the matrix that the file stands for, and its bytes."""

    weight: Tensor
    bytes: int


class Levels(NamedTuple):
    """Scale and zero of each group, (out, groups) float64: ``scale · (code − zero)``."""

    scale: Tensor
    zero: Tensor


def half(values: Tensor) -> Tensor:
    """What float16 keeps."""
    return values.half().double()


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """Cut rows in groups, the last one filled up by repeating its last entry: (out, groups, group)."""
    size = weight.shape[1] if group is None else min(group, weight.shape[1])
    missing = -weight.shape[1] % size
    filled = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    return filled.view(len(weight), -1, size)


def spread(values: Tensor, columns: int, group: int | None) -> Tensor:
    """Repeat what groups have for each of their inputs: (out, groups) to (out, columns)."""
    size = columns if group is None else min(group, columns)
    return values.repeat_interleave(size, dim=1)[:, :columns]


def code_bytes(weight: Tensor, bits: int, group: int | None, zero_bits: int) -> int:
    """Bytes of packed codes, float16 scales and zeros."""
    groups = grouped(weight, group).shape[1]
    return -(-(weight.numel() * bits + len(weight) * groups * (16 + zero_bits)) // 8)


def from_extremes(weight: Tensor, bits: int, group: int | None) -> Levels:
    """Levels from the least to the largest weight of each group, zero among them."""
    cut = grouped(weight, group)
    low, high = cut.amin(dim=2).clamp(max=0.0), cut.amax(dim=2).clamp(min=0.0)
    scale = half((high - low) / (2**bits - 1)).clamp(min=2.0**-24)
    return Levels(scale, (-low / scale).round().clamp(0, 2**bits - 1))


def to_levels(weight: Tensor, levels: Levels, bits: int, group: int | None = None) -> Tensor:
    """The nearest level of every weight."""
    scale, zero = (spread(each, weight.shape[1], group) for each in levels)
    return ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def nearest(weight: Tensor, bits: int, group: int | None) -> Made:
    """Round to nearest between the extremes of each group."""
    made = to_levels(weight, from_extremes(weight, bits, group), bits, group)
    return Made(made, code_bytes(weight, bits, group, bits))


def gptq(weight: Tensor, gram: Tensor, bits: int, group: int | None, *, ordered: bool = False) -> Made:
    """GPTQ (Frantar et al. 2023): column after column, each error spread over those to come by the Cholesky factor of H⁻¹.

    A group's levels are set when its first column comes up, from the weights as they are then; ``ordered`` takes the columns with the
    largest diagonal first, with levels from the weights as they were.
    """
    columns = weight.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True) if ordered else torch.arange(columns)
    left = weight[:, order].clone()
    hessian = gram[order][:, order].clone()
    hessian.diagonal().add_(DAMPING * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    size = columns if group is None else min(group, columns)
    fixed = from_extremes(weight, bits, group)
    made = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(len(left), end - start, dtype=left.dtype)
        for column in range(start, end):
            if ordered:
                levels = Levels(*(each[:, [int(order[column]) // size]] for each in fixed))
            elif column % size == 0:
                # What the errors of this block's columns do to the group's later ones is not in yet beyond the block.
                ahead = left[:, column : column + size].clone()
                beyond = slice(end, min(column + size, columns))
                if beyond.start < beyond.stop:
                    ahead[:, beyond.start - column :] -= errors @ upper[start:end, beyond]
                levels = from_extremes(ahead, bits, None)
            made[:, column] = to_levels(left[:, column : column + 1], levels, bits)[:, 0]
            error = (left[:, column] - made[:, column]) / upper[column, column]
            left[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(made)
    back[:, order] = made
    return Made(back, code_bytes(weight, bits, group, bits))


def hqq(weight: Tensor, bits: int, group: int | None) -> Made:
    """HQQ (Badri & Shaji 2023): zeros by half-quadratic splitting of an l_0.7 norm of the error, scales as they were; zeros are floats."""
    power, beta, growth, rounds, top = 0.7, 10.0, 1.01, 20, 2**bits - 1
    cut = grouped(weight, group)
    low, high = cut.amin(dim=2, keepdim=True), cut.amax(dim=2, keepdim=True)
    scale = half((high - low) / top).clamp(min=2.0**-24)
    zero, best, least = -low / scale, -low / scale, float("inf")
    for _ in range(rounds):
        codes = (cut / scale + zero).round().clamp(0, top)
        error = cut - (codes - zero) * scale
        kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** (power - 1) / beta).clamp(min=0)
        lost = float(error.abs().mean())
        if lost >= least:
            break
        best, least = zero, lost
        zero = (codes - (cut - kept) / scale).mean(dim=2, keepdim=True)
        beta *= growth
    zero = half(best)
    made = ((cut / scale + zero).round().clamp(0, top) - zero) * scale
    return Made(made.flatten(1)[:, : weight.shape[1]], code_bytes(weight, bits, group, 16))


def root_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Σ^½ and its inverse, directions that no input has left out of the inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0.0)
    roots = values.sqrt()
    inverse = torch.where(values > values[-1] * 1e-10, 1.0 / roots.clamp(min=1e-300), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def factor_bytes(shape: Sequence[int], rank: int) -> int:
    """Two factors in float16."""
    return 2 * rank * (shape[0] + shape[1])


def truncated(weight: Tensor, root: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors in the metric of the inputs: left (out, rank) and right (rank, in)."""
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    sides = s[:rank].sqrt()
    return u[:, :rank] * sides, sides[:, None] * (vt[:rank] @ inverse)


def svd(weight: Tensor, rank: int) -> Made:
    """Plain truncated SVD."""
    eye = torch.eye(weight.shape[1], dtype=weight.dtype)
    left, right = truncated(weight, eye, eye, rank)
    return Made(half(left) @ half(right), factor_bytes(weight.shape, rank))


def whitening(gram: Tensor) -> tuple[Tensor, Tensor]:
    """SVD-LLM's S with SSᵀ = XᵀX by Cholesky, and S⁻¹; a ridge where it is not positive definite."""
    ridge, eye = 0.0, torch.eye(len(gram), dtype=gram.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex(gram + ridge * gram.diagonal().mean() * eye)
        if not int(failed):
            return lower, torch.linalg.solve_triangular(lower, eye, upper=False)
        ridge = max(10.0 * ridge, 1e-8)


def svd_llm(weight: Tensor, gram: Tensor, rank: int) -> Made:
    """SVD-LLM (Wang et al. 2025): truncate W S, undo S."""
    left, right = truncated(weight, *whitening(gram), rank)
    return Made(half(left) @ half(right), factor_bytes(weight.shape, rank))


def uniform_ranks(shapes: Mapping[str, Sequence[int]], share: float) -> dict[str, int]:
    """The rank at which every layer's factors take this share of its float32 bytes."""
    return {name: max(int(share * 4 * m * n / (2 * (m + n))), 1) for name, (m, n) in shapes.items()}


def threshold_ranks(spectra: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], share: float) -> dict[str, int]:
    """FLAR-SVD's ranks (Thoma et al. 2025), without its latencies: one threshold on what each layer loses of its whitened spectrum.

    The threshold is bisected to the largest total within the share; the error of a rank is known from the spectrum alone.
    """
    tails = {name: (s.square().flip(0).cumsum(0).flip(0) / s.square().sum()).sqrt() for name, s in spectra.items()}
    allowed = share * sum(4 * m * n for m, n in shapes.values())

    def ranks(threshold: float) -> dict[str, int]:
        return {name: max(int((tail > threshold).sum()), 1) for name, tail in tails.items()}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(factor_bytes(shapes[name], rank) for name, rank in ranks(middle).items())
        low, high = (low, middle) if total <= allowed else (middle, high)
    return ranks(high)


def qera(weight: Tensor, gram: Tensor, bits: int, group: int | None, rank: int) -> Made:
    """QERA-exact (Zhang et al. 2025): nearest codes, then the best low-rank rest in the metric of the inputs.

    EoRA (Liu et al. 2024) projects on the eigenvectors of XᵀX first and comes to the same factors.
    """
    codes = nearest(weight, bits, group)
    left, right = truncated(weight - codes.weight, *root_of(gram), rank)
    return Made(codes.weight + half(left) @ half(right), codes.bytes + factor_bytes(weight.shape, rank))


def caldera(
    weight: Tensor, gram: Tensor, bits: int, group: int | None, rank: int, *, factor_bits: int = 4, rounds: int = 4
) -> Made:
    """In the manner of CALDERA (Saha et al. 2024): Q by error feedback on W − LR, then L and R of W − Q rounded in turn, and again.

    Scalar levels in groups stand for its lattice codebooks, and there is no rotation beforehand; of all rounds the best is kept.
    """
    root, inverse = root_of(gram)
    rest = torch.zeros_like(weight)
    best, least = weight, float("inf")
    for _ in range(rounds):
        codes = gptq(weight - rest, gram, bits, group, ordered=True).weight
        left, right = truncated(weight - codes, root, inverse, rank)
        for _ in range(3):
            right = nearest(right, factor_bits, group).weight
            # Least squares for L in the metric, rounded; then for R with that L.
            seen = right @ gram
            left = torch.linalg.lstsq(right @ seen.T, seen @ (weight - codes).T, driver="gelsd").solution.T
            left = nearest(left.T.contiguous(), factor_bits, group).weight.T
            rest = left @ right
            lost = float(((weight - codes - rest) @ root).square().sum())
            if lost < least:
                best, least = codes + rest, lost
            right = torch.linalg.lstsq(left, weight - codes, driver="gelsd").solution
    factors = code_bytes(torch.empty(rank, weight.shape[0]), factor_bits, group, factor_bits)
    factors += code_bytes(torch.empty(rank, weight.shape[1]), factor_bits, group, factor_bits)
    return Made(best, code_bytes(weight, bits, group, bits) + factors)


Coder = Callable[[Tensor, Tensor, int, "int | None"], Made]
# By what a table says; those that want no inputs say so by ignoring them.
CODERS: dict[str, Coder] = {
    "nearest": lambda weight, gram, bits, group: nearest(weight, bits, group),
    "HQQ": lambda weight, gram, bits, group: hqq(weight, bits, group),
    "GPTQ": gptq,
    "GPTQ, act-order": lambda weight, gram, bits, group: gptq(weight, gram, bits, group, ordered=True),
}
CORRECTED: dict[str, Callable[[Tensor, Tensor, int, int | None, int], Made]] = {
    "QERA/EoRA": qera,
    "CALDERA-style": caldera,
}
LOW_RANK = ("SVD", "SVD-LLM", "FLAR-SVD")
DATA_FREE = ("nearest", "HQQ", "SVD")
