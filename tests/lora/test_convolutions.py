"""Adapters of convolutions with groups, or that pad with something other than zeros, through every operation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from lora_bases import close, only_layer, randomise
from lora_models import outputs
from torch import nn

import lowrank
from lowrank.errors import AdapterError
from lowrank.lora import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
    load_adapter,
    save_adapter,
    set_form,
)


def conv(**how: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **how), nn.Tanh(), nn.Conv2d(6, 4, 1)).eval()


def test_an_adapter_of_pefts_keeps_its_padding_through_every_operation(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
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
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
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


def test_grouped_convolutions_keep_their_groups(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"))
    adapted = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["0"]))
    randomise(adapted)
    lowrank.save_adapter(adapted, tmp_path / "adapter")
    x = torch.randn(2, 4, 7)
    assert torch.equal(lowrank.load_adapter(base, tmp_path / "adapter")(x), adapted(x))


def test_grouped_convolutions_carry_groups_in_lora_a() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, dtype=torch.float64))
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=4, target_modules=["0"]))
    randomise(model)
    layer = only_layer(model)
    assert layer.lora_A["default"].weight.shape == (4, 2, 3, 3)
    assert layer.lora_B["default"].weight.shape == (6, 4, 1, 1)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=seeded())
    down = torch.nn.functional.conv2d(x, layer.lora_A["default"].weight, padding=1, groups=2)
    expected = base(x) + 2.0 * torch.einsum("oc,bchw->bohw", layer.lora_B["default"].weight[:, :, 0, 0], down)
    close(model(x), expected, torch.float64)
    with pytest.raises(lowrank.LowRankError, match="does not divide into its 2 groups"):
        lowrank.add_lora(base, lowrank.LoRAConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"),
        lambda: nn.Conv1d(4, 6, 5, dilation=2, padding="same", padding_mode="reflect"),
        lambda: nn.Conv2d(4, 6, (3, 1), dilation=(2, 3), padding="same"),
        lambda: nn.Conv2d(4, 6, 1, dilation=2),
    ],
    ids=["1d", "reflected", "2d", "dilation that does not matter"],
)
def test_pefts_adapters_of_dilated_convolutions_compute_what_peft_trained(
    layer: Any, adapter: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(layer()).eval()
    x = torch.randn(2, 4, *(11,) * (model[0].weight.ndim - 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **adapter)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, x)
    assert not torch.allclose(expected, outputs(model, x))
    adapted = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-5, atol=1e-6)
    set_form(adapted, "merged")
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-5, atol=1e-5)
    set_form(adapted, "separate")
    save_adapter(adapted, tmp_path / "ours")
    torch.testing.assert_close(outputs(load_adapter(model, tmp_path / "ours"), x), expected, rtol=1e-5, atol=1e-6)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, x), expected, rtol=1e-5, atol=1e-6)


def test_what_was_trained_without_dilation_stays_apart_from_what_was_trained_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model, x = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2, padding="same")).eval(), torch.randn(2, 4, 11)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = load_adapter(model, tmp_path / "theirs", "theirs")
    with pytest.raises(AdapterError, match=r"layer 0: adapter 'theirs' has no dilation, the base dilation=\(2,\)"):
        lowrank.merge_lora(adapted)
    add_weighted_adapter(adapted, ["theirs"], [1.0], "same")
    torch.testing.assert_close(outputs(adapted, x), outputs(theirs.eval(), x), rtol=1e-5, atol=1e-6)
    add_lora(adapted, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False), "ours", inplace=True)
    expected = outputs(adapted, x)
    with pytest.raises(
        AdapterError, match=r"layer 0: some of the adapters pad with zeros .or have no dilation. and some do not"
    ):
        add_weighted_adapter(adapted, ["theirs", "ours"], [1.0, 1.0], "both")
    save_adapter(adapted, tmp_path / "ours", "ours")
    assert "PEFT builds the adapters of 1 convolutions otherwise (the first is 0: groups, dilation" in caplog.text
    assert torch.equal(outputs(load_adapter(model, tmp_path / "ours"), x), expected)


def test_an_adapter_that_peft_cannot_have_trained_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2, padding=2))
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(
        lowrank.CheckpointError, match=r'layer 0: dilation=\(2,\) with padding=\(2,\): PEFT.* only with padding="same"'
    ):
        load_adapter(model, tmp_path / "theirs")
