"""What the layers with packed codes of 2 to 8 bits share: codes, scales of groups, perhaps zero points, and the weight they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank.errors import UsageError
from lowrank.kernels.packed import PackedWeight
from lowrank.layers.checks import FLOAT_ACTIVATIONS, dtype_from_name
from lowrank.layers.roles import CODES, SCALE, ZERO_POINT, Role, ScaleForm
from lowrank.layers.spec import LayerSpec
from lowrank.layers.weights import Codes, matrix_for
from lowrank.numerics.packing import decode_rows, pack_rows, row_bytes, unpack_rows
from lowrank.numerics.ranges import rounded_to
from lowrank.numerics.rounding import check_bits
from lowrank.numerics.rounding_methods import Grid, Rounded, dequantize_groups, nearest

__all__ = ["PackedCodes", "check_group", "empty_parts", "packed_bytes", "packed_roles", "scale_dtype_from"]

_Packed = TypeVar("_Packed", bound="PackedCodes")
GROUPS = (32, 64, 128)


def check_group(group: object) -> int | None:
    """Return the number of inputs that share a scale.

    Raises:
        UsageError: neither ``None`` (a whole row) nor 32, 64 or 128.

    Example:
        >>> check_group(64), check_group(None)
        (64, None)
    """
    if group is not None and (isinstance(group, bool) or group not in GROUPS):
        raise UsageError(
            f"group: must be None (a whole row) or one of {', '.join(map(str, GROUPS))} inputs, got {group!r}"
        )
    return group


def packed_bytes(rows: int, columns: int, grid: Grid, dtype: torch.dtype) -> int:
    """Count the bytes of a packed matrix: codes, scales and zero points.

    Args:
        dtype: of the scales.

    Example:
        >>> packed_bytes(384, 384, Grid(4, 64), torch.float16)
        78336
    """
    groups = grid.groups(columns)
    zeros = row_bytes(groups, grid.bits) if grid.zero_point else 0
    return rows * (row_bytes(columns, grid.bits) + groups * dtype.itemsize + zeros)


def packed_roles(grid: Grid) -> dict[str, Role]:
    """Say what the tensors of a packed matrix are, by the last parts of their names.

    Example:
        >>> list(packed_roles(Grid(4))), list(packed_roles(Grid(4, zero_point=True)))
        (['codes', 'scale'], ['codes', 'scale', 'zero_point'])
    """
    found = {"codes": Role(CODES, grid.bits, packed=True), "scale": Role(SCALE, signed=True)}
    return found | ({"zero_point": Role(ZERO_POINT, grid.bits, packed=True)} if grid.zero_point else {})


def empty_parts(
    rows: int, columns: int, grid: Grid, scale_dtype: torch.dtype, device: torch.device | str | None
) -> dict[str, Tensor | None]:
    """Make the tensors of a packed matrix of zeros, by the last parts of their names; no zero points are ``None``.

    Example:
        >>> {name: tensor.shape for name, tensor in empty_parts(2, 9, Grid(4), torch.float16, "meta").items() if tensor is not None}
        {'codes': torch.Size([2, 8]), 'scale': torch.Size([2, 1])}
    """
    groups = grid.groups(columns)
    codes = torch.empty(rows, row_bytes(columns, grid.bits), dtype=torch.uint8, device=device)
    if codes.device.type != "meta":
        codes.copy_(pack_rows(torch.full((1, columns), grid.middle, dtype=torch.uint8), grid.bits).expand_as(codes))
    zeros = (
        torch.zeros(rows, row_bytes(groups, grid.bits), dtype=torch.uint8, device=device) if grid.zero_point else None
    )
    return {"codes": codes, "scale": torch.ones(rows, groups, dtype=scale_dtype, device=device), "zero_point": zeros}


def scale_dtype_from(name: object, what: str) -> torch.dtype:
    """Find the dtype of scales of groups by its name.

    Args:
        what: for the message.

    Raises:
        UsageError: neither float16 nor float32.

    Example:
        >>> scale_dtype_from("float16", "scale_dtype")
        torch.float16
    """
    dtype = dtype_from_name(name)
    if dtype not in (torch.float16, torch.float32):
        raise UsageError(f"{what}: must be float16 or float32, got {name!r}")
    return dtype


class PackedCodes(Codes):
    """Base of the layers whose weight is one matrix of packed codes: ``weight = scale · (code − zero)``, group by group.

    Attributes:
        codes: (rows, bytes of a row) uint8 buffer, see :func:`lowrank.numerics.packing.pack_rows`.
        scale: (rows, groups) float16 or float32 buffer; may be negative.
        zero_point: (rows, bytes) uint8 buffer, packed like the codes; ``None`` where ``2**(bits − 1)`` is the zero of all groups.
        grid: bits, group, and whether groups have zeros of their own.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activations" and value not in (None, FLOAT_ACTIVATIONS):
            raise UsageError(
                f'activations: packed layers are weight-only, so "{FLOAT_ACTIVATIONS}", got {value!r}; int8 with a scale a row '
                "(group=None) multiplies integers"
            )
        super().__setattr__(name, value)

    def _allocate_packed(self, grid: Grid, scale_dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Register codes, scales and zero points for :attr:`matrix_shape`."""
        self.n_bits = check_bits(grid.bits, "n_bits")
        check_group(grid.group)
        self.grid = grid
        for name, tensor in empty_parts(*self.matrix_shape, grid, scale_dtype, device).items():
            self.register_buffer(name, tensor)
        self.error_bound_value = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the codes: (out, in · kernel), or (num_embeddings, embedding_dim)."""
        rows, *others = self.shape
        return rows, math.prod(others)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; ``None`` is a whole row."""
        return self.grid.group

    @property
    def spec(self) -> LayerSpec:
        """Format, bits, activations, group and zero point in one value; how the codes were chosen they do not tell."""
        return LayerSpec(
            self.format,
            None,
            self.bits,
            self.activations,
            group=self.grid.group,
            zero_point=True if self.grid.zero_point else None,
        )

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return tuple(packed_roles(self.grid))

    def scales(self) -> dict[str, ScaleForm]:
        """See :meth:`CompressedLayer.scales`."""
        rows, columns = self.matrix_shape
        return {"scale": ScaleForm((rows, self.grid.groups(columns)), self.scale.dtype, signed=True)}

    def _own_roles(self) -> dict[str, Role]:
        return packed_roles(self.grid)

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Give codes, zero points where there are any, and scale."""
        return (self.codes, self.scale) if self.zero_point is None else (self.codes, self.zero_point, self.scale)

    def packed_weight(self) -> PackedWeight:
        """Make what multiplies by these codes."""
        return PackedWeight(
            self.codes,
            self.scale,
            self.zero_point,
            bits=self.n_bits,
            group=self.grid.group,
            columns=self.matrix_shape[1],
        )

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        return decode_rows(self.codes, self.scale, self.zero_point, self.grid, self.matrix_shape[1], dtype)

    def dense_weight(self) -> Tensor:
        """Make ``scale · (code − zero)``, of the layer's shape, float32."""
        return self._decoded(torch.float32).view(self.shape)

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        weight = self._decoded(torch.float64).view(self.shape)
        return weight.T if self.looks_up else weight

    def with_weight(self: _Packed, weight: Tensor) -> _Packed:
        """Round another weight to the nearest levels of this grid; see :meth:`CompressedLayer.with_weight`.

        A weight that the scales of this layer hold exactly, its own above all, keeps them.
        """
        matrix = matrix_for(self, weight)
        matrix = matrix.T if self.looks_up else matrix
        layer = self._like(None, self.scale.device)
        kept = self._nearest_here(matrix)
        exact = torch.equal(dequantize_groups(*kept, self.grid, torch.float64), matrix.to(torch.float64))
        layer._hold(kept if exact else nearest(matrix, self.grid))
        return layer

    def _hold(self, rounded: Rounded, weight: Tensor | None = None) -> None:
        """Take codes (rows, columns) with their scales.

        Args:
            weight: that they were chosen for, from which the error bound is computed.
        """
        codes, scale, zero = rounded
        if (zero is not None) != self.grid.zero_point:
            raise UsageError(
                f"rounded: zero points are {'needed' if self.grid.zero_point else 'not'} part of {self.grid}"
            )
        self.codes = pack_rows(codes, self.n_bits)
        self.scale = scale
        self.zero_point = None if zero is None else pack_rows(zero, self.n_bits)
        if weight is not None:
            made = dequantize_groups(codes, scale, zero, self.grid, torch.float64)
            lost = torch.linalg.vector_norm(weight.detach().reshape(made.shape).to(torch.float64) - made)
            self.error_bound_value = float(lost)

    def _nearest_here(self, weight: Tensor) -> Rounded:
        """The nearest levels of the scales that the layer has: rounding what it stands for gives its own codes."""
        zero = self.zero_point
        if zero is not None:
            zero = unpack_rows(zero, self.grid.groups(self.matrix_shape[1]), self.n_bits)
        matrix = weight.detach().reshape(self.matrix_shape)
        return Rounded(rounded_to(matrix, self.scale, zero, self.grid), self.scale, zero)

    def _rounded_weights(self, floats: Any) -> dict[str, Tensor]:
        weight: Tensor = floats.get_parameter("weight")
        rounded = dequantize_groups(*self._nearest_here(weight), self.grid).to(weight.dtype).view_as(weight)
        return {"weight": weight + (rounded - weight).detach()}

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {
            "group": self.grid.group,
            "zero_point": True if self.grid.zero_point else None,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
        }

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        dtype = scale_dtype_from(config["scale_dtype"], "scale_dtype")
        own = {"group": config["group"], "zero_point": bool(config["zero_point"]), "scale_dtype": dtype}
        return super()._arguments(config) | own

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        parts = [super().extra_repr(), f"group={self.grid.group}"]
        return ", ".join([*parts, "zero_point=True"] if self.grid.zero_point else parts)
