"""Modules that are trained whole beside the adapters: which they are, how they switch, merge, save and load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compressed_models import compressed
from lora_models import IDS, Encoder, Normed, outputs, random_adapter, rows, run, two_linear
from torch import nn

import lowrank
from lowrank.lora import (
    LoRAConfig,
    add_lora,
    load_adapter,
    save_adapter,
)
from lowrank.lora.adapters import saved_modules


def test_modules_to_save_are_matched_as_peft_does_and_go_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(3, 6)
    ours = add_lora(
        model, LoRAConfig(r=2, target_modules=["linear"], modules_to_save=["norm"], init_lora_weights=False)
    )
    saved = {name for name, _ in ours.named_parameters() if "modules_to_save" in name}
    assert {name.partition(".modules_to_save")[0] for name in saved} == {"first.input_norm", "norm"}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    torch.testing.assert_close(outputs(theirs, x), outputs(ours, x), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        outputs(load_adapter(model, tmp_path / "theirs"), x), outputs(ours, x), rtol=1e-5, atol=1e-6
    )


def test_a_module_inside_another_that_is_saved_is_saved_with_it(tmp_path: Path) -> None:
    model = Normed()
    ours = add_lora(model, LoRAConfig(r=2, target_modules=["linear"], modules_to_save=["mlp", "0"]))
    names = [name for name, _ in ours.named_parameters() if "modules_to_save" in name]
    assert names == ["mlp.modules_to_save.default.0.weight", "mlp.modules_to_save.default.0.bias"]
    save_adapter(ours, tmp_path / "a")
    load_adapter(model, tmp_path / "a")


def test_modules_to_save_train_whole_and_switch() -> None:
    base = Encoder().eval()
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["query"], modules_to_save=["score"]))
    assert torch.equal(run(model), run(base))
    assert torch.equal(model.score.weight, base.score.weight)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.score.weight, base.score.weight)
    with lowrank.disable_adapter(model):
        assert torch.equal(run(model), run(base))
    trained = run(model)
    plain = lowrank.unload_lora(lowrank.merge_lora(model))
    assert type(plain.score) is nn.Linear
    torch.testing.assert_close(run(plain), trained)


def test_codes_cannot_be_trained_whole_and_the_model_is_as_it_was() -> None:
    model = compressed()
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(lowrank.AdapterError, match="QuantizedLinear holds integer codes"):
        lowrank.add_lora(model, lowrank.LoRAConfig(r=2, target_modules=["up"], modules_to_save=["mid"]), inplace=True)
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_merging_a_named_adapter_runs_its_trained_modules() -> None:
    adapted = lowrank.add_lora(two_linear(), random_adapter("0", modules_to_save=["2"]), "a")
    lowrank.add_lora(adapted, random_adapter("0", modules_to_save=["2"]), "b", inplace=True)
    with torch.no_grad():
        saved_modules(adapted)["2"].modules_to_save["b"].weight.add_(1.0)
        expected = adapted(rows())
        lowrank.set_adapter(adapted, "a")
        plain = lowrank.unload_lora(lowrank.merge_lora(adapted, ["b"]))
        torch.testing.assert_close(plain(rows()), expected, rtol=1e-5, atol=1e-5)
