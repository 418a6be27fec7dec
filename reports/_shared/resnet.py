"""The CIFAR-10 residual networks of He et al. (2015), and their images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from _shared.data import SHARED

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A: every second pixel, zero channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


class ResNet(nn.Module):
    """``depth`` = 6n + 2: n blocks each of 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(n)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(n)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32), normalised, to (B, 10) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def pretrained(depth: int) -> ResNet:
    """Load ResNet-20 or ResNet-56 with the published weights, in eval mode."""
    model = ResNet(depth)
    model.load_state_dict(load_file(SHARED / f"models/resnet{depth}-cifar10/model.safetensors"))
    return model.eval()


def images(name: str) -> tuple[Tensor, Tensor]:
    """Load normalised images (N, 3, 32, 32) and labels (N,) of ``cifar10/<name>.npz``."""
    with np.load(SHARED / f"data/cifar10/{name}.npz", allow_pickle=False) as archive:
        pixels, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), labels


def halves(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw indices of the two halves of ``eval.npz``: to verify on, and to measure on."""
    order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
    return order[:250].sort().values, order[250:].sort().values


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of the images that are classified rightly: top-1."""
    return float(torch.cat([model(part).argmax(1) for part in x.split(125)]).eq(labels).float().mean())
