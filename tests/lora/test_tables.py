"""Token tables that travel with an adapter: new words are saved, brought along, and never dropped."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix_with_spectrum
from torch import Tensor, nn

import lowrank
from lowrank.io import read_safetensors_header
from lowrank.lora import LoRAConfig, add_lora, load_adapter, save_adapter
from lowrank.lora.tables import stands_for

peft = pytest.importorskip("peft", reason="the extra peft is not installed")
transformers = pytest.importorskip("transformers")

NEW = torch.tensor([[41, 42, 43, 5]])
TABLES = {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*save_embedding_layers|.*embedding layer")
        yield


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, words: int | None = None, seed: int = 0) -> Any:
    """Of 40 words, or resized to some more, whose rows are drawn by ``seed``."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    torch.manual_seed(seed)
    if words is not None:
        model.resize_token_embeddings(words, mean_resizing=False)
    return model.to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=NEW).logits
    return out


def trained(model: nn.Module, targets: list[str]) -> Any:
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def keys(folder: Path) -> set[str]:
    header = read_safetensors_header(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.") for name in header.tensors if "lora_" not in name}


def with_codes(model: Any) -> Any:
    model.model.embed_tokens = lowrank.QuantizedEmbedding.from_embedding(model.model.embed_tokens)
    model.lm_head = lowrank.QuantizedLinear.from_linear(model.lm_head)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]], ids=["apart", "on the tables"])
