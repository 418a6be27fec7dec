"""Codes of 2 to 8 bits side by side in bytes: bit planes, row by row, as files and kernels hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.grids import Grid, dequantize_groups
from lowrank.numerics.rounding import check_bits

__all__ = ["PLANES", "decode_rows", "pack_rows", "row_bytes", "unpack_rows"]

# Widths of the planes that codes of so many bits are cut into, the lowest bits first. Each divides 8, so that no code of a plane
# crosses a byte and one shift and one mask give it back.
PLANES: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def row_bytes(columns: int, bits: int) -> int:
    """Count the bytes of a row of codes: it is filled up with zeros to a multiple of 8 codes.

    Example:
        >>> row_bytes(64, 4), row_bytes(27, 3)
        (32, 12)
    """
    return -(-columns // 8) * check_bits(bits)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers from 0 to ``2**bits − 1``, row by row.

    A row is filled up with zeros to a multiple of 8 codes and stored as planes side by side (:data:`PLANES`): first the lowest bits of
    all its codes, then the next ones. In a plane of p bits code k lies from bit k · p on, the low bits of a byte first.

    Args:
        codes: (rows, columns) of any integer dtype.
        bits: 2 to 8.

    Returns:
        (rows, row_bytes(columns, bits)) uint8.

    Raises:
        RankError: bits out of range, or a code that needs more of them.

    Example:
        >>> pack_rows(torch.tensor([[1, 15, 2]]), 4).tolist()
        [[241, 2, 0, 0]]
    """
    check_bits(bits)
    rows, columns = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise RankError(
            f"codes: {bits} bits hold 0 to {(1 << bits) - 1}, got {int(codes.min())} to {int(codes.max())}; use more bits"
        )
    filled = torch.nn.functional.pad(codes.to(torch.uint8), (0, -columns % 8))
    planes, shift = [], 0
    for width in PLANES[bits]:
        each = 8 // width
        parts = ((filled >> shift) & ((1 << width) - 1)).view(rows, filled.shape[1] // each, each)
        plane = parts[:, :, 0].clone()
        for place in range(1, each):
            plane |= parts[:, :, place] << (place * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, dim=1)


def unpack_rows(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Give the codes back that :func:`pack_rows` packed.

    Args:
        packed: (..., row_bytes(columns, bits)) uint8.
        columns: codes in a row.
        bits: 2 to 8.

    Returns:
        (..., columns) uint8.

    Raises:
        RankError: rows of another length.

    Example:
        >>> unpack_rows(pack_rows(torch.tensor([[1, 31, 2]]), 5), 3, 5).tolist()
        [[1, 31, 2]]
    """
    if packed.shape[-1] != row_bytes(columns, bits):
        raise RankError(
            f"packed: rows of {columns} codes of {bits} bits take {row_bytes(columns, bits)} bytes, got {packed.shape[-1]}"
        )
    leading, filled = packed.shape[:-1], -(-columns // 8) * 8
    codes: Tensor | None = None
    start = shift = 0
    for width in PLANES[bits]:
        each, length = 8 // width, filled * width // 8
        plane = packed[..., start : start + length]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        parts = ((plane[..., None] >> shifts) & ((1 << width) - 1)).reshape(*leading, length * each)
        codes = parts if codes is None else codes | (parts << shift)
        start, shift = start + length, shift + width
    assert codes is not None
    return codes[..., :columns]


def decode_rows(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute ``scale · (code − zero)`` of packed rows, (rows, columns) of this dtype.

    Args:
        codes: (rows, ``row_bytes(columns, bits)``) uint8.
        scale: (rows, groups).
        zero_point: (rows, ``row_bytes(groups, bits)``) uint8, packed as the codes are; ``None`` is the grid's middle.
        columns: codes in a row.

    Example:
        >>> decode_rows(pack_rows(torch.tensor([[8, 15, 0]]), 4), torch.tensor([[0.5]]), None, Grid(4), 3).tolist()
        [[0.0, 3.5, -4.0]]
    """
    zero = None if zero_point is None else unpack_rows(zero_point, grid.groups(columns), grid.bits)
    return dequantize_groups(unpack_rows(codes, columns, grid.bits), scale, zero, grid, dtype)
