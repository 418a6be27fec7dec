"""Convolutions of every geometry, for the tests of geometry, factors and layers."""

from __future__ import annotations

import itertools

import torch
from helpers import matrix_with_spectrum, seeded
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("zeros", "reflect", "replicate", "circular")


def conv_of(dims: int = 2, channels: tuple[int, int] = (4, 8), kernel: object = 3, **options: object) -> nn.Module:
    """A convolution whose weight has a falling spectrum; other arguments as torch's."""
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    dtype = options.pop("dtype", torch.float32)
    conv = torch.nn.utils.skip_init(kind, *channels, kernel, **options).to(dtype)
    rows, columns = conv.weight.flatten(1).shape
    sigma = torch.logspace(0, -2, min(rows, columns), dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(matrix_with_spectrum(rows, columns, sigma, seeded(3)).reshape(conv.weight.shape))
        if conv.bias is not None:
            conv.bias.copy_(torch.randn(rows, generator=seeded(4)))
    return conv


def geometries() -> list[tuple[str, nn.Module]]:
    """A grid thinned so that every pair of options occurs, with names; 1-d and 2-d, float64."""
    found = []
    kernels, strides = (1, 3, (5, 3), (2, 4)), (1, 2, (1, 2))
    paddings, dilations, groups = (0, 1, (1, 0), "same", "valid"), (1, 2, (2, 1)), (1, 2, 4)
    every = itertools.product(kernels, strides, paddings, dilations, groups, MODES)
    for index, (kernel, stride, padding, dilation, parts, mode) in enumerate(every):
        if (padding == "same" and stride != 1) or index % 13:
            continue
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": parts, "padding_mode": mode}
        found.append(("2d", conv_of(2, (4, 8), kernel, dtype=torch.float64, bias=index % 2 == 0, **options)))
    lines = itertools.product((1, 3, 4), (1, 2), (0, 1, "same", "valid"), (1, 2), (1, 2, 4), MODES)
    for index, (kernel, stride, padding, dilation, parts, mode) in enumerate(lines):
        if (padding == "same" and stride != 1) or index % 17:
            continue
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": parts, "padding_mode": mode}
        found.append(("1d", conv_of(1, (4, 8), kernel, dtype=torch.float64, **options)))
    return [(f"{kind}-{index}", conv) for index, (kind, conv) in enumerate(found)]


def image_for(conv: nn.Module, batch: int = 2, seed: int = 7) -> Tensor:
    """Random input of the convolution's dtype, larger than every kernel of :func:`geometries`."""
    size = (11,) if isinstance(conv, nn.Conv1d) else (11, 9)
    return torch.randn(batch, conv.in_channels, *size, generator=seeded(seed), dtype=torch.float64).to(
        conv.weight.dtype
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Module) -> Tensor:
    """What ``conv`` gives with another weight and bias, float64, by torch."""
    other = type(conv)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias is not None,
        conv.padding_mode,
        dtype=torch.float64,
    )
    with torch.no_grad():
        other.weight.copy_(weight)
        if bias is not None:
            other.bias.copy_(bias)
        return other(x.double())


def correlated_images(channels: int, size: tuple[int, int] = (12, 12), batch: int = 40) -> Tensor:
    """One-sided images whose neighbouring pixels are alike, as after a ReLU."""
    noise = torch.randn(batch, channels, size[0] + 4, size[1] + 4, generator=seeded(11), dtype=torch.float64)
    mixed = torch.einsum(
        "oi,bihw->bohw", torch.randn(channels, channels, generator=seeded(12), dtype=torch.float64), noise
    )
    return F.relu(F.avg_pool2d(mixed, 5, 1) + 0.3)
