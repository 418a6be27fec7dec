"""Where adapters meet other adapters, odd modules, half precision and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from lowrank.lora.model import active_adapters, saved_modules


def model(*, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12, dtype=dtype), nn.Tanh(), nn.Linear(12, 5, dtype=dtype))


def config(*names: str, **options: object) -> lowrank.LoRAConfig:
    return lowrank.LoRAConfig(r=2, target_modules=list(names), init_lora_weights=False, **options)  # type: ignore[arg-type]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 8, generator=seeded(1)).to(dtype)


def test_merging_a_named_adapter_leaves_no_other_in_the_sum() -> None:
    adapted = lowrank.add_lora(model(), config("0", "2", modules_to_save=None), "both")
    lowrank.add_lora(adapted, config("0"), "first", inplace=True)
    x = inputs()
    with torch.no_grad():
        expected = adapted(x)
        lowrank.set_adapter(adapted, "both")
        before = adapted(x)
        lowrank.merge_lora(adapted, "first")
        torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)
        lowrank.unmerge_lora(adapted)
        assert torch.equal(adapted(x), expected)
        lowrank.set_adapter(adapted, "both")
        assert torch.equal(adapted(x), before)


def test_merging_a_named_adapter_runs_its_trained_modules() -> None:
    adapted = lowrank.add_lora(model(), config("0", modules_to_save=["2"]), "a")
    lowrank.add_lora(adapted, config("0", modules_to_save=["2"]), "b", inplace=True)
    with torch.no_grad():
        saved_modules(adapted)["2"].modules_to_save["b"].weight.add_(1.0)
        expected = adapted(inputs())
        lowrank.set_adapter(adapted, "a")
        plain = lowrank.unload_lora(lowrank.merge_lora(adapted, ["b"]))
        torch.testing.assert_close(plain(inputs()), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_is_refused_leaves_the_active_adapter_active() -> None:
    adapted = lowrank.add_lora(model(), config("0"), "a")
    lowrank.add_lora(adapted, config("0"), "b", inplace=True)
    with torch.no_grad():
        adapted[0].lora_B["a"].weight.fill_(float("nan"))
    with pytest.raises(lowrank.NumericsError):
        lowrank.merge_lora(adapted, "a")
    assert active_adapters(adapted) == ["b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dora_with_dropout_trains_over_half_precision(dtype: torch.dtype) -> None:
    adapted = lowrank.add_lora(model(dtype=dtype), config("0", use_dora=True, lora_dropout=0.2)).train()
    out = adapted(inputs(dtype))
    assert out.dtype is dtype
    out.float().square().sum().backward()
    assert bool(adapted[0].lora_A["default"].weight.grad.isfinite().all())


class Scaled(nn.Embedding):
    """As several models of transformers have it."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8.0


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


@pytest.mark.parametrize("inner", [Scaled(10, 4), Doubled(4, 4)])
def test_a_subclass_with_a_forward_of_its_own_is_refused_by_name(inner: nn.Module) -> None:
    whole = nn.Sequential(inner)
    with pytest.raises(lowrank.UsageError, match=rf"{type(inner).__name__} has a forward of its own"):
        lowrank.add_lora(whole, config("0"))


def test_a_scaled_embedding_of_transformers_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    whole = nn.Sequential(BartScaledWordEmbedding(10, 4, 0, embed_scale=2.0))
    with pytest.raises(lowrank.UsageError, match="'0' matches 0, but BartScaledWordEmbedding has a forward of its own"):
        lowrank.add_lora(whole, config("0"))
    # PEFT adapts it: its file, made here with the plain layer, must not load onto the scaled one as if it were plain.
    lowrank.save_adapter(lowrank.add_lora(nn.Sequential(nn.Embedding(10, 4)), config("0")), tmp_path / "adapter")
    with pytest.raises(lowrank.CheckpointError, match="cannot take: BartScaledWordEmbedding has a forward of its own"):
        lowrank.load_adapter(whole, tmp_path / "adapter")


