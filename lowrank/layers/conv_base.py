"""What the layers in place of convolutions share: geometry, arguments, the source, and the way back to a dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import RankError, UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import check_size
from lowrank.layers.source import error_in
from lowrank.numerics.convolutions import ConvGeometry, pad_input
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.rounding import require_finite
from lowrank.numerics.sampled_moments import moment_squares

__all__ = ["ConvLayer", "conv_parts", "float_conv", "kernel_error"]

Sizes = int | tuple[int, ...]


class ConvLayer(CompressedLayer):
    """Base of the layers that take the place of ``nn.Conv1d`` or ``nn.Conv2d``.

    Attributes:
        geometry: where the kernel goes.
        in_channels, out_channels: of the layer.
    """

    dims: ClassVar[int]
    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    bias: nn.Parameter | None

    def _set_geometry(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes | str,
        dilation: Sizes,
        groups: int,
        padding_mode: str,
    ) -> None:
        self.in_channels = check_size(in_channels, "in_channels")
        self.out_channels = check_size(out_channels, "out_channels")
        self.geometry = ConvGeometry(
            self._sizes(kernel_size, "kernel_size"),
            self._sizes(stride, "stride"),
            padding if isinstance(padding, str) else self._sizes(padding, "padding"),
            self._sizes(dilation, "dilation"),
            groups,
            padding_mode,
        )
        if in_channels % groups or out_channels % groups:
            raise RankError(
                f"groups: must divide in_channels and out_channels, {in_channels} and {out_channels}, got {groups}"
            )

    def _sizes(self, value: Sizes, name: str) -> tuple[int, ...]:
        sizes = value if isinstance(value, tuple) else (value,) * self.dims
        if len(sizes) != self.dims:
            raise UsageError(f"{name}: {self.kind} takes one number or {self.dims}, got {value!r}")
        return sizes

    @property
    def groups(self) -> int:
        """Into so many runs the channels are cut."""
        return self.geometry.groups

    # As nn.Conv1d and nn.Conv2d call them, for code that reads a layer.

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Sizes of the dense kernel."""
        return self.geometry.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Steps of the kernel."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, ...] | str:
        """Margins, or "same" or "valid"."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """Distances between the kernel's entries."""
        return self.geometry.dilation

    @property
    def padding_mode(self) -> str:
        """What stands in the margins."""
        return self.geometry.padding_mode

    @property
    def transposed(self) -> bool:
        """Never."""
        return False

    @property
    def output_padding(self) -> tuple[int, ...]:
        """Zeros: only transposed convolutions have any."""
        return (0,) * self.dims

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *kernel_size), of the dense weight."""
        return self.out_channels, self.in_channels // self.groups, *self.geometry.kernel_size

    def _batched(self, x: Tensor) -> Tensor:
        """(B, in, *size), B = 1 for one sample.

        Raises:
            UsageError: not an input for this layer.
        """
        if x.ndim == self.dims + 1:
            x = x[None]
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise UsageError(
                f"input: {self.kind} takes floating tensors of {self.in_channels} channels and {self.dims} spatial "
                f"sizes, (B, {self.in_channels}, …) or without B; got {x.dtype} {tuple(x.shape)}"
            )
        return x

    def dense_weight(self) -> Tensor:
        """Give the kernel that this layer stands for, (out, in / groups, *kernel)."""
        raise NotImplementedError

    def _dense(self, device: torch.device) -> nn.Module:
        """``nn.Conv1d`` or ``nn.Conv2d`` of the same kernel and bias."""
        geometry = self.geometry
        # Not initialised: nothing is drawn from the caller's random numbers.
        conv: nn.Module = torch.nn.utils.skip_init(
            (nn.Conv1d, nn.Conv2d)[self.dims - 1],
            self.in_channels,
            self.out_channels,
            geometry.kernel_size,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            bias=self.bias is not None,
            padding_mode=geometry.padding_mode,
            device=device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            conv.get_parameter("weight").copy_(self.dense_weight())
            if self.bias is not None:
                conv.get_parameter("bias").copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return conv.train(self.training)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"bias": self.bias is not None, "geometry": self.geometry.to_json()}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments that a configuration holds for every convolution.

        Raises:
            UsageError: shape and geometry do not belong together.
        """
        geometry = ConvGeometry.from_json(config["geometry"])
        outputs, in_group, *kernel = config["shape"]
        if tuple(kernel) != geometry.kernel_size or geometry.dims != cls.dims:
            raise UsageError(f"shape: {config['shape']} is not a {cls.kind} with a kernel of {geometry.kernel_size}")
        sizes = cls._as_arguments(geometry, in_group * geometry.groups, outputs)
        return super()._arguments(config) | sizes | {"bias": config["bias"]}

    @staticmethod
    def _as_arguments(geometry: ConvGeometry, in_channels: int, out_channels: int) -> dict[str, Any]:
        return {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": geometry.kernel_size,
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "groups": geometry.groups,
            "padding_mode": geometry.padding_mode,
        }

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        geometry = self.geometry
        shown = [str(self.in_channels), str(self.out_channels), f"kernel_size={geometry.kernel_size}"]
        plain = ConvGeometry(geometry.kernel_size)
        for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
            if getattr(geometry, name) != getattr(plain, name):
                shown.append(f"{name}={getattr(geometry, name)!r}")
        if self.rank is not None:
            shown.append(f"rank={self.rank}")
        return ", ".join([*shown, f"bias={self.bias is not None}"])