def test_a_table_of_pefts_is_put_where_it_belongs(tied: bool, targets: list[str], tmp_path: Path) -> None:
    if tied and len(targets) > 1:
        targets = ["embed_tokens", "q_proj"]
    theirs = trained(llama(tied=tied, words=44, seed=1), targets)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    base = llama(tied=tied, words=44, seed=2)
    before = logits(base)
    loaded = load_adapter(base, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(theirs))
    assert torch.equal(logits(base), before)
    # And once more, on rows drawn anew: what came with the adapter goes with it.
    save_adapter(loaded, tmp_path / "again")
    assert torch.equal(logits(load_adapter(llama(tied=tied, words=44, seed=3), tmp_path / "again")), logits(theirs))


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]], ids=["apart", "on the tables"])
def test_a_compressed_table_gives_way_to_one_that_the_file_brings(
    targets: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = trained(llama(words=44, seed=1), targets)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    base = with_codes(llama(words=44, seed=2))
    loaded = load_adapter(base, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(theirs))
    assert "brings a token table of its own for model.embed_tokens, which is no longer compressed" in caplog.text
    assert type(base.lm_head) is lowrank.QuantizedLinear
    # Where the codes are of that very table, they stay.
    same = load_adapter(with_codes(llama(words=44, seed=1)), tmp_path / "a")
    kinds = [type(getattr(table, "base_layer", table)) for table in (same.model.embed_tokens, same.lm_head)]
    assert kinds == [lowrank.QuantizedEmbedding, lowrank.QuantizedLinear]


def test_one_end_of_a_tie_brings_the_other(tmp_path: Path) -> None:
    theirs = trained(llama(tied=True, words=44, seed=1), ["embed_tokens"])
    theirs.save_pretrained(tmp_path / "a")
    assert keys(tmp_path / "a") == {"model.embed_tokens.base_layer.weight"}
    base = llama(tied=True, words=44, seed=2)
    base.model.embed_tokens = lowrank.QuantizedEmbedding.from_embedding(base.model.embed_tokens)
    assert torch.equal(logits(load_adapter(base, tmp_path / "a")), logits(theirs))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
def test_an_unchanged_table_of_another_type_is_the_models_own(
    stored: torch.dtype, own: torch.dtype, tmp_path: Path
) -> None:
    base = llama(dtype=own)
    trained(copy.deepcopy(base).to(stored), ["lm_head", "q_proj"]).save_pretrained(tmp_path / "a")
    assert "lm_head.base_layer.weight" in keys(tmp_path / "a")
    loaded = load_adapter(base, tmp_path / "a")
    assert loaded.lm_head.base_layer.weight.dtype is own
    if {stored, own} != {torch.bfloat16, torch.float16}:
        assert torch.equal(loaded.lm_head.base_layer.weight, base.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_new_words_are_saved_with_an_adapter_on_their_table(tied: bool, tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj"] + ([] if tied else ["lm_head"])
    ours = add_lora(
        llama(tied=tied, words=44, seed=1), LoRAConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    save_adapter(ours, tmp_path / "a")
    assert torch.equal(logits(load_adapter(llama(tied=tied, words=44, seed=2), tmp_path / "a")), logits(ours))
    again = peft.PeftModel.from_pretrained(llama(tied=tied, words=44, seed=2), tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(ours))


def test_a_table_that_is_left_out_beside_one_that_is_saved_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = add_lora(llama(words=44, seed=1), LoRAConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    save_adapter(ours, tmp_path / "auto")
    assert keys(tmp_path / "auto") == {"model.embed_tokens.base_layer.weight"}
    assert "lm_head is not. If words were added to the model, pass save_embedding_layers=True" in caplog.text
    save_adapter(ours, tmp_path / "all", save_embedding_layers=True)
    assert torch.equal(logits(load_adapter(llama(words=44, seed=2), tmp_path / "all")), logits(ours))
    save_adapter(ours, tmp_path / "none", save_embedding_layers=False)
    assert keys(tmp_path / "none") == set()
    for wrong in (1, "yes", None):
        with pytest.raises(lowrank.UsageError, match="save_embedding_layers: must be True, False or"):
            save_adapter(ours, tmp_path / "wrong", save_embedding_layers=wrong)  # type: ignore[arg-type]


def test_a_resized_model_of_a_directory_has_its_tables_saved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")

    def model(words: int, seed: int) -> Any:
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        found.resize_token_embeddings(words, mean_resizing=False)
        return found

    config = LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ours = add_lora(model(44, 1), config)
    save_adapter(ours, tmp_path / "a")
    assert keys(tmp_path / "a") == TABLES
    assert torch.equal(logits(load_adapter(model(44, 2), tmp_path / "a")), logits(ours))
    again = peft.PeftModel.from_pretrained(model(44, 2), tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(ours))
    with pytest.raises(
        lowrank.CheckpointError, match=r"trained with other words: call model\.resize_token_embeddings\(44\)"
    ):
        load_adapter(model(40, 2), tmp_path / "a")
    save_adapter(add_lora(model(40, 1), config), tmp_path / "unchanged")
    assert keys(tmp_path / "unchanged") == set()


def test_a_table_under_other_adapters_is_not_exchanged(tmp_path: Path) -> None:
    trained(llama(words=44, seed=1), ["q_proj"]).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    config = LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ours = add_lora(llama(words=44, seed=2), config, "ours")
    before = logits(ours)
    with pytest.raises(lowrank.CheckpointError, match=r"another table for .* under the adapters ours as well"):
        load_adapter(ours, tmp_path / "a", "theirs", inplace=True)
    assert torch.equal(logits(ours), before) and lowrank.adapter_summary(ours).active == ("ours",)
    # The same table is no obstacle.
    load_adapter(add_lora(llama(words=44, seed=1), config, "ours"), tmp_path / "a", "theirs")


def test_a_changed_weight_that_is_no_table_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_adapter(add_lora(model, LoRAConfig(r=1, target_modules=["0"])), tmp_path / "a")
    header = read_safetensors_header(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {name: lowrank.io.read_tensor(header, name) for name in header.tensors}
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    tensors |= {"base_model.model.1.weight": torch.ones(4, 4)}
    lowrank.io.write_safetensors(tmp_path / "a" / "adapter_model.safetensors", tensors, header.metadata)
    with pytest.raises(lowrank.CheckpointError, match=r"1 tensors have no place in this model, the first is 1\.weight"):
        load_adapter(model, tmp_path / "a")


def spectrum(rows: int, columns: int) -> Tensor:
    return matrix_with_spectrum(rows, columns, torch.logspace(0, -2, columns)).float()


@pytest.mark.parametrize("kind", ["codes", "factors", "head of codes", "head of factors"])
def test_a_layer_stands_for_the_table_it_was_made_of_and_no_other(kind: str) -> None:
    table = spectrum(60, 16)
    layer: Any
    if "head" in kind:
        linear = nn.Linear(16, 60, bias=False)
        linear.weight = nn.Parameter(table)
        layer = (
            lowrank.QuantizedLinear.from_linear(linear)
            if "codes" in kind
            else lowrank.SVDCompressedLinear.from_linear(linear, rank=6)
        )
    else:
        embedding = nn.Embedding.from_pretrained(table)
        layer = (
            lowrank.QuantizedEmbedding.from_embedding(embedding)
            if kind == "codes"
            else lowrank.LowRankEmbedding.from_embedding(embedding, rank=6)
        )
    assert stands_for(layer, table)
    changed = table.clone()
    changed[-1] = torch.randn(16) * table[-1].norm()  # one new word
    assert not stands_for(layer, changed)
    assert not stands_for(layer, table.roll(1, 0))
    assert not stands_for(layer, 1.3 * table)


def test_the_directory_that_a_model_came_from_may_be_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    folder = save_adapter(add_lora(model, LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert keys(folder) == set() and "token tables" not in caplog.text
