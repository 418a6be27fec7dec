"""Geometry of convolutions: padding, output sizes, and the patches under the kernel as rows of a matrix."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.errors import UsageError, is_whole

__all__ = ["ConvGeometry", "pad_input", "patches", "sample_patches"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvGeometry:
    """Where the kernel of an ``nn.Conv1d`` or ``nn.Conv2d`` goes.

    Attributes:
        kernel_size, stride, dilation: one number a spatial dimension.
        padding: one number a dimension, on both sides; or ``"same"`` or ``"valid"``.
        groups: channels are cut into so many runs that never meet.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> geometry = ConvGeometry.of(torch.nn.Conv2d(4, 8, (2, 3), padding="same"))
        >>> geometry.pads, geometry.output_size((10, 7))
        (((0, 1), (1, 1)), (10, 7))
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        dims = len(self.kernel_size)
        for name, low, default in (("kernel_size", 1, ()), ("stride", 1, (1,)), ("dilation", 1, (1,))):
            object.__setattr__(self, name, _sizes(getattr(self, name) or default * dims, dims, low, name))
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise UsageError(f'padding: must be whole numbers, "same" or "valid", got {self.padding!r}')
            if self.padding == "same" and set(self.stride) != {1}:
                raise UsageError(f'padding: "same" is defined for a stride of 1 only, got stride {self.stride}')
        else:
            object.__setattr__(self, "padding", _sizes(self.padding or (0,) * dims, dims, 0, "padding"))
        if not is_whole(self.groups, 1):
            raise UsageError(f"groups: must be an integer of at least 1, got {self.groups!r}")
        if self.padding_mode not in PADDING_MODES:
            raise UsageError(f"padding_mode: must be one of {', '.join(PADDING_MODES)}, got {self.padding_mode!r}")

    @classmethod
    def of(cls, conv: Any) -> ConvGeometry:
        """Read off the geometry of a convolution, or of a layer that has taken the place of one.

        Raises:
            UsageError: another module.
        """
        known = getattr(conv, "geometry", None)
        if isinstance(known, ConvGeometry):
            return known
        # By what it holds, since only arrays are known here: a transposed one, a pooling or a packed one is another thing.
        sizes, weight = getattr(conv, "kernel_size", ()), getattr(conv, "weight", None)
        plain = getattr(conv, "transposed", None) is False and isinstance(weight, Tensor)
        if not plain or len(sizes) not in (1, 2):
            raise UsageError(f"conv: must be an nn.Conv1d or nn.Conv2d, got {type(conv).__name__}")
        # Sizes that a model worked out may be numpy's integers.
        whole = [tuple(map(operator.index, sizes)) for sizes in (conv.kernel_size, conv.stride, conv.dilation)]
        padding = conv.padding if isinstance(conv.padding, str) else tuple(map(operator.index, conv.padding))
        return cls(whole[0], whole[1], padding, whole[2], operator.index(conv.groups), conv.padding_mode)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """(before, after) of each spatial dimension; "same" puts the odd one after, as torch does."""
        if self.padding == "valid":
            return ((0, 0),) * self.dims
        if self.padding == "same":
            totals = [step * (size - 1) for size, step in zip(self.kernel_size, self.dilation, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        return tuple((int(size), int(size)) for size in self.padding)

    @property
    def spans(self) -> tuple[int, ...]:
        """Width of the input under the kernel, dilation included."""
        return tuple(step * (size - 1) + 1 for size, step in zip(self.kernel_size, self.dilation, strict=True))

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Compute the spatial size of the output for one of the input.

        Raises:
            UsageError: the kernel is larger than the padded input.
        """
        padded = [length + sum(pads) for length, pads in zip(size, self.pads, strict=True)]
        if any(length < span for length, span in zip(padded, self.spans, strict=True)):
            raise UsageError(
                f"input: of spatial size {tuple(size)}, {tuple(padded)} with padding, is smaller than the kernel, "
                f"{self.spans}"
            )
        return tuple(
            (length - span) // step + 1 for length, span, step in zip(padded, self.spans, self.stride, strict=True)
        )

    def along(self, dim: int) -> ConvGeometry:
        """Make the same along one spatial dimension, with a kernel of 1 along the others: half of a separable convolution.

        Example:
            >>> ConvGeometry((3, 5), (1, 2), (1, 2)).along(1)
            ConvGeometry(kernel_size=(1, 5), stride=(1, 2), padding=(0, 2), dilation=(1, 1), groups=1, padding_mode='zeros')
        """

        def keep(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if place == dim else other for place, value in enumerate(values))

        return replace(
            self,
            kernel_size=keep(self.kernel_size, 1),
            stride=keep(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else keep(self.padding, 0),
            dilation=keep(self.dilation, 1),
        )

    def pointwise(self) -> ConvGeometry:
        """Make a kernel of 1 and nothing else, with the same groups."""
        return ConvGeometry((1,) * self.dims, groups=self.groups)

    def to_json(self) -> dict[str, Any]:
        """Write it as what JSON can hold; :meth:`from_json` makes the same geometry again."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConvGeometry:
        """Read what :meth:`to_json` wrote.

        Raises:
            UsageError: a key is missing, or a value out of range.
        """
        names = cls.__dataclass_fields__
        missing = sorted(set(names) - set(data))
        if missing:
            raise UsageError(f"geometry: {', '.join(missing)} missing")
        found: dict[str, Any] = {
            name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names
        }
        return cls(**found)


def _sizes(values: Any, dims: int, low: int, name: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) != dims or dims == 0:
        raise UsageError(f"{name}: must be {dims or 'one or two'} whole numbers, got {values!r}")
    if not all(is_whole(value, low) for value in values):
        raise UsageError(f"{name}: every number must be an integer of at least {low}, got {values!r}")
    return values


def pad_input(x: Tensor, geometry: ConvGeometry, value: float = 0.0) -> Tensor:
    """Put the margins around the input; gives the input itself where there are none.

    Args:
        x: (B, channels, *size), any dtype that torch can pad.
        geometry: of the convolution.
        value: in the margins, where ``padding_mode`` is ``"zeros"``.

    Example:
        >>> pad_input(torch.ones(1, 1, 2), ConvGeometry((3,), padding=(1,))).tolist()
        [[[0.0, 1.0, 1.0, 0.0]]]
    """
    widths = [width for pads in reversed(geometry.pads) for width in pads]
    if not any(widths):
        return x
    if geometry.padding_mode == "zeros":
        return F.pad(x, widths, value=value)
    return F.pad(x, widths, mode=geometry.padding_mode)


def patches(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Cut out what lies under the kernel at each of its positions, in the order of ``weight.flatten(1)``; all groups.

    Args:
        x: (B, channels, *size), or (channels, *size) for one sample.

    Returns:
        (B, positions, channels · kernel), a copy; B is 1 for one sample.

    Raises:
        UsageError: the input has another number of dimensions, or is smaller than the kernel.

    Example:
        >>> patches(torch.arange(4.0).view(1, 1, 4), ConvGeometry((2,))).tolist()
        [[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]]
    """
    found = _windows(x, geometry)
    batch, *positions = found.shape[: 1 + geometry.dims]
    return found.reshape(batch, math.prod(positions), found.shape[1 + geometry.dims :].numel())


def sample_patches(x: Tensor, geometry: ConvGeometry, limit: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``limit`` patches at random places of random samples, each place at most once.

    Args:
        x: as for :func:`patches`.
        limit: 1 or more.
        generator: of the draw, on the CPU.

    Returns:
        (limit or fewer, channels · kernel).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> sample_patches(torch.ones(2, 3, 8, 8), ConvGeometry((3, 3)), 5, generator).shape
        torch.Size([5, 27])
    """
    found = _windows(x, geometry)
    places = found.shape[: 1 + geometry.dims]
    drawn = torch.randperm(places.numel(), generator=generator)[:limit]
    # In order, so that memory is read in order.
    where = torch.unravel_index(drawn.sort().values.to(x.device), places)
    return found[where].flatten(1)


def _windows(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Give (B, *positions, channels, *kernel), a view of the padded input."""
    dims = geometry.dims
    if x.ndim == dims + 1:
        x = x[None]
    if x.ndim != dims + 2:
        raise UsageError(
            f"input: must be (B, channels, {dims} spatial sizes) or the same without B, got shape {tuple(x.shape)}"
        )
    geometry.output_size(x.shape[2:])
    x = pad_input(x, geometry)
    for dim in range(dims):
        x = x.unfold(2 + dim, geometry.spans[dim], geometry.stride[dim])[..., :: geometry.dilation[dim]]
    return x.movedim(1, 1 + dims)
