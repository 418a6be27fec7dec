"""Weighted sums of adapters: exact, of their ranks together, refused where no adapter is the sum."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lora_bases import close, randomise
from lora_models import Encoder, Normed, outputs, random_adapter, two_linear
from torch import nn

import lowrank
from lowrank.errors import UsageError
from lowrank.lora import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
)
from lowrank.lora.adapters import active_adapters, lora_layers


def test_a_weighted_adapter_is_the_weighted_sum() -> None:
    model = lowrank.add_lora(
        Encoder().double().eval(), lowrank.LoRAConfig(r=2, target_modules=["query", "score"]), "one"
    )
    lowrank.add_lora(
        model, lowrank.LoRAConfig(r=3, target_modules=["query", "embed"], use_rslora=True, learnable_scale=True), "two", inplace=True
    )  # fmt: skip
    randomise(model, "one", seed=1)
    randomise(model, "two", seed=2)
    changes = {
        name: sum(
            (w * (layer.change([a]).left @ layer.change([a]).right) for a, w in (("one", 0.3), ("two", -1.5)) if a in layer.configs),
            start=torch.zeros((), dtype=torch.float64),
        )
        for name, layer in lora_layers(model).items()
    }  # fmt: skip
    lowrank.add_weighted_adapter(model, ["one", "two"], [0.3, -1.5], "both")
    assert active_adapters(model) == ["both"]
    for name, layer in lora_layers(model).items():
        change = layer.change()
        assert layer.rank_of("both") == sum(layer.rank_of(a) for a in ("one", "two") if a in layer.configs)
        close(change.left @ change.right, changes[name], torch.float64)


def test_weighted_adapters_that_have_no_sum() -> None:
    model = lowrank.add_lora(Encoder(), lowrank.LoRAConfig(r=2, use_dora=True), "dora")
    with pytest.raises(lowrank.AdapterError, match="DoRA"):
        lowrank.add_weighted_adapter(model, ["dora"], [1.0], "sum")
    with pytest.raises(lowrank.UsageError, match="need one for each adapter"):
        lowrank.add_weighted_adapter(model, ["dora"], [1.0, 2.0], "sum")
    with pytest.raises(lowrank.AdapterError, match="'other': not on this model, which has dora"):
        lowrank.add_weighted_adapter(model, ["other"], [1.0], "sum")


def test_weights_of_a_sum_are_finite_and_each_counts() -> None:
    model, x = Normed().eval(), torch.randn(3, 6)
    adapted = add_lora(model, LoRAConfig(r=2, target_modules=["linear"], init_lora_weights=False), adapter_name="a")
    change = lora_layers(adapted)["first.linear"].change(["a"])
    add_weighted_adapter(adapted, ["a", "a"], [1.0, 2.0], "three")
    total = lora_layers(adapted)["first.linear"].change(["three"])
    torch.testing.assert_close(total.left @ total.right, 3.0 * (change.left @ change.right), rtol=1e-5, atol=1e-6)
    for weight in (math.nan, math.inf, "1", True):
        with pytest.raises(UsageError, match="weights: must be finite numbers"):
            add_weighted_adapter(adapted, ["a"], [weight], "other")  # type: ignore[list-item]
    assert outputs(adapted, x).isfinite().all()


def test_a_name_that_ends_another_takes_no_rank_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"a": nn.Linear(6, 6), "x": nn.ModuleDict({"a": nn.Linear(6, 6)})})
    lowrank.add_lora(whole, random_adapter("a"), "all", inplace=True)
    expression = lowrank.LoRAConfig(r=2, target_modules=r"x\.a", init_lora_weights=False)
    lowrank.add_lora(whole, expression, "one", inplace=True)
    lowrank.add_weighted_adapter(whole, ["all", "one"], [1.0, 1.0], "sum")
    assert {name: layer.rank_of("sum") for name, layer in (("a", whole["a"]), ("x.a", whole["x"]["a"]))} == {
        "a": 2,
        "x.a": 4,
    }
    lowrank.save_adapter(whole, tmp_path / "sum", "sum")
    fresh = nn.ModuleDict({"a": nn.Linear(6, 6), "x": nn.ModuleDict({"a": nn.Linear(6, 6)})})
    again = lowrank.load_adapter(fresh, tmp_path / "sum")
    assert torch.equal(again["x"]["a"].lora_A["default"].weight, whole["x"]["a"].lora_A["sum"].weight)


def test_a_weighted_adapter_saves_and_loads(tmp_path: Path) -> None:
    adapted = lowrank.add_lora(two_linear(), lowrank.LoRAConfig(r=1), "one")
    lowrank.add_lora(adapted, lowrank.LoRAConfig(r=2, target_modules=["2"]), "two", inplace=True)
    randomise(adapted, "one")
    randomise(adapted, "two")
    lowrank.add_weighted_adapter(adapted, ["one", "two"], [0.5, 2.0], "both")
    lowrank.save_adapter(adapted, tmp_path / "both")
    x = torch.randn(3, 8)
    loaded = lowrank.load_adapter(two_linear(), tmp_path / "both")
    assert [layer.rank_of("default") for layer in lora_layers(loaded).values()] == [1, 3]
    close(loaded(x), adapted(x), torch.float32)
