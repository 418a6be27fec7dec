"""A small classification task that a linear map can learn."""

from __future__ import annotations

import torch
from helpers import seeded


def batches(count: int = 6, size: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs (size, 6), classes (size,) out of 3); the same task whatever the seed."""
    generator = seeded(seed)
    wanted = torch.randn(6, 3, generator=seeded(99))
    found = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator)
        found.append((x, (x @ wanted).argmax(dim=1)))
    return found
