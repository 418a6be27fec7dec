"""Adapters on whole models: which modules, several adapters, switching, combining, failing without a trace."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import TOKENS, Tiny, compressed
from helpers import seeded
from lora_bases import randomise
from lora_models import BLOCKS, Encoder, random_adapter, run, two_linear
from torch import nn

import lowrank
from lowrank.lora.adapters import active_adapters, adapter_names, lora_layers


def test_the_summary_names_everything_with_weights() -> None:
    model = lowrank.add_lora(
        Encoder(),
        lowrank.LoRAConfig(r=2, target_modules=["query", "key"], exclude_modules=["1.key"], modules_to_save=["score"]),
    )
    summary = lowrank.adapter_summary(model)
    assert set(summary.adapted) == BLOCKS - {"encoder.layers.1.key"}
    assert summary.adapted["encoder.layers.0.query"] == "Linear 8→8: default r=2"
    assert summary.saved == ("score",)
    assert summary.left["encoder.layers.1.key"] == "excluded by exclude_modules"
    assert summary.left["embed"] == "not among target_modules"
    assert set(summary.left) == {"encoder.layers.1.key", "embed", "attention", "attention.out_proj"} | {
        f"encoder.layers.{index}.norm" for index in range(3)
    }
    trainable, total = lowrank.trainable_parameters(model)
    assert (summary.trainable, summary.total) == (trainable, total) == (5 * 32 + 36, total)
    assert total == sum(p.numel() for p in Encoder().parameters()) + 5 * 32 + 36
    lines = str(summary).splitlines()
    assert len(lines) == 5 + 1 + 7 + 1
    assert (
        lines[-1]
        == f"trainable params: {trainable} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    )


def test_inplace_or_a_copy() -> None:
    model = Encoder()
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2))
    assert adapted is not model and lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    same = lowrank.add_lora(model, lowrank.LoRAConfig(r=2), inplace=True)
    assert same is model and lora_layers(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_switch_disable_delete() -> None:
    base = Encoder().eval()
    plain = run(base)
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["query"]), "one")
    lowrank.add_lora(model, lowrank.LoRAConfig(r=3, target_modules=["key", "query"]), "two", inplace=True)
    randomise(model, "one", seed=1)
    randomise(model, "two", seed=2)
    assert adapter_names(model) == ["one", "two"] and active_adapters(model) == ["two"]
    outputs = {}
    for names in ("one", "two", ["one", "two"], None):
        lowrank.set_adapter(model, names)
        outputs[str(names)] = run(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        wanted = [] if names is None else [names] if isinstance(names, str) else names
        assert {name.rsplit(".", 2)[1] for name in trained} == set(wanted)
    assert torch.equal(outputs["None"], plain)
    assert len({float(output.detach().sum()) for output in outputs.values()}) == 4
    lowrank.set_adapter(model, "one")
    with pytest.raises(RuntimeError, match="within"), lowrank.disable_adapter(model):
        assert torch.equal(run(model), plain)
        raise RuntimeError("within")
    assert torch.equal(run(model), outputs["one"])
    lowrank.delete_adapter(model, "two")
    assert torch.equal(run(model), outputs["one"])
    assert "encoder.layers.0.key" not in lora_layers(model)
    lowrank.delete_adapter(model, "one")
    assert lora_layers(model) == {} and torch.equal(run(model), plain)


def test_one_adapter_each_equals_its_own_model() -> None:
    base = compressed()
    together = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["up", "down"]), "a")
    lowrank.add_lora(together, lowrank.LoRAConfig(r=3, target_modules=["down", "mid"]), "b", inplace=True)
    for name, seed in (("a", 1), ("b", 2)):
        randomise(together, name, seed)
        alone = lowrank.add_lora(
            base, next(e.configs[name] for e in lora_layers(together).values() if name in e.configs), name
        )
        randomise(alone, name, seed)
        for layer_name, layer in lora_layers(alone).items():
            for one, other in zip(
                layer.adapter_parameters(name), lora_layers(together)[layer_name].adapter_parameters(name), strict=True
            ):
                one.data.copy_(other.data)
        lowrank.set_adapter(together, name)
        assert torch.equal(together(TOKENS), alone(TOKENS))


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3, "default"])
def test_names_that_cannot_be(name: Any) -> None:
    model = lowrank.add_lora(Encoder(), lowrank.LoRAConfig(r=2))
    with pytest.raises(lowrank.UsageError, match="adapter_name"):
        lowrank.add_lora(model, lowrank.LoRAConfig(r=2), name)


def test_a_failure_midway_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2))
    weight = model[0].weight.detach().clone()
    with pytest.raises(lowrank.AdapterError, match="layer 1"):
        lowrank.add_lora(
            model, lowrank.LoRAConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa"), inplace=True
        )
    assert torch.equal(model[0].weight, weight)
    assert type(model[0]) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapted_model_copies_and_keeps_its_state() -> None:
    model = lowrank.add_lora(Tiny().eval(), lowrank.LoRAConfig(r=2))
    randomise(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    randomise(other, seed=int(torch.randint(5, (1,), generator=seeded())))
    assert not torch.equal(other(TOKENS), model(TOKENS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_int8_attention_takes_adapters_on_its_projections() -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": lowrank.layers.QuantizedMultiheadAttention.from_module(dense)})
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2))
    names = {f"attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert set(lora_layers(adapted)) == names
    x = torch.randn(2, 3, 8, generator=seeded())
    before = model["attention"](x, x, x)[0]
    assert torch.equal(adapted["attention"](x, x, x)[0], before)
    randomise(adapted)
    after = adapted["attention"](x, x, x)[0]
    assert not torch.equal(after, before)
    adapted["attention"].activations = "float"
    assert all(layer.base_layer.activations == "float" for layer in lora_layers(adapted).values())
    assert not torch.equal(adapted["attention"](x, x, x)[0], after)


def test_an_adapter_cannot_be_named_as_an_attribute_of_every_module() -> None:
    with pytest.raises(lowrank.UsageError, match="adapter_name"):
        lowrank.add_lora(two_linear(), random_adapter("0"), "training")


class Keeping(nn.Module):
    """Keeps what it computed last: an activation, or something that holds one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how, self.last = nn.Linear(8, 8), nn.Linear(8, 8), how, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.a(x))
        kept: Any = {
            "tensor": hidden, "list": [(hidden, {"also": hidden})], "partial": functools.partial(torch.add, hidden), "loss": hidden.sum(),
            "child": None,
        }[self.how]  # fmt: skip
        self.last = kept
        if self.how == "child":
            self.a.last = hidden  # type: ignore[assignment]
        out: torch.Tensor = self.b(hidden)
        return out


