"""What a reviewer found of healing: the original stays as it is, half precision, merged and DoRA adapters, adapters in compression."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import RankError, UsageError
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear
from lowrank.lora import LoRAConfig, add_lora, merge_lora, unload_lora
from lowrank.training import allocate_ranks, heal


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """An original and a compressed model in three formats."""
    torch.manual_seed(3)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12), nn.LayerNorm(12)]
    original = nn.Sequential(*layers).to(dtype).eval()
    model = copy.deepcopy(original)
    model[0] = SVDCompressedLinear.from_linear(original[0], rank=5)
    model[2] = QuantizedLowRankLayer.from_linear(original[2], rank=6)
    model[4] = QuantizedLinear.from_linear(original[4], bits=4)
    return original, model


def test_healing_leaves_the_running_statistics_of_an_original_in_training_mode() -> None:
    original = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model = copy.deepcopy(original)
    model[0] = QuantizedLowRankLayer.from_linear(original[0], rank=4)
    before = copy.deepcopy(original.state_dict())
    x = [torch.randn(64, 8) + 3]
    reports = [heal(model, original, x, steps=5, progress=False).report.to_json() for _ in range(2)]
    assert reports[0] == reports[1]
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in before.items())
    assert original.training


def test_a_model_in_float16_is_healed_in_float32_and_stays_what_it_was() -> None:
    original, model = pair(torch.float16)
    x = [torch.randn(256, 12).half()]
    result = heal(model, original, x, steps=30, lr=3e-3, progress=False)
    assert result.report.kept == "after"
    assert result.report.error_after < 0.8 * result.report.error_before
    assert [t.dtype for t in result.model.state_dict().values()] == [t.dtype for t in model.state_dict().values()]
    assert [m.dtype for m in result.model if hasattr(m, "dtype")] == [torch.float16] * 3
    assert result.model(x[0]).dtype is torch.float16
    assert {parameter.dtype for parameter in original.parameters()} == {torch.float16}


def test_compression_heals_a_model_in_float16() -> None:
    original, _ = pair(torch.float16)
    x = [torch.randn(512, 12).half()]
    result = lowrank.compress_model(original, error_budget=0.1, calibration=x, heal={"steps": 20}, progress=False)
    assert result.report.totals["error_upper"] <= 0.1
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float16}


def test_merged_adapters_and_dora_on_codes_are_refused_with_the_remedy() -> None:
    original, model = pair()
    x = [torch.randn(128, 12)]
    config = LoRAConfig(r=2, target_modules=["2"], init_lora_weights=False)
    merged = merge_lora(add_lora(model, config))
    for what in ("auto", "adapters", "factors"):
        with pytest.raises(UsageError, match=r"layer 2 has adapters merged \(default\).*unmerge_lora first"):
            heal(merged, original, x, what=what, steps=5, progress=False)
    heal(unload_lora(merged), original, x, steps=5, progress=False)
    dora = add_lora(model, config.replace(use_dora=True))
    with pytest.raises(UsageError, match=r"layer 2 has a DoRA adapter.*what='adapters'"):
        heal(dora, original, x, what="factors", steps=5, progress=False)
    assert heal(dora, original, x, what="adapters", steps=5, progress=False).report.what == "adapters"


def test_a_seed_that_is_no_number_is_refused() -> None:
    original, model = pair()
    with pytest.raises(UsageError, match="seed: must be an integer of at least 0, got 'a'"):
        heal(model, original, [torch.randn(64, 12)], steps=5, seed="a", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("merged", [False, True])
def test_compression_refuses_adapters_before_it_searches(merged: bool) -> None:
    original, _ = pair()
    adapted = add_lora(original, LoRAConfig(r=2, target_modules=["2"], init_lora_weights=False))
    if merged:
        merge_lora(adapted)
    arguments: dict[str, Any] = {"error_budget": 0.1, "calibration": [torch.randn(64, 12)], "progress": False}
    with pytest.raises(UsageError, match=r"layer 2 has adapters.*unload_lora\(merge_lora\(model\)\)"):
        lowrank.compress_model(adapted, **arguments)
    lowrank.compress_model(unload_lora(merge_lora(adapted)), **arguments)


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