def test_a_file_without_anything_for_the_model_is_refused(tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.add_lora(model(), config("0")), tmp_path / "adapter")
    with pytest.raises(lowrank.CheckpointError, match=r"holds an adapter for 0 .* which this model cannot take"):
        lowrank.load_adapter(nn.ModuleDict({"a": nn.Linear(8, 12)}), tmp_path / "adapter")
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(lowrank.CheckpointError, match="holds no adapter of a layer"):
        lowrank.load_adapter(nn.ModuleDict({"a": nn.Linear(8, 12)}), tmp_path / "adapter")


def test_pissa_under_an_adapter_that_is_there_is_refused() -> None:
    adapted = lowrank.add_lora(model(), config("0"), "first")
    with torch.no_grad():
        before = adapted(inputs())
    with pytest.raises(lowrank.AdapterError, match=r"pissa.*first"):
        lowrank.add_lora(
            adapted, lowrank.LoRAConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), "second", inplace=True
        )
    with torch.no_grad():
        assert torch.equal(adapted(inputs()), before)


def test_an_adapter_cannot_be_named_as_an_attribute_of_every_module() -> None:
    with pytest.raises(lowrank.UsageError, match="adapter_name"):
        lowrank.add_lora(model(), config("0"), "training")


def test_an_adapter_that_does_not_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    adapted = lowrank.add_lora(model(), config("0", modules_to_save=["2"]), "a")
    lowrank.save_adapter(adapted, tmp_path / "good")
    stored = lowrank.add_lora(model(), config("0", modules_to_save=["2"]), "b")
    with torch.no_grad():
        stored[0].lora_A["b"].weight[0, 0] = float("nan")
        saved_modules(adapted)["2"].modules_to_save["a"].weight.add_(1.0)
        before = adapted(inputs())
    lowrank.save_adapter(stored, tmp_path / "bad")
    flags = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    with pytest.raises(lowrank.CheckpointError, match="NaN"):
        lowrank.load_adapter(adapted, tmp_path / "bad", "b", inplace=True)
    with torch.no_grad():
        assert torch.equal(adapted(inputs()), before)
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == flags
    plain = model()
    with pytest.raises(lowrank.CheckpointError, match="NaN"):
        lowrank.load_adapter(plain, tmp_path / "bad", inplace=True)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert list(plain.state_dict()) == list(model().state_dict())


def test_a_rank_other_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.add_lora(model(), config("0")), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(lowrank.CheckpointError, match=r"layer 0: .*rank 4.*rank 2"):
        lowrank.load_adapter(model(), tmp_path / "a")


def test_a_rank_that_changes_nothing_leaves_the_codes() -> None:
    base = nn.Sequential(lowrank.QuantizedLowRankLayer.from_linear(nn.Linear(16, 16), rank=4))
    merged = lowrank.merge_lora(lowrank.add_lora(base, config("0")), rank=6)
    assert torch.equal(merged[0].base_layer.left_codes[:, :4], base[0].left_codes)
    assert "2 components appended" in lowrank.merge_report(merged).rows[0].note


def test_a_name_that_ends_another_takes_no_rank_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"a": nn.Linear(6, 6), "x": nn.ModuleDict({"a": nn.Linear(6, 6)})})
    lowrank.add_lora(whole, config("a"), "all", inplace=True)
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


def test_an_alpha_beyond_any_float_is_bad_input() -> None:
    with pytest.raises(lowrank.AdapterError, match="lora_alpha"):
        lowrank.LoRAConfig(lora_alpha=10**400)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_number_too_long_to_print_is_bad_input_all_the_same(field: str) -> None:
    with pytest.raises(
        lowrank.LowRankError, match=f"{field}: must be .*, got an integer of over 4,000 digits"
    ) as caught:
        lowrank.LoRAConfig(**{field: -(10**5000)})
    assert caught.value.exit_code == 3
