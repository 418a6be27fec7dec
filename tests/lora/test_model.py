"""Adapters on whole models: which modules, several adapters, switching, combining, failing without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressed_models import TOKENS, Tiny, compressed
from helpers import seeded
from lora_bases import close, randomise
from torch import Tensor, nn

import lowrank
from lowrank.lora.model import active_adapters, adapter_names, lora_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + torch.tanh(self.query(x)) * self.key(x))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.score = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.encoder["layers"]:  # type: ignore[union-attr]
            x = block(x)
        out: Tensor = self.score(self.attention(x, x, x)[0])
        return out


IDS = torch.arange(10).reshape(2, 5) % 9


def run(model: nn.Module) -> Tensor:
    """Without gradients: nn.MultiheadAttention takes another path, with other rounding, where something requires one."""
    with torch.no_grad():
        out: Tensor = model(IDS)
    return out


def named(**arguments: Any) -> set[str]:
    return set(lora_layers(lowrank.add_lora(Model(), lowrank.LoRAConfig(r=2, **arguments))))


BLOCKS = {f"encoder.layers.{index}.{name}" for index in range(3) for name in ("query", "key")}


def test_which_modules() -> None:
    assert named() == named(target_modules="all-linear") == BLOCKS | {"score"}
    assert named(target_modules=["query"]) == {name for name in BLOCKS if "query" in name}
    assert named(target_modules=["layers.1.key", "score", "embed"]) == {"encoder.layers.1.key", "score", "embed"}
    assert named(target_modules=r".*layers\.[02]\.query") == {"encoder.layers.0.query", "encoder.layers.2.query"}
    assert named(target_modules="all-linear", exclude_modules=["key"]) == {n for n in BLOCKS if "query" in n} | {
        "score"
    }
    assert named(exclude_modules=r"encoder.*") == {"score"}
    assert named(target_modules=["query", "key"], layers_to_transform=[1]) == {n for n in BLOCKS if ".1." in n}
    assert named(target_modules=["query"], layers_to_transform=2, layers_pattern="layers") == {"encoder.layers.2.query"}
    assert named(target_modules=["query", "score"], modules_to_save=["score"]) == {n for n in BLOCKS if "query" in n}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["query", "keys"]},
            r"target_modules: 'keys' matches no module of the model; did you mean .*key",
        ),
        ({"target_modules": r".*\.value"}, "target_modules: .* matches no module"),
        ({"target_modules": ["uery"]}, "did you mean query"),
        ({"target_modules": ["query"], "exclude_modules": ["kee"]}, "exclude_modules: 'kee' matches no module .*key"),
        (
            {"target_modules": ["query"], "modules_to_save": ["scores"]},
            "modules_to_save: 'scores' .*did you mean score",
        ),
        ({"target_modules": ["query"], "rank_pattern": {"key": 4}}, "rank_pattern: 'key' matches no adapted module"),
        ({"target_modules": ["query"], "alpha_pattern": {"quary": 4}}, "alpha_pattern: 'quary' .*did you mean query"),
        (
            {"target_modules": ["query"], "layers_to_transform": [0, 7]},
            r"no target module in layer 7; there are layers \[0",
        ),
        ({"target_modules": ["norm"]}, "'norm' matches encoder.layers.0.norm, but no adapter fits a LayerNorm"),
        ({"target_modules": ["out_proj"]}, "'out_proj' matches attention.out_proj, but nn.MultiheadAttention reads"),
        ({"target_modules": ["encoder"]}, "'encoder' matches encoder, but no adapter fits a ModuleDict"),
    ],
)
def test_an_entry_that_matches_nothing_is_a_usage_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lowrank.UsageError, match=message) as caught:
        named(**arguments)
    assert caught.value.exit_code == 2


def test_the_summary_names_everything_with_weights() -> None:
    model = lowrank.add_lora(
        Model(),
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
    assert total == sum(p.numel() for p in Model().parameters()) + 5 * 32 + 36
    lines = str(summary).splitlines()
    assert len(lines) == 5 + 1 + 7 + 1
    assert (
        lines[-1]
        == f"trainable params: {trainable} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    )


def test_all_linear_covers_compressed_layers_and_codes_count_as_parameters() -> None:
    model = compressed()
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2, target_modules="all-linear"))
    # mid and again are one module: adapted once, and in both places.
    assert set(lora_layers(adapted)) == {"up", "mid", "down", "head"}
    assert adapted.again is adapted.mid
    trainable, total = lowrank.trainable_parameters(adapted)
    assert trainable == 2 * (8 + 12) + 2 * 24 + 2 * (12 + 8) + 2 * (8 + 11)
    codes = 12 * 12 + (8 + 12) * 5 + 11 * 8  # the tied table once
    assert total == trainable + codes + sum(p.numel() for p in model.parameters())


def test_inplace_or_a_copy() -> None:
    model = Model()
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2))
    assert adapted is not model and lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    same = lowrank.add_lora(model, lowrank.LoRAConfig(r=2), inplace=True)
    assert same is model and lora_layers(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_switch_disable_delete() -> None:
    base = Model().eval()
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


def test_a_weighted_adapter_is_the_weighted_sum() -> None:
    model = lowrank.add_lora(Model().double().eval(), lowrank.LoRAConfig(r=2, target_modules=["query", "score"]), "one")
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
    model = lowrank.add_lora(Model(), lowrank.LoRAConfig(r=2, use_dora=True), "dora")
    with pytest.raises(lowrank.AdapterError, match="DoRA"):
        lowrank.add_weighted_adapter(model, ["dora"], [1.0], "sum")
    with pytest.raises(lowrank.UsageError, match="need one for each adapter"):
        lowrank.add_weighted_adapter(model, ["dora"], [1.0, 2.0], "sum")
    with pytest.raises(lowrank.AdapterError, match="'other': not on this model, which has dora"):
        lowrank.add_weighted_adapter(model, ["other"], [1.0], "sum")


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3, "default"])
def test_names_that_cannot_be(name: Any) -> None:
    model = lowrank.add_lora(Model(), lowrank.LoRAConfig(r=2))
    with pytest.raises(lowrank.UsageError, match="adapter_name"):
        lowrank.add_lora(model, lowrank.LoRAConfig(r=2), name)


def test_modules_to_save_train_whole_and_switch() -> None:
    base = Model().eval()
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


def test_a_failure_midway_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2))
    weight = model[0].weight.detach().clone()
    with pytest.raises(lowrank.AdapterError, match="layer 1"):
        lowrank.add_lora(
            model, lowrank.LoRAConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa"), inplace=True
        )
    assert torch.equal(model[0].weight, weight)
    assert type(model[0]) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(3, 3), lambda: "model", lambda: torch.compile(nn.Sequential(nn.Linear(2, 2)))]
)
def test_what_is_no_model(build: Any) -> None:
    with pytest.raises(lowrank.UsageError, match="model: "):
        lowrank.add_lora(build())


def test_nothing_to_adapt() -> None:
    with pytest.raises(lowrank.UsageError, match="nothing in the model fits it; 0: not a linear layer"):
        lowrank.add_lora(nn.Sequential(nn.LayerNorm(3)))


def test_the_fast_path_of_an_encoder_layer_is_not_bypassed() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=2))
    assert set(lora_layers(adapted)) == {"1"}
    assert "fast path" in lowrank.adapter_summary(adapted).left["0.linear1"]


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
