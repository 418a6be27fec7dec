"""finetune and heal on adapted models: only the adapter moves, and only the adapter is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_batches import batches

import lowrank
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear
from lowrank.lora import LoRAConfig, add_lora, load_adapter
from lowrank.training import TrainingResult, finetune, heal


def base() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def compressed() -> nn.Sequential:
    model = base()
    model[0] = QuantizedLinear.from_linear(model[0], bits=3)
    model[2] = QuantizedLowRankLayer.from_linear(model[2], rank=6)
    model[4] = SVDCompressedLinear.from_linear(model[4], rank=2)
    return model


CONFIG = LoRAConfig(r=3, lora_alpha=6, target_modules=["0", "2", "4"], lora_dropout=0.1)


def test_only_the_adapter_moves_and_it_alone_is_saved(tmp_path: Path) -> None:
    model = compressed()
    before = copy.deepcopy(model.state_dict())
    adapted = add_lora(model, CONFIG)
    result = finetune(
        adapted,
        batches(),
        batches(seed=1),
        epochs=8,
        lr=0.02,
        lora_plus_ratio=4.0,
        output_dir=tmp_path / "a",
        progress=False,
    )
    assert result.best_value < 0.8 * result.evaluations[0]["value"]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "history.json", "state.json"]
    state = adapted.state_dict()
    for name, tensor in before.items():
        layer, _, part = name.rpartition(".")
        assert torch.equal(tensor, state[f"{layer}.base_layer.{part}"]), name
    again = load_adapter(model, tmp_path / "a")
    x = batches()[0][0]
    with torch.no_grad():
        assert torch.equal(again.eval()(x), adapted.eval()(x))


@pytest.mark.parametrize("changes", [{}, {"learnable_scale": True}, {"use_dora": True}, {"modules_to_save": ["4"]}])
def test_a_finished_run_of_an_adapter_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG.replace(target_modules=["0", "2"], **changes)
    x = batches()[0][0]

    def run(model: nn.Module) -> tuple[TrainingResult, Tensor]:
        settings: dict[str, Any] = {"epochs": 2, "lr": 0.02, "output_dir": tmp_path / "a", "resume": True}
        result = finetune(model, batches(), batches(seed=1), **settings, progress=False)
        with torch.no_grad():
            return result, model.eval()(x)

    model = base() if "use_dora" in changes or "modules_to_save" in changes else compressed()
    first, expected = run(add_lora(model, config))
    with torch.no_grad():
        assert not torch.equal(model.eval()(x), expected)
    files = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    again, found = run(add_lora(model, config))
    assert again.to_json() == first.to_json()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files


@pytest.mark.parametrize("init", [True, "residual"])
def test_healing_trains_adapters_where_there_are_any(init: bool | str) -> None:
    original, model = base(), compressed()
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
