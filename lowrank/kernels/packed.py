"""Products with weights that stay packed: codes of 2 to 8 bits in groups of inputs, decoded piece by piece.

``weight[r, k] = scale[r, k // group] · (code[r, k] − zero[r, k // group])``. The codes lie as in the file:
:mod:`lowrank.numerics.packing`. Activations are left as they are.

Three routes. On a processor with AVX2 and FMA, up to :data:`FEW_TOKENS` tokens in float32 are multiplied by the C library while codes come
out of the registers: the same bits on every such processor and with any number of threads. More tokens meet rows that the library decodes
into a buffer that stays in the cache, by torch's own float32 product (the float route: its bits are torch's). Everything else (other
devices, float64, no library) is decoded by torch, some rows at a time. The weight is never whole in floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import RankError, UsageError
from lowrank.kernels import native
from lowrank.numerics.grids import Grid
from lowrank.numerics.packing import decode_rows, row_bytes, unpack_rows
from lowrank.numerics.rounding import check_bits

__all__ = ["FEW_TOKENS", "PackedWeight"]

# Up to so many tokens a pass over the codes for every four of them is faster than decoding them first (reports/layer_speed).
FEW_TOKENS = 8
# Weights decoded at a time: 2 MiB of floats, which stay in the second-level cache of one core or two, or near it.
_DECODED = 1 << 19
_tested: dict[native.Library, bool] = {}


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
        >>> weight.product(torch.tensor([[1.0, 2.0, 1.0]]), None).tolist()
        [[3.0]]
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, group: int | None, columns: int
    ) -> None:
        check_bits(bits)
        if group not in (None, 32, 64, 128):
            raise RankError(f"group: 32, 64 or 128 inputs share a scale, or None for a whole row; got {group!r}")
        grid = Grid(bits, group, zero is not None)
        groups, rows = grid.groups(columns), codes.shape[0]
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
        self._grid, self._columns = grid, columns
        self._native: native.NativePacked | None = None
        self._fits = (
            all(tensor.is_cpu for tensor in (codes, scale))
            and codes.is_contiguous()
            and scale.is_contiguous()
            and scale.dtype in (torch.float16, torch.float32)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self._codes.shape[0], self._columns

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (..., columns) to (..., rows) of the same dtype.

        Args:
            x: floating; computed in float32, float64 in float64.
            bias: (rows,), or ``None``.

        Raises:
            UsageError: x of another width or dtype.
            ResourceError: no memory.
        """
        rows, columns = self.shape
        if x.shape[-1:] != (columns,) or not x.is_floating_point():
            raise UsageError(f"input: floating tensors of shape (..., {columns}), got {x.dtype} {tuple(x.shape)}")
        working = torch.float64 if x.dtype is torch.float64 else torch.float32
        tokens = (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), columns)).to(working)
        bias = None if bias is None else bias.to(working).contiguous()
        loaded = _ready_library() if self._fits and x.is_cpu and working is torch.float32 else None
        if loaded is None:
            result = self._by_torch(tokens, bias)
        elif tokens.shape[0] <= FEW_TOKENS:
            result = self._prepared(loaded).product(tokens if tokens.stride(-1) == 1 else tokens.contiguous(), bias)
        else:
            result = self._decoding(self._prepared(loaded), tokens, bias)
        return result.to(x.dtype).view(*x.shape[:-1], rows)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the rows that are asked for, and no others: (...) whole numbers to (..., columns).

        Example:
            >>> from lowrank.numerics.packing import pack_rows
            >>> table = PackedWeight(pack_rows(torch.tensor([[1], [3]]), 2), torch.ones(2, 1), bits=2, group=None, columns=1)
            >>> table.rows(torch.tensor([1, 0])).tolist()
            [[1.0], [-1.0]]
        """
        working = torch.promote_types(dtype, torch.float32)
        return self._decoded(ids.reshape(-1), working).to(dtype).view(*ids.shape, self._columns)

    def _prepared(self, loaded: native.Library) -> native.NativePacked:
        if self._native is None:
            grid, groups = self._grid, self._scale.shape[1]
            zero = None if self._zero is None else unpack_rows(self._zero, groups, grid.bits).contiguous()
            self._native = native.NativePacked(
                loaded,
                self._codes,
                self._scale,
                zero,
                columns=self._columns,
                bits=grid.bits,
                group=grid.span(self._columns),
            )
        return self._native

    def _decoding(self, call: native.NativePacked, x: Tensor, bias: Tensor | None) -> Tensor:
        result = x.new_empty(x.shape[0], call.rows)
        parts = self._parts()
        made = x.new_empty(parts[0].stop if parts else 0, self._columns)
        for part in parts:
            weight = made[: part.stop - part.start]
            call.decode(part.start, part.stop, weight)
            into = result[:, part]
            if bias is None:
                torch.mm(x, weight.t(), out=into)
            else:
                torch.addmm(bias[part], x, weight.t(), out=into)
        return result

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        result = x.new_empty(x.shape[0], self._codes.shape[0])
        for part in self._parts():
            result[:, part] = x @ self._decoded(part, x.dtype).t()
        return result if bias is None else result.add_(bias)

    def _decoded(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        zero = None if self._zero is None else self._zero[rows]
        return decode_rows(self._codes[rows], self._scale[rows], zero, self._grid, self._columns, dtype)

    def _parts(self) -> list[slice]:
        """Rows so many at a time that what is decoded of them stays small; as even as can be."""
        rows = self._codes.shape[0]
        count = -(-rows * self._columns // _DECODED)
        high = -(-rows // count) if count else 1
        return [slice(start, min(start + high, rows)) for start in range(0, rows, high)]


def _ready_library() -> native.Library | None:
    """Give the native library where it is there, switched on, has its instructions, and is exact; tested on the first call."""
    loaded = native.library()
    if loaded is None:
        return None
    found = _tested.get(loaded)
    if found is None:
        _tested[loaded] = found = native.NativePacked.supported(loaded) and _is_exact(loaded)
    return loaded if found else None


@torch.compiler.disable
@torch.no_grad()
def _is_exact(loaded: native.Library) -> bool:
    """Compare decoded rows bit for bit with torch, and products of whole numbers, which float32 holds, exactly."""
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        for rows, columns, group, with_zero in ((3, 70, 32, True), (5, 200, 64, False), (2, 40, None, True)):
            groups = 1 if group is None else -(-columns // group)
            codes = torch.randint(0, 256, (rows, row_bytes(columns, bits)), dtype=torch.uint8, generator=generator)
            zero = torch.randint(0, 256, (rows, row_bytes(groups, bits)), dtype=torch.uint8, generator=generator)
            scale = torch.randint(1, 4, (rows, groups), generator=generator).to(torch.float16) * -0.5
            weight = PackedWeight(codes, scale, zero if with_zero else None, bits=bits, group=group, columns=columns)
            call, every = weight._prepared(loaded), weight.rows(torch.arange(rows))
            made = torch.empty(rows, columns)
            call.decode(0, rows, made)
            x = torch.randint(-8, 9, (3, columns), generator=generator).float()
            if not torch.equal(made, every) or not torch.equal(call.product(x, None), x @ every.t()):
                return False
    return True
