"""Which modules an adapter goes on, by PEFT's rules, and what is said of those it cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import compressed
from lora_models import BLOCKS, Encoder, Normed, random_adapter
from torch import Tensor, nn

import lowrank
from lowrank.errors import UsageError
from lowrank.lora import (
    LoRAConfig,
    add_lora,
)
from lowrank.lora.adapters import lora_layers


def named(**arguments: Any) -> set[str]:
    return set(lora_layers(lowrank.add_lora(Encoder(), lowrank.LoRAConfig(r=2, **arguments))))


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
    with pytest.warns(UserWarning, match=r"target_modules: 'score' is trained whole \(modules_to_save\): no adapter"):
        assert named(target_modules=["query", "score"], modules_to_save=["score"]) == {
            n for n in BLOCKS if "query" in n
        }


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


def test_a_plain_name_as_text_is_told_what_to_write() -> None:
    with pytest.raises(UsageError, match=r"'linear' matches no module .* write \['linear'\] or r'\.\*\\\.linear'"):
        add_lora(Normed(), LoRAConfig(target_modules="linear"))


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
        lowrank.add_lora(whole, random_adapter("0"))


def test_a_scaled_embedding_of_transformers_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    whole = nn.Sequential(BartScaledWordEmbedding(10, 4, 0, embed_scale=2.0))
    with pytest.raises(lowrank.UsageError, match="'0' matches 0, but BartScaledWordEmbedding has a forward of its own"):
        lowrank.add_lora(whole, random_adapter("0"))
    # PEFT adapts it: its file, made here with the plain layer, must not load onto the scaled one as if it were plain.
    lowrank.save_adapter(
        lowrank.add_lora(nn.Sequential(nn.Embedding(10, 4)), random_adapter("0")), tmp_path / "adapter"
    )
    with pytest.raises(lowrank.CheckpointError, match="cannot take: BartScaledWordEmbedding has a forward of its own"):
        lowrank.load_adapter(whole, tmp_path / "adapter")
