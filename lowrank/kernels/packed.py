"""Products with weights that stay packed: codes of 2 to 8 bits in groups of inputs, decoded piece by piece.

``weight[r, k] = scale[r, k // group] · (code[r, k] − zero[r, k // group])``. The codes lie as in the file:
:mod:`lowrank.numerics.packing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import RankError, UsageError
from lowrank.kernels.activations import quantize_tokens
from lowrank.numerics.packing import row_bytes, unpack_rows
from lowrank.numerics.rounding import check_bits

__all__ = ["PackedWeight"]

# Inputs that share a step where the weight has one scale a row: 255 · 255 · 128 < 2²⁴, so that float32 holds every sum.
_BLOCK = 128
# Weights decoded at a time by torch: they stay in the cache, and no matrix is ever whole in floats.
_DECODED = 1 << 19


class PackedWeight:
    """A matrix of packed codes, and products with it.

    Args:
        codes: (rows, ``row_bytes(columns, bits)``) uint8, as :func:`lowrank.numerics.packing.pack_rows` packs them.
        scale: (rows, groups) float16 or float32, of any sign; ``groups = ceil(columns / group)``, 1 without groups.
        zero: (rows, ``row_bytes(groups, bits)``) uint8, packed as the codes are; ``None`` for ``2**(bits − 1)`` everywhere.
        bits: 2 to 8.
        group: inputs that share a scale: 32, 64 or 128; ``None`` for one scale a row.
        columns: inputs.

    Raises:
        RankError: bits or group out of range, or tensors of other shapes.

    Example:
        >>> from lowrank.numerics.packing import pack_rows
        >>> codes = pack_rows(torch.tensor([[8, 15, 0]]), 4)
        >>> weight = PackedWeight(codes, torch.tensor([[0.5]]), None, bits=4, group=None, columns=3)
        >>> weight.product(torch.tensor([[1.0, 2.0, 1.0]]), None, "float").tolist()
        [[3.0]]
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, group: int | None, columns: int
    ) -> None:
        check_bits(bits)
        if group not in (None, 32, 64, 128):
            raise RankError(f"group: 32, 64 or 128 inputs share a scale, or None for a whole row; got {group!r}")
        groups = 1 if group is None else -(-columns // group)
        rows = codes.shape[0]
        expected = {"codes": (rows, row_bytes(columns, bits)), "scale": (rows, groups)}
        given = {"codes": tuple(codes.shape), "scale": tuple(scale.shape)}
        if zero is not None:
            expected["zero"], given["zero"] = (rows, row_bytes(groups, bits)), tuple(zero.shape)
        for name, shape in expected.items():
            if given[name] != shape:
                raise RankError(
                    f"{name}: {rows} rows of {columns} codes of {bits} bits in groups of {group} take {shape}, got {given[name]}"
                )
        self._codes, self._scale, self._zero = codes, scale, zero
        self._bits, self._columns = bits, columns
        self._group = group
        self._block = _BLOCK if group is None else group

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self._codes.shape[0], self._columns

    def product(self, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
        """Map (..., columns) to (..., rows) of the same dtype.

        Args:
            x: floating; computed in float32 (``"float"`` with float64 tokens: in float64).
            bias: (rows,), or ``None``.
            activations: ``"float"`` takes tokens as they are; ``"int8"`` rounds each group of a token to int8 with a step and
                an offset of its own (blocks of 128 where the weight has one scale a row).

        Raises:
            UsageError: x of another width or dtype, or unknown activations.
        """
        rows, columns = self.shape
        if x.shape[-1:] != (columns,) or not x.is_floating_point():
            raise UsageError(f"input: floating tensors of shape (..., {columns}), got {x.dtype} {tuple(x.shape)}")
        if activations not in ("float", "int8"):
            raise UsageError(f"activations: 'float' or 'int8', got {activations!r}")
        working = torch.float64 if x.dtype is torch.float64 and activations == "float" else torch.float32
        tokens = x.reshape(x.shape[:-1].numel(), columns).to(working)
        result = self._float_product(tokens) if activations == "float" else self._integer_product(tokens)
        if bias is not None:
            result.add_(bias.to(working))
        return result.to(x.dtype).view(*x.shape[:-1], rows)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the rows that are asked for, and no others: (...) whole numbers to (..., columns).

        Example:
            >>> from lowrank.numerics.packing import pack_rows
            >>> table = PackedWeight(pack_rows(torch.tensor([[1], [3]]), 2), torch.ones(2, 1), bits=2, group=None, columns=1)
            >>> table.rows(torch.tensor([1, 0])).tolist()
            [[1.0], [-1.0]]
        """
        flat = ids.reshape(-1)
        zero = None if self._zero is None else self._zero[flat]
        decoded = self._decoded(self._codes[flat], self._scale[flat], zero, dtype)
        return decoded.view(*ids.shape, self._columns)

    def _float_product(self, x: Tensor) -> Tensor:
        rows, columns = self.shape
        result = x.new_empty(x.shape[0], rows)
        for part in self._parts(columns):
            zero = None if self._zero is None else self._zero[part]
            result[:, part] = x @ self._decoded(self._codes[part], self._scale[part], zero, x.dtype).t()
        return result

    def _integer_product(self, x: Tensor) -> Tensor:
        """Exact sums of the groups, each times the weight's scale and the token's step, added one after the other in float32."""
        rows, columns = self.shape
        tokens, block = x.shape[0], self._block
        blocks = -(-columns // block)
        filled = torch.nn.functional.pad(x, (0, blocks * block - columns)).view(tokens * blocks, block)
        codes, step, offset = quantize_tokens(filled)
        assert offset is not None
        # Zero is a code, so what a last short group is filled up with adds nothing.
        left = (codes - offset).view(tokens, blocks, block).transpose(0, 1)
        step = step.view(tokens, blocks)
        result = x.new_zeros(tokens, rows)
        for part in self._parts(max(blocks * max(block, tokens), 1)):
            zero = None if self._zero is None else self._zero[part]
            whole = self._whole(self._codes[part], zero, torch.float32)
            whole = torch.nn.functional.pad(whole, (0, blocks * block - columns)).view(-1, blocks, block)
            sums = torch.bmm(left, whole.permute(1, 2, 0))
            scale = self._scale[part].float().expand(-1, blocks)
            total = result[:, part]
            for at in range(blocks):
                total += sums[at].mul_(scale[:, at]).mul_(step[:, at, None])
        return result

    def _parts(self, each: int) -> list[slice]:
        """Rows so many at a time that what is derived from them, ``each`` numbers a row, stays small."""
        rows = self._codes.shape[0]
        high = max(1, _DECODED // max(each, 1))
        return [slice(start, min(start + high, rows)) for start in range(0, rows, high)]

    def _decoded(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        working = torch.promote_types(dtype, torch.float32)
        spread = self._spread(scale.to(working))
        return self._whole(codes, zero, working).mul_(spread).to(dtype)

    def _whole(self, codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Codes less their zero points: (rows, columns)."""
        whole = unpack_rows(codes, self._columns, self._bits).to(dtype)
        if zero is None:
            return whole.sub_(float(1 << (self._bits - 1)))
        groups = self._scale.shape[1]
        return whole.sub_(self._spread(unpack_rows(zero, groups, self._bits).to(dtype)))

    def _spread(self, of_groups: Tensor) -> Tensor:
        """(rows, groups) to a number for each column, or one for all of them."""
        if self._group is None:
            return of_groups
        return of_groups.repeat_interleave(self._group, dim=1)[:, : self._columns]
