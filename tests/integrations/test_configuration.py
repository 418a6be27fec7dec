"""Nothing of a directory vanishes, nothing beside it is taken unasked, and a configuration asks for no more than its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_directory

from lowrank.errors import CheckpointError, StorageError
from lowrank.integrations.transformers import load_pretrained, load_tokenizer
from lowrank.io import tensors as io_tensors

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_directory(tmp_path / "model")


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(directory: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_pretrained(directory, tokenizer=False)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


# everything in the file is loaded, or refused by name


def test_fewer_layers_than_the_file_holds(directory: Path) -> None:
    edit(directory, num_hidden_layers=1)
    refused(directory, r"tensors of the file have no place in LlamaForCausalLM, the first 'model\.layers\.1\.")


@pytest.mark.parametrize("name", ["extra.weight", "lm_head.bias", "model.layers.0.mlp.gate_proj.bias"])
def test_a_tensor_that_the_class_does_not_know(directory: Path, name: str) -> None:
    file = directory / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(3)}, file, metadata={"format": "pt"})
    refused(directory, f"the first '{name}'")


def test_what_older_versions_stored_beside_the_weights_is_no_stranger(directory: Path) -> None:
    before = load_pretrained(directory, tokenizer=False)[0]
    file = directory / "model.safetensors"
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    save_file({**load_file(file), **frequencies}, file, metadata={"format": "pt"})
    after = load_pretrained(directory, tokenizer=False)[0]
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "named", "found"),
    [
        ("BertForMaskedLM", ["BertModel"], "BertForMaskedLM"),
        ("BertForPreTraining", ["BertForMaskedLM"], "BertForPreTraining"),
        ("BertForQuestionAnswering", None, "BertForQuestionAnswering"),
        ("BertModel", ["BertModel"], "BertModel"),
    ],
)
def test_the_class_that_takes_every_tensor_is_found(tmp_path: Path, kind: str, named: Any, found: str) -> None:
    getattr(transformers, kind)(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    edit(tmp_path, architectures=named)
    model, _ = load_pretrained(tmp_path)
    assert type(model).__name__ == found
    assert model.config.architectures == [found]


def test_an_adapter_beside_the_model_is_not_applied(directory: Path) -> None:
    ids = torch.arange(1, 9)[None]
    before = load_pretrained(directory, tokenizer=False)[0](input_ids=ids).logits
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    width = load_file(directory / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape[0]
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = {f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(width, 2)}
    save_file(adapter, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_pretrained(directory, tokenizer=False)[0](input_ids=ids).logits, before)


def test_a_file_cut_short_while_it_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reading = directory / "model.safetensors", io_tensors.read_tensor

    def cutting(header: Any, name: str) -> torch.Tensor:
        file.write_bytes(file.read_bytes()[:-100])
        return reading(header, name)

    monkeypatch.setattr("lowrank.io.index.read_tensor", cutting)
    with pytest.raises(StorageError, match=r"changed its length") as caught:
        load_pretrained(directory, tokenizer=False)
    assert caught.value.exit_code == 5


# sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10_000_000},
        {"n_layer": 10**9},
        {"vocab_size": 10**9},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9},
        {"head_dim": 10**12},
        {"text_config": {"depths": [1, 10**7]}},
        {"num_local_experts": 10**8},
        {"layers": 1e9},
        {"max_position_embeddings": 10**12},
    ],
)
def test_sizes_are_compared_with_the_tensors_before_anything_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lowrank.io.index.read_tensor", never)
    edit(directory, **changes)
    refused(directory, next(iter(changes.get("text_config", changes))))


# sources


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_weights": "other.safetensors"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"text_config": "somebody/attention"}},
        {"experts_implementation": "somebody/experts"},
        {"use_kernels": True},
        {"backbone": "somebody/resnet"},
        {"text_config": {"vision_model_name": "https://example.org/model"}},
        {"speaker_file": "voices"},
        {"encoder_name_or_path": "/etc/passwd"},
        {"parts": ["../other/model.safetensors"]},
    ],
)
def test_fields_that_name_a_file_or_a_source_are_refused(directory: Path, changes: dict[str, Any]) -> None:
    edit(directory, **changes)
    refused(directory, r"config\.json: ")


def test_what_only_says_where_a_model_came_from_is_no_obstacle(directory: Path) -> None:
    edit(
        directory,
        _name_or_path="/home/somebody/model",
        id2label={"0": "n/a", "1": "a/b"},
        transformers_version="4.1/x"[:3],
    )
    assert type(load_pretrained(directory, tokenizer=False)[0]).__name__ == "LlamaForCausalLM"


def test_a_tokenizer_file_that_lies_elsewhere(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (directory / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link that leads out"):
        load_tokenizer(directory)
