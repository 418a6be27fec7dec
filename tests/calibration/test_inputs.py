"""What flows into layers, against hand-made references; nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.inputs import collect_statistics
from lowrank.errors import NumericsError
from lowrank.numerics.moments import InputStatistics, TokenCounts


class Attention(nn.Module):
    """Three layers that share one input, one that does not, an embedding in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.out(self.q(x) * self.k(x) + self.v(x))


def _batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mask = torch.ones(4, 5, dtype=torch.int64)
        mask[0, 3:] = 0
        batches.append(
            Batch((), {"input_ids": torch.randint(0, 10, (4, 5), generator=generator), "attention_mask": mask}, 4)
        )
    return batches


def test_statistics_equal_the_reference_without_padding_and_are_shared() -> None:
    model, batches = Attention(), _batches()
    targets = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    found = collect_statistics(model, batches, targets)
    ids = torch.cat([batch.kwargs["input_ids"][batch.kwargs["attention_mask"].bool()] for batch in batches])
    rows = model.embed.weight.detach()[ids].double()
    shared = found["q"]
    assert isinstance(shared, InputStatistics)
    assert shared is found["k"] is found["v"] and shared is not found["out"]
    assert shared.count == len(ids) == 3 * 18
    torch.testing.assert_close(shared.gram, rows.T @ rows / len(ids), rtol=1e-12, atol=1e-12)
    counts = found["embed"]
    assert isinstance(counts, TokenCounts)
    assert torch.equal(counts.counts, torch.bincount(ids, minlength=10))
    assert "unused" not in found


def test_hooks_and_modes_are_restored_also_after_an_error() -> None:
    model = Attention().train()
    model.out.eval()
    kept = model.q.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(IndexError):
        collect_statistics(model, [Batch((torch.tensor([[99]]),))], {"q": model.q})
    assert len(model.q._forward_pre_hooks) == 1 and not model.v._forward_pre_hooks
    assert (model.training, model.out.training) == (True, False)
    kept.remove()


def test_layers_that_share_an_input_only_sometimes_get_statistics_of_their_own() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x if x.shape[0] == 2 else 2.0 * x)

    model = Sometimes()
    one, other = torch.randn(2, 3), torch.randn(4, 3)
    found = collect_statistics(model, [one, other], {"a": model.a, "b": model.b})
    rows = torch.cat([one, 2.0 * other]).double()
    statistics = found["b"]
    assert isinstance(statistics, InputStatistics)
    torch.testing.assert_close(statistics.gram, rows.T @ rows / 6, rtol=1e-12, atol=1e-12)


def test_an_in_place_change_between_two_uses_is_seen() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(3.0))

    model, rows = InPlace(), torch.randn(5, 3)
    found = collect_statistics(model, [rows], {"a": model.a, "b": model.b})
    torch.testing.assert_close(9.0 * found["a"].gram, found["b"].gram, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_the_first_layer_that_makes_nan_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[2].bias[1] = float("inf")
    targets = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
    with pytest.raises(NumericsError, match="layer 2: is the first") as raised:
        collect_statistics(model, [torch.randn(4, 3)], targets)
    assert raised.value.exit_code == 4


def test_all_padding_and_constant_inputs_work() -> None:
    model = Attention()
    batch = Batch(
        (),
        {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": torch.zeros(2, 4, dtype=torch.int64)},
        2,
    )
    found = collect_statistics(model, [batch], {"q": model.q, "embed": model.embed})
    assert found["q"].count == 0 and found["embed"].count == 0
