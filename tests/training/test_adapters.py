"""finetune and heal on adapted models: only the adapter moves, and only the adapter is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_batches import BOTH_LAYERS, batches, normed, three_formats, three_layers

import lowrank
from lowrank.errors import NumericsError
from lowrank.layers import QuantizedLinear
from lowrank.lora import LoRAConfig, add_lora, load_adapter, merge_lora, set_adapter
from lowrank.training import TrainingResult, finetune

CONFIG = LoRAConfig(r=3, lora_alpha=6, target_modules=["0", "2", "4"], lora_dropout=0.1)


def test_only_the_adapter_moves_and_it_alone_is_saved(tmp_path: Path) -> None:
    model = three_formats()
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

    model = three_layers() if "use_dora" in changes or "modules_to_save" in changes else three_formats()
    first, expected = run(add_lora(model, config))
    with torch.no_grad():
        assert not torch.equal(model.eval()(x), expected)
    files = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    again, found = run(add_lora(model, config))
    assert again.to_json() == first.to_json()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files


def test_what_is_trained_beside_the_adapter_is_saved_too(tmp_path: Path) -> None:
    model = add_lora(normed(), BOTH_LAYERS)
    model[1].requires_grad_(True)
    finetune(model, batches(), steps=3, lr=0.05, output_dir=tmp_path / "run", progress=False)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert {"adapter_model.safetensors", "trained.safetensors"} <= set(files)
    again = add_lora(normed(), BOTH_LAYERS)
    again[1].requires_grad_(True)
    finetune(again, batches(), steps=3, lr=0.05, output_dir=tmp_path / "run", resume=True, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_two_adapters_trained_together_are_saved(tmp_path: Path) -> None:
    model = add_lora(add_lora(normed(), BOTH_LAYERS, "a"), BOTH_LAYERS, "b")
    set_adapter(model, ["a", "b"])
    finetune(model, batches(), steps=2, lr=0.05, output_dir=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "trained.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_merged_model_is_refused_by_name() -> None:
    model = merge_lora(add_lora(normed(), BOTH_LAYERS))
    with pytest.raises(NumericsError, match="no trainable parameter got a gradient"):
        finetune(model, batches(), steps=1, progress=False)


def test_all_parameters_are_counted_as_elsewhere() -> None:
    model = normed()
    model[0] = QuantizedLinear.from_linear(model[0])
    model = add_lora(model, BOTH_LAYERS)
    result = finetune(model, batches(), steps=1, progress=False)
    assert (result.trainable, result.total) == lowrank.trainable_parameters(model)