@pytest.mark.parametrize("how", ["tensor", "list", "partial", "loss", "child"])
def test_a_model_that_has_run_takes_an_adapter(how: str, tmp_path: Path) -> None:
    model, x = Keeping(how), torch.randn(2, 8)
    expected = model(x)
    kept = model.last
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2))
    assert torch.equal(adapted(x), expected)
    assert torch.equal(lowrank.add_lora(adapted, lowrank.LoRAConfig(r=2), "second")(x), expected)
    lowrank.save_adapter(adapted, tmp_path / "a")
    assert torch.equal(lowrank.load_adapter(model, tmp_path / "a")(x), expected)
    assert model.last is kept


def test_what_cannot_be_copied_is_said() -> None:
    model = Keeping("loss")
    model.last = (step for step in range(3))  # type: ignore[assignment]
    with pytest.raises(lowrank.UsageError, match=r"model: this .* cannot be copied"):
        lowrank.add_lora(model, lowrank.LoRAConfig(r=2))


class Experts(nn.Module):
    """Experts stacked in parameters of three dimensions, beside linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(4, 8, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))


def test_all_linear_says_that_it_passes_over_experts() -> None:
    with pytest.warns(
        UserWarning, match=r'"all-linear" passes over the experts of 1 modules \(the first is experts, parameters up\)'
    ):
        lowrank.add_lora(Experts(), lowrank.LoRAConfig(r=2))
    lowrank.add_lora(Experts(), lowrank.LoRAConfig(r=2, target_modules=["first"]))  # they were not asked for
