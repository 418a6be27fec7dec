"""The roots of gradients' second moments."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded

from lowrank.errors import NumericsError
from lowrank.numerics.gradient_weighting import GradientWeighting


def test_the_roots_of_a_metric_undo_each_other_group_by_group() -> None:
    root = torch.randn(6, 6, generator=seeded(4), dtype=torch.float64)
    gradients = root @ root.T
    whole, cut = GradientWeighting(gradients, ridge=0.0), GradientWeighting(gradients, ridge=0.0, groups=2)
    torch.testing.assert_close(whole.root @ whole.root, gradients)
    assert float(cut.root[:3, 3:].abs().max()) == 0.0
    torch.testing.assert_close((cut.root @ cut.root)[3:, 3:], gradients[3:, 3:])
    kernel = torch.randn(6, 2, 3, 3, generator=seeded(5), dtype=torch.float64)
    for one in (whole, cut):
        torch.testing.assert_close(one.back(one.of(kernel)), kernel)
    with pytest.raises(NumericsError, match=r"layer x: gradients whose mean square is 0\.0"):
        GradientWeighting(torch.zeros(2, 2, dtype=torch.float64), name="layer x")
