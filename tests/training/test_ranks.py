"""allocate_ranks: the budget is kept, ranks go where the task needs them, and that beats the same total spread evenly."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import seeded
from torch import nn

from lowrank.errors import CalibrationError, RankError, UsageError
from lowrank.lora import LoRAConfig, add_lora
from lowrank.training import allocate_ranks, finetune
from lowrank.training.ranks import rank_scores


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(16, 16), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def task(seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the model does with its last layer changed by a matrix of rank 8."""
    wanted = copy.deepcopy(model())
    change = torch.randn(16, 8, generator=seeded(5)) @ torch.randn(8, 16, generator=seeded(6)) / 8
    with torch.no_grad():
        wanted[6].weight += change
        x = torch.randn(128, 16, generator=seeded(seed))
        y = wanted(x)
    return list(zip(x.split(32), y.split(32), strict=True))


NAMES = ["0", "2", "4", "6"]


@pytest.mark.parametrize("ranks", [None, [1, 2, 4, 8]])
def test_ranks_go_where_the_task_needs_them_and_beat_uniform(ranks: list[int] | None) -> None:
    config = LoRAConfig(r=3, lora_alpha=3, target_modules=NAMES)
    before = copy.deepcopy(model().state_dict())
    base = model()
    state = torch.get_rng_state()
    pattern = allocate_ranks(base, config, task(), total_rank=12, ranks=ranks)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert pattern == allocate_ranks(base, config, task(), total_rank=12, ranks=ranks)
    assert list(pattern) == ["^0", "^2", "^4", "^6"]
    assert sum(pattern.values()) <= 12
    assert pattern["^6"] == max(pattern.values()) > 3
    assert ranks is None or set(pattern.values()) <= set(ranks)
    losses = []
    for rank_pattern in ({}, pattern):
        # The scaling is alpha / rank; with alpha = rank every layer has the same.
        chosen = LoRAConfig(
            r=3, lora_alpha=3, target_modules=NAMES, rank_pattern=rank_pattern, alpha_pattern=rank_pattern
        )
        torch.manual_seed(3)
        result = finetune(add_lora(base, chosen), task(), task(2), epochs=60, lr=1e-2, progress=False)
        losses.append(result.best_value)
    assert losses[1] < losses[0]


def test_the_whole_budget_is_given_where_any_rank_may_be_had() -> None:
    pattern = allocate_ranks(model(), LoRAConfig(r=5, target_modules=NAMES), task())
    assert sum(pattern.values()) == 20
    everything = allocate_ranks(model(), LoRAConfig(r=5, target_modules=NAMES), task(), total_rank=1000)
    assert set(everything.values()) == {16}


def test_names_are_matched_whole() -> None:
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    data = [(torch.randn(8, 4), torch.randn(8, 4))]
    pattern = allocate_ranks(nested, LoRAConfig(r=2, target_modules="all-linear"), data, total_rank=4)
    chosen = {key: 1 + number for number, key in enumerate(pattern)}
    adapted = add_lora(nested, LoRAConfig(r=4, target_modules="all-linear", rank_pattern=chosen))
    found = {name: p.shape[0] for name, p in adapted.named_parameters() if "lora_A" in name}
    assert sorted(found.values()) == sorted(chosen.values())


def test_what_makes_no_sense_is_refused() -> None:
    config = LoRAConfig(r=2, target_modules=NAMES)
    with pytest.raises(RankError, match="total_rank: 3 is not enough for 4 layers of rank 1 or more; give at least 4"):
        allocate_ranks(model(), config, task(), total_rank=3)
    with pytest.raises(RankError, match="ranks: must be integers of at least 1, got 0"):
        allocate_ranks(model(), config, task(), ranks=[0, 8])
    with pytest.raises(RankError, match="ranks: is empty"):
        allocate_ranks(model(), config, task(), ranks=[])
    with pytest.raises(UsageError, match="has a rank_pattern already"):
        allocate_ranks(model(), LoRAConfig(rank_pattern={"0": 2}), task())
    with pytest.raises(CalibrationError, match="batches: is empty"):
        allocate_ranks(model(), config, [])


def test_kernels_count_for_the_rank_a_convolution_can_use() -> None:
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.Flatten(), nn.Linear(16, 3))
    data = [(torch.randn(4, 2, 3, 3), torch.randint(3, (4,)))]
    _, limits, _ = rank_scores(model, LoRAConfig(r=2, target_modules=["0", "2"]), data)
    assert limits == {"0": 16, "2": 3}


def test_ranks_of_grouped_convolutions_divide_into_their_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randn(4, 4, 3, 3), torch.randint(3, (4,)))]
    config = LoRAConfig(r=2, target_modules=["0", "2"])
    for total in (5, 7, 8):
        pattern = allocate_ranks(model, config, data, total_rank=total)
        assert pattern["^0"] % 2 == 0 and total - 1 <= sum(pattern.values()) <= total
        add_lora(model, config.replace(rank_pattern=pattern))
    with pytest.raises(RankError, match=r"none of \[1, 3\] divides into the 2 groups of layer 0"):
        allocate_ranks(model, config, data, total_rank=8, ranks=[1, 3])
