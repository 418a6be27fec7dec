"""How one matrix of a layer with several is held: codes of 2 to 8 bits in groups, codes of 10 to 16 bits with a scale a row, or floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import UsageError
from lowrank.layers.checks import dtype_from_name
from lowrank.layers.packed import check_group, packed_bytes, packed_roles
from lowrank.layers.roles import CODES, FLOAT, SCALE, Role, ScaleForm
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.packing import decode_rows, pack_rows, row_bytes, unpack_rows
from lowrank.numerics.rounding import require_finite
from lowrank.numerics.rounding_methods import Grid, nearest, scale_dtype

__all__ = ["WIDE_BITS", "MatrixStore"]

# Codes of more than a byte: their high 8 bits stand in one tensor, the rest in another.
WIDE_BITS = (10, 11, 12, 14, 16)
_BYTE = 8


@dataclass(frozen=True)
class MatrixStore:
    """Describe the tensors that hold one matrix.

    ``codes`` and ``scale`` of 2 to 8 bits are those of :class:`lowrank.layers.packed.PackedCodes` without zero points. Codes of 10
    to 16 bits are symmetric, ``weight = scale · (2^(bits − 8) · codes + low − 2^(bits − 1))``, with a float32 scale a row:
    matrices whose errors a model amplifies, as recurrent ones do, may need more than 256 levels and still no floats. ``floats`` is
    the matrix itself.

    Attributes:
        spec: its bits, perhaps a group; without bits the matrix is held as it is.
        rows, columns: of the matrix.
        scale_dtype: of the scales.

    Raises:
        UsageError: a spec that no matrix is held in.

    Example:
        >>> store = MatrixStore.of(torch.ones(4, 64), LayerSpec("int4", bits=4, group=32))
        >>> store.stored_bytes(torch.float32), sorted(store.tensors(torch.float32))
        (144, ['codes', 'scale'])
    """

    spec: LayerSpec
    rows: int
    columns: int
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dense:
            return
        bits = self.spec.bits
        if self.wide:
            if self.spec.group is not None or self.scale_dtype is not torch.float32:
                raise UsageError(f"parts: {bits} bits have a float32 scale a row, got group {self.spec.group!r}")
            return
        assert bits is not None
        if self.scale_dtype not in (torch.float16, torch.float32):
            raise UsageError(f"parts: scales must be float16 or float32, got {self.scale_dtype}")
        check_group(self.spec.group)
        Grid(bits, self.spec.group)

    @classmethod
    def of(cls, weight: Tensor, spec: LayerSpec) -> MatrixStore:
        """Describe how a matrix, (rows, columns), is held in a spec."""
        rows, columns = weight.shape
        if spec.bits is None:
            return cls(spec, rows, columns)
        if spec.bits in WIDE_BITS:
            return cls(spec, rows, columns, torch.float32)
        probe = cls(spec, rows, columns)
        return cls(spec, rows, columns, scale_dtype(weight, probe.grid))

    @property
    def dense(self) -> bool:
        """Whether the matrix is held as it is."""
        return self.spec.bits is None

    @property
    def wide(self) -> bool:
        """Whether its codes take more than a byte."""
        return self.spec.bits in WIDE_BITS

    @property
    def grid(self) -> Grid:
        """The levels of its codes, of at most 8 bits."""
        assert self.spec.bits is not None
        return Grid(self.spec.bits, self.spec.group)

    @property
    def low_bits(self) -> int:
        """Bits of a wide code below its high byte."""
        return (self.spec.bits or _BYTE) - _BYTE

    def tensors(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give shape and dtype of each tensor by the last part of its name.

        Args:
            dtype: of the model.
        """
        if self.dense:
            return {"floats": ((self.rows, self.columns), dtype)}
        bits = _BYTE if self.wide else self.grid.bits
        groups = 1 if self.wide else self.grid.groups(self.columns)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.rows, row_bytes(self.columns, bits)), torch.uint8),
            "scale": ((self.rows, groups), self.scale_dtype),
        }
        if self.wide:
            found["low"] = ((self.rows, row_bytes(self.columns, self.low_bits)), torch.uint8)
        return found

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Count the bytes of the tensors.

        Args:
            dtype: of the model.
        """
        if self.dense:
            return self.rows * self.columns * dtype.itemsize
        if self.wide:
            high, low = row_bytes(self.columns, _BYTE), row_bytes(self.columns, self.low_bits)
            return self.rows * (high + low + self.scale_dtype.itemsize)
        return packed_bytes(self.rows, self.columns, self.grid, self.scale_dtype)

    def forms(self) -> dict[str, ScaleForm]:
        """Say what the scale looks like, if there is one."""
        if self.dense:
            return {}
        groups = 1 if self.wide else self.grid.groups(self.columns)
        return {"scale": ScaleForm((self.rows, groups), self.scale_dtype, signed=not self.wide)}

    def roles(self) -> dict[str, Role]:
        """Say what each tensor is."""
        if self.dense:
            return {"floats": Role(FLOAT)}
        if not self.wide:
            return packed_roles(self.grid)
        low = Role(CODES, self.low_bits, packed=True)
        return {"codes": Role(CODES, _BYTE, packed=True), "scale": Role(SCALE), "low": low}

    def encode(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Hold a matrix, (rows, columns), rounded to the nearest levels.

        Raises:
            NumericsError: NaN or Inf in it.
        """
        weight = require_finite(weight.detach(), name)
        if self.dense:
            return {"floats": weight.clone()}
        if not self.wide:
            codes, scale, _ = nearest(weight, self.grid)
            return {"codes": pack_rows(codes, self.grid.bits), "scale": scale.to(self.scale_dtype)}
        middle = 1 << (self.low_bits + _BYTE - 1)
        exact = weight.double()
        largest = exact.abs().amax(dim=1, keepdim=True)
        scale = (largest / (middle - 1)).float()
        scale = torch.where(scale > 0, scale, 1.0)
        whole = (exact / scale.double()).round_().clamp_(-middle, middle - 1).to(torch.int32) + middle
        high, low = (whole >> self.low_bits).to(torch.uint8), (whole & ((1 << self.low_bits) - 1)).to(torch.uint8)
        return {"codes": pack_rows(high, _BYTE), "scale": scale, "low": pack_rows(low, self.low_bits)}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Make the matrix, (rows, columns), out of its tensors.

        Args:
            dtype: float32 or float64.
        """
        if self.dense:
            return tensors["floats"].to(dtype)
        if not self.wide:
            return decode_rows(tensors["codes"], tensors["scale"], None, self.grid, self.columns, dtype)
        high = unpack_rows(tensors["codes"], self.columns, _BYTE).to(dtype)
        low = unpack_rows(tensors["low"], self.columns, self.low_bits).to(dtype)
        # Whole numbers below 2^16, exact in either dtype.
        whole = high * (1 << self.low_bits) + low - (1 << (self.low_bits + _BYTE - 1))
        return whole * tensors["scale"].to(dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the spec and the dtype of the scales as one map."""
        return self.spec.to_json() | {"scale_dtype": str(self.scale_dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], shape: tuple[int, ...]) -> MatrixStore:
        """Read :meth:`to_json`'s map back."""
        rows, columns = shape
        return cls(LayerSpec.from_json(data), rows, columns, dtype_from_name(data["scale_dtype"]))
