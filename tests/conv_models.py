"""Convolutions of every geometry, small networks of them whose layers have falling spectra, and images for both."""

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


class Block(nn.Module):
    """As torchvision's BasicBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A stem, three stages (one block used twice, one with groups), a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        shared = Block(16, 16)
        self.layer1 = nn.Sequential(shared, Block(16, 16), shared)
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, groups=2))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.adaptive_avg_pool2d(self.layer2(self.layer1(x)), 1).flatten(1))


class TextConv(nn.Module):
    """An embedding and two convolutions along the text, which see a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.narrow = nn.Conv1d(12, 24, 3, padding="same")
        self.wide = nn.Conv1d(24, 24, 5, padding=4, dilation=2, groups=2)
        self.head = nn.Linear(24, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.narrow(self.embed(input_ids).transpose(1, 2)))
        x = torch.relu(self.wide(x))
        if attention_mask is not None:
            x = x * attention_mask[:, None].to(x.dtype)
        return self.head(x.mean(dim=2))


def with_falling_spectra(model: nn.Module) -> nn.Module:
    """Kernels whose singular values halve about every third, and BatchNorm statistics as after training; eval mode."""
    generator = seeded(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                rows, columns = module.weight.flatten(1).shape
                sigma = 2.0 ** (-torch.arange(min(rows, columns), dtype=torch.float64) / 3.0)
                kernel = matrix_with_spectrum(rows, columns, sigma, generator)
                module.weight.copy_(2.0 * kernel.reshape(module.weight.shape))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))
    return model.eval()


def resnet() -> ResNet:
    """The network, ready."""
    torch.manual_seed(0)
    model = with_falling_spectra(ResNet())
    assert isinstance(model, ResNet)
    return model


def pictures(count: int = 96, seed: int = 0, size: int = 12) -> list[Tensor]:
    """Smooth random images in batches of 32."""
    noise = torch.randn(count, 3, size + 4, size + 4, generator=seeded(seed))
    return list((3.0 * F.avg_pool2d(noise, 5, 1)).split(32))
