"""Hugging Face directories: loaded without a skeleton by us, and not at all by transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lowrank.checkpoint import describe, load_model, save_compressed, stored_tensors
from lowrank.errors import CheckpointError
from lowrank.layers import QuantizedEmbedding, QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).reshape(2, 6)


def make_bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def compressed_bert(dtype: torch.dtype = torch.float32) -> Any:
    model = make_bert().to(dtype)
    model.embeddings.word_embeddings = QuantizedEmbedding.from_embedding(model.embeddings.word_embeddings)
    layer = model.encoder.layer[0]
    layer.attention.self.query = QuantizedLinear.from_linear(layer.attention.self.query)
    layer.intermediate.dense = QuantizedLowRankLayer.from_linear(layer.intermediate.dense, rank=6)
    layer.output.dense = SVDCompressedLinear.from_linear(layer.output.dense, rank=7)
    return model


def make_llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_compressed(compressed_bert(), tmp_path / "out")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / "config.json").read_text())
    change(document)
    (path / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_skeleton_is_needed(tmp_path: Path, dtype: torch.dtype) -> None:
    model = compressed_bert(dtype)
    loaded = load_model(save_compressed(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_reload_in_another_process_is_bit_for_bit(tmp_path: Path, saved: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); from lowrank.checkpoint import load_model\n"
        "with torch.no_grad(): y = load_model(sys.argv[1])(torch.arange(12).reshape(2, 6)).last_hidden_state\n"
        "torch.save(y, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path / "y.pt")], check=True)
    with torch.no_grad():
        expected = compressed_bert()(TOKENS).last_hidden_state
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


@pytest.mark.parametrize(
    "name", ["AutoModel", "BertModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"]
)
def test_transformers_alone_fails_instead_of_inventing_weights(saved: Path, name: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        getattr(transformers, name).from_pretrained(saved)


def test_the_guard_is_stored_and_dropped(saved: Path) -> None:
    guard = json.loads((saved / "lowrank_config.json").read_text())["guard"]
    assert guard == "embeddings.word_embeddings.weight"
    found = describe(saved)
    assert found["tensor_bytes"] == sum(tensor.nbytes for tensor in stored_tensors(compressed_bert()).values())
    assert found["tensors"] == len(stored_tensors(compressed_bert()))
    assert guard not in load_model(saved).state_dict()


def test_config_is_the_source_config_and_ours(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lowrank"
    assert config["hidden_size"] == 16
    assert config["architectures"] == ["BertModel"]
    assert "_name_or_path" not in config


def test_saving_again_gives_the_same_bytes(tmp_path: Path, saved: Path) -> None:
    again = save_compressed(load_model(saved), tmp_path / "again")
    for path in saved.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_dtype_and_device(saved: Path) -> None:
    loaded = load_model(saved, device="cpu", dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        expected = torch.float32 if name.endswith("scale") else torch.bfloat16
        assert tensor.dtype == expected or not tensor.is_floating_point(), name
    with torch.no_grad():
        assert loaded(TOKENS).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("compress", [False, True])
def test_tied_embeddings(tmp_path: Path, compress: bool) -> None:
    model = make_llama(tied=True)
    if compress:
        embed = QuantizedEmbedding.from_embedding(model.model.embed_tokens)
        head = QuantizedLinear.from_linear(model.lm_head)
        head.codes, head.scale = embed.codes, embed.scale
        model.model.embed_tokens, model.lm_head = embed, head
    with torch.no_grad():
        expected = model(TOKENS).logits
    path = save_compressed(model, tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    loaded: Any = load_model(path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
    one, other = loaded.model.embed_tokens, loaded.lm_head
    assert (one.codes is other.codes) if compress else (one.weight is other.weight)


def test_embeddings_that_differ_are_both_kept(tmp_path: Path) -> None:
    model = make_llama(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    with torch.no_grad():
        expected = model(TOKENS).logits
    path = save_compressed(model, tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        assert torch.equal(load_model(path)(TOKENS).logits, expected)


def test_side_files_come_along_and_code_does_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "modeling.py", "pytorch_model.bin", "config.json"):
        (source / name).write_text(name)
    path = save_compressed(compressed_bert(), tmp_path / "out", source=source)
    assert sorted(os.listdir(path)) == [
        "README.md", "config.json", "lowrank_config.json", "model.safetensors", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    assert "BertModel" in (path / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(num_hidden_layers=10_000_000), "num_hidden_layers"),
        (lambda c: c.update(num_hidden_layers=3), "encoder.layer.2"),
        (lambda c: c.update(num_hidden_layers=1), "encoder.layer.1"),
        (lambda c: c.update(hidden_size=2**40), "hidden_size"),
        (lambda c: c.update(hidden_size=24), "in the model, but"),
        (lambda c: c.update(vocab_size=39), "in the model, but"),
        (lambda c: c.update(max_position_embeddings=10**11), "max_position_embeddings is 1e.11 but"),
        (lambda c: c.update(model_type="nonsense"), "no model type"),
        (lambda c: c.update(hidden_size="16"), "config"),
    ],
)
def test_sizes_that_do_not_fit_the_tensors(saved: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(saved, change)
    with (
        mock.patch("lowrank.io.index.read_tensor", side_effect=AssertionError("read")),
        pytest.raises(CheckpointError, match=words) as caught,
    ):
        load_model(saved)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_run(saved: Path, tmp_path: Path) -> None:
    (saved / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(saved, lambda c: c.update(auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}))
    load_model(saved)
    assert not (tmp_path / "ran").exists()


def test_an_infinity_in_the_configuration_goes_through_a_file(tmp_path: Path) -> None:
    """Some configurations hold one by default (the limits of Mamba-2's time steps), which JSON has no number for."""
    model = compressed_bert()
    model.config.time_step_limit = (0.0, float("inf"))
    model.config.floor = float("-inf")
    save_compressed(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert list(loaded.config.time_step_limit) == [0.0, float("inf")] and loaded.config.floor == float("-inf")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
    # No reader of strict JSON stumbles over it.
    text = (tmp_path / "out" / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
