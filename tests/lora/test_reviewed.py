"""What a reviewer found: other paddings and groups through every operation, whole modules by any end of a name, odd configurations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, UsageError
from lowrank.lora import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
    load_adapter,
    save_adapter,
    set_form,
)
from lowrank.lora.model import lora_layers

peft = pytest.importorskip("peft")


def conv(**how: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **how), nn.Tanh(), nn.Conv2d(6, 4, 1)).eval()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def test_an_adapter_of_pefts_keeps_its_padding_through_every_operation(tmp_path: Path) -> None:
    model, x = conv(padding_mode="reflect"), torch.randn(2, 4, 7, 7)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, x)
    adapted = load_adapter(model, tmp_path / "theirs")
    assert torch.equal(outputs(adapted, x), expected)
    save_adapter(adapted, tmp_path / "ours")
    assert torch.equal(outputs(load_adapter(model, tmp_path / "ours"), x), expected)
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours"), x), expected)
    set_form(adapted, "merged")
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-5, atol=1e-6)
    add_weighted_adapter(adapted, ["default"], [1.0], "same")
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-5, atol=1e-6)


def test_a_sum_of_adapters_that_pad_otherwise_is_refused(tmp_path: Path) -> None:
    model = conv(padding_mode="reflect")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = load_adapter(model, tmp_path / "theirs", "theirs")
    adapted = add_lora(adapted, LoRAConfig(r=2, target_modules=["0"]), adapter_name="ours", inplace=True)
    with pytest.raises(AdapterError, match="layer 0: some of the adapters pad with zeros"):
        add_weighted_adapter(adapted, ["theirs", "ours"], [1.0, 1.0], "both")


@pytest.mark.parametrize("how", [{"padding_mode": "reflect"}, {"groups": 2}], ids=str)
def test_what_peft_would_compute_otherwise_is_said_when_it_is_saved(
    how: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = conv(**how), torch.randn(2, 4, 7, 7)
    adapted = add_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    save_adapter(adapted, tmp_path / "a")
    assert "PEFT builds the adapters of 1 convolutions otherwise (the first is 0" in caplog.text
    caplog.clear()
    assert torch.equal(outputs(load_adapter(model, tmp_path / "a"), x), outputs(adapted, x))
    plain = add_lora(conv(), LoRAConfig(r=2, target_modules=["0"]))
    save_adapter(plain, tmp_path / "b")
    assert not caplog.records


def test_grouped_convolutions_compute_separately_in_either_form() -> None:
    model, x = conv(groups=2), torch.randn(2, 4, 7, 7)
    adapted = add_lora(model, LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    expected = outputs(adapted, x)
    set_form(adapted, "merged")
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-5, atol=1e-6)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"linear": nn.Linear(6, 6), "input_norm": nn.LayerNorm(6)})
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(self.first["input_norm"](self.first["linear"](x))))


def test_modules_to_save_are_matched_as_peft_does_and_go_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(3, 6)
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
    model = Blocks()
    ours = add_lora(model, LoRAConfig(r=2, target_modules=["linear"], modules_to_save=["mlp", "0"]))
    names = [name for name, _ in ours.named_parameters() if "modules_to_save" in name]
    assert names == ["mlp.modules_to_save.default.0.weight", "mlp.modules_to_save.default.0.bias"]
    save_adapter(ours, tmp_path / "a")
    load_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_that_are_no_list_are_refused(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"{name}: must be .*a list of module names, got"):
        LoRAConfig(**{name: value})


def test_layers_to_transform_is_whole_numbers_or_all() -> None:
    for value in (1.5, "2", [0.5]):
        with pytest.raises(AdapterError, match="layers_to_transform: must be layer indices"):
            LoRAConfig(target_modules=["a"], layers_to_transform=value)  # type: ignore[arg-type]
    assert LoRAConfig(target_modules=["a"], layers_to_transform=[]).layers_to_transform is None


def test_a_plain_name_as_text_is_told_what_to_write() -> None:
    with pytest.raises(UsageError, match=r"'linear' matches no module .* write \['linear'\] or r'\.\*\\\.linear'"):
        add_lora(Blocks(), LoRAConfig(target_modules="linear"))


def test_weights_of_a_sum_are_finite_and_each_counts() -> None:
    model, x = Blocks().eval(), torch.randn(3, 6)
    adapted = add_lora(model, LoRAConfig(r=2, target_modules=["linear"], init_lora_weights=False), adapter_name="a")
    change = lora_layers(adapted)["first.linear"].change(["a"])
    add_weighted_adapter(adapted, ["a", "a"], [1.0, 2.0], "three")
    total = lora_layers(adapted)["first.linear"].change(["three"])
    torch.testing.assert_close(total.left @ total.right, 3.0 * (change.left @ change.right), rtol=1e-5, atol=1e-6)
    for weight in (math.nan, math.inf, "1", True):
        with pytest.raises(UsageError, match="weights: must be finite numbers"):
            add_weighted_adapter(adapted, ["a"], [weight], "other")  # type: ignore[list-item]
    assert outputs(adapted, x).isfinite().all()