def conv_parts(conv: nn.Module, dims: int) -> tuple[Tensor, Tensor | None, ConvGeometry]:
    """Weight, bias and geometry of an ``nn.Conv1d`` (``dims`` 1) or ``nn.Conv2d`` (2).

    Raises:
        UsageError: another module, or a weight that is not a floating tensor in memory.
        NumericsError: NaN or Inf in the weight.
    """
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    if not isinstance(conv, kind):
        raise UsageError(f"conv: must be an nn.{kind.__name__}, got {type(conv).__name__}")
    weight = conv.weight
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise UsageError(
            f"conv: its weight is {weight.dtype} on {weight.device}; a floating weight with values is needed"
        )
    require_finite(weight.detach(), "weight")
    return weight, conv.bias, ConvGeometry.of(conv)


def float_conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Convolve (B, in, *size) with torch, margins as ``geometry`` has them.

    Example:
        >>> float_conv(torch.ones(1, 1, 3), torch.ones(1, 1, 2), None, ConvGeometry((2,), padding="same")).tolist()
        [[[2.0, 2.0, 1.0]]]
    """
    function = (F.conv1d, F.conv2d)[geometry.dims - 1]
    padding = [before for before, _ in geometry.pads]
    if geometry.padding_mode != "zeros" or any(before != after for before, after in geometry.pads):
        # torch would pad with a copy too, and warn about it.
        x, padding = pad_input(x, geometry), [0] * geometry.dims
    return function(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def kernel_error(
    weight: Tensor,
    approximation: Tensor,
    statistics: InputStatistics | None = None,
    *,
    groups: int = 1,
    centred: bool = False,
    ridge: float = 0.0,
) -> float:
    """Compute ‖W − W'‖ / ‖W‖ of two kernels (out, in / groups, *kernel), in the norm of the patches where statistics are given.

    Example:
        >>> kernel_error(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), groups=2)
        1.0
    """
    if statistics is None or statistics.count == 0:
        return error_in(weight.flatten(1), approximation.flatten(1), None)
    blocks = [statistics.block(index, groups) for index in range(groups)]
    moments = [block.metric(centred=centred, ridge=ridge).to(weight.device) for block in blocks]
    kernel, other = (each.detach().double().flatten(1).unflatten(0, (groups, -1)) for each in (weight, approximation))
    lost, whole = (
        math.fsum(float(moment_squares(part, moment).sum()) for part, moment in zip(parts, moments, strict=True))
        for parts in (kernel - other, kernel)
    )
    if whole <= 0.0:
        return 0.0 if lost <= 0.0 else math.inf
    return math.sqrt(max(lost, 0.0) / whole)
