"""heal on models with adapters: what it trains, what it refuses, and that compression refuses them first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_batches import original_and_compressed, three_formats, three_layers

import lowrank
from lowrank.errors import UsageError
from lowrank.lora import LoRAConfig, add_lora, merge_lora, unload_lora
from lowrank.training import heal


def test_merged_adapters_and_dora_on_codes_are_refused_with_the_remedy() -> None:
    original, model = original_and_compressed()
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


@pytest.mark.parametrize("merged", [False, True])
def test_compression_refuses_adapters_before_it_searches(merged: bool) -> None:
    original, _ = original_and_compressed()
    adapted = add_lora(original, LoRAConfig(r=2, target_modules=["2"], init_lora_weights=False))
    if merged:
        merge_lora(adapted)
    arguments: dict[str, Any] = {"error_budget": 0.1, "calibration": [torch.randn(64, 12)], "progress": False}
    with pytest.raises(UsageError, match=r"layer 2 has adapters.*unload_lora\(merge_lora\(model\)\)"):
        lowrank.compress_model(adapted, **arguments)
    lowrank.compress_model(unload_lora(merge_lora(adapted)), **arguments)


@pytest.mark.parametrize("init", [True, "residual"])
def test_healing_trains_adapters_where_there_are_any(init: bool | str) -> None:
    original, model = three_layers(), three_formats()
    config = LoRAConfig(r=3, target_modules=["0", "2", "4"], init_lora_weights=init)
    adapted = add_lora(model, config, original=original)
    x = [torch.randn(64, 6) for _ in range(6)]
    result = heal(adapted, original, x, steps=150, lr=5e-3, progress=False)
    report = result.report
    assert (report.what, report.kept) == ("adapters", "after")
    assert report.error_after < 0.7 * report.error_before
    assert report.trained == lowrank.trainable_parameters(adapted)[0]
    for name, tensor in adapted.state_dict().items():
        moved = not torch.equal(tensor, result.model.state_dict()[name])
        assert not moved or "lora_" in name, name
    flags = [p.requires_grad for p in adapted.parameters()]
    assert [p.requires_grad for p in result.model.parameters()] == flags
