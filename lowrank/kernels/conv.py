"""Convolutions of int8 codes: each sample rounded with one step and one offset, exact integer sums, and back to floats.

Zero is a code, so zeros around the image change nothing. The native library takes the rows of the product from the
padded image of codes; torch's route unfolds it. Both do the same float operations in the same order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels import integer, native
from lowrank.kernels.activations import quantize_tokens, to_float
from lowrank.kernels.linear import LARGE_SCALE, ROOM, ready_library
from lowrank.numerics.convolutions import ConvGeometry, pad_input, patches

__all__ = ["IntegerConv"]

# 255 · 128 · 514 < 2²⁴: float32 holds every partial sum exactly.
_FLOAT_EXACT = 514
# Bytes of unfolded codes at a time.
_UNFOLDED = 1 << 26
_tested: dict[native.Library, bool] = {}


class IntegerConv:
    """The codes of a convolution and what is derived from them; made anew when they change.

    Args:
        codes: (out, in / groups, *kernel) int8, one or two spatial dimensions.
        scale: (out,) float32.
        geometry: of the convolution.

    Example:
        >>> codes = torch.tensor([[[2, 1]]], dtype=torch.int8)
        >>> conv = IntegerConv(codes, torch.tensor([0.5]), ConvGeometry((2,), padding=(1,)))
        >>> conv.product(torch.tensor([[[254.0, 127.0]]]), None).tolist()
        [[[127.0, 317.5, 127.0]]]
    """

    def __init__(self, codes: Tensor, scale: Tensor, geometry: ConvGeometry) -> None:
        self._codes = codes
        self._scale = scale
        self._geometry = geometry
        self._sums = codes.flatten(1).sum(dim=1, dtype=torch.int32)
        self._room = None if float(scale.max()) <= LARGE_SCALE else ROOM
        # Of the padded input.
        self._bare = replace(geometry, padding=(0,) * geometry.dims, padding_mode="zeros")
        # Of the last input: working the size out costs as much as a small convolution.
        self._sizes: tuple[torch.Size, tuple[int, ...]] = (torch.Size(), ())
        self._native: native.NativeConv | None = None
        self._fits = (
            self._room is None
            and geometry.groups == 1
            and geometry.dims <= 2
            and codes[0].numel() <= native.LONGEST
            and codes.is_cpu
            and codes.dtype is torch.int8
            and scale.is_cpu
            and scale.dtype is torch.float32
        )

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (B, in, *size) float32 to (B, out, *output size) float32.

        Args:
            bias: (out,) float32, or ``None``.

        Raises:
            UsageError: the padded input is smaller than the kernel.
            ResourceError: no memory for the codes of the samples.
        """
        before, size = self._sizes
        if x.shape[2:] != before:
            size = self._geometry.output_size(x.shape[2:])
            self._sizes = x.shape[2:], size
        if self._fits and x.is_cpu and x.dtype is torch.float32 and (loaded := ready_library()) and _conv_ready(loaded):
            integer.count(loaded.route)
            return self._native_product(loaded, x, bias, size)
        return self._torch_product(x, bias, size)

    def _native_product(self, loaded: native.Library, x: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
        padded = self._geometry.padding_mode != "zeros"
        call = self._native
        if call is None:
            call = native.NativeConv(loaded, self._codes, self._scale, self._bare if padded else self._geometry)
            self._native = call
        return call(pad_input(x, self._geometry) if padded else x, bias, size)

    def _torch_product(self, x: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
        x = pad_input(x, self._geometry)
        codes, step, offset = quantize_tokens(x.flatten(1))
        assert offset is not None
        sums = self._integer_sums(codes.view(x.shape), offset)
        if self._room is not None:
            sums.mul_(self._room)
            step.div_(self._room)
        result = sums.mul_(self._scale).mul_(step[:, :, None])
        if bias is not None:
            result.add_(bias)
        return result.transpose(1, 2).reshape(len(x), len(self._codes), *size).contiguous()

    def _integer_sums(self, codes: Tensor, offset: Tensor) -> Tensor:
        """Give (B, positions, out) as float32, the offset of each sample taken off."""
        groups, length = self._geometry.groups, self._codes[0].numel()
        if groups > 1 and length <= _FLOAT_EXACT and codes.is_cpu:
            conv = (F.conv1d, F.conv2d)[self._geometry.dims - 1]
            values = codes.to(torch.float32).sub_(offset.view(-1, *(1 for _ in codes.shape[1:])))
            weight = self._codes.to(torch.float32)
            sums = conv(values, weight, None, self._bare.stride, 0, self._bare.dilation, groups)
            return sums.flatten(2).transpose(1, 2).contiguous()
        weights = self._codes.flatten(1).chunk(groups)
        positions = math.prod(self._bare.output_size(codes.shape[2:]))
        most = max(1, _UNFOLDED // max(1, positions * length * groups))
        parts = []
        for some in codes.split(most) if len(codes) else (codes,):
            rows = patches(some, self._bare).reshape(len(some) * positions, groups, length)
            products = [integer.int_matmul(rows[:, i].contiguous(), weight) for i, weight in enumerate(weights)]
            parts.append(torch.cat(products, dim=1).view(len(some), positions, len(self._codes)))
        sums = torch.cat(parts)
        if length > native.LONGEST:
            # The corrected sum may leave int32.
            sums = sums.to(torch.int64)
        sums.addcmul_(offset[:, :, None].to(sums.dtype), self._sums.to(sums.dtype), value=-1)
        return to_float(sums)


def _conv_ready(loaded: native.Library) -> bool:
    """Tell whether the native convolution is exact here; tested on the first call."""
    found = _tested.get(loaded)
    if found is None:
        _tested[loaded] = found = _is_exact(loaded)
    return found


@torch.compiler.disable
@torch.no_grad()
def _is_exact(loaded: native.Library) -> bool:
    """Compare bit for bit with torch's route: full-range codes, on geometries that take different loops."""
    generator = torch.Generator().manual_seed(0)
    for batch, shape, geometry in (
        (1, (16, 3, 3, 3), ConvGeometry((3, 3), padding=(1, 1))),
        (3, (40, 18, 3, 2), ConvGeometry((3, 2), (2, 1), (2, 1), (1, 2))),
        (2, (70, 33, 1, 1), ConvGeometry((1, 1))),
    ):
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        codes[0], codes[-1] = 127, -128
        scale = torch.rand(shape[0], generator=generator) + 0.1
        x = torch.randn(batch, shape[1], 19, 11, generator=generator)
        x[-1] = x[-1].abs() * 1e37
        bias = torch.randn(shape[0], generator=generator)
        size = geometry.output_size(x.shape[2:])
        conv = IntegerConv(codes, scale, geometry)
        fast = native.NativeConv(loaded, codes, scale, geometry)(x, bias, size)
        if not torch.equal(fast, conv._torch_product(x, bias, size)):
            return False
    return True
