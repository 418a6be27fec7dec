"""The main path on models of transformers: GPT-2's Conv1D, tied embeddings, tokenizer files found by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_directory

import lowrank
from lowrank.layers import CompressedLayer

transformers = pytest.importorskip("transformers")


def test_a_gpt2_shaped_model_is_compressed_saved_and_loaded_to_the_last_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 40, (64, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(16)]
    result = lowrank.compress_model(model, error_budget=0.1, calibration=batches, progress=False)
    rows = {row.name: row for row in result.report.rows}
    assert {row.kind for row in rows.values()} >= {"Conv1D", "Embedding", "Linear", "LayerNorm"}
    assert isinstance(result.model.transformer.h[0].mlp.c_fc, CompressedLayer)
    assert rows["lm_head"].bytes_after == 0 and rows["lm_head"].format == rows["transformer.wte"].format
    assert result.report.totals["error_upper"] <= 0.1
    result.save(tmp_path / "out")
    loaded = lowrank.load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids[:4]).logits, result.model(ids[:4]).logits)
        again = lowrank.apply_plan(model, result.plan, batches)
        assert torch.equal(again(ids[:4]).logits, result.model(ids[:4]).logits)


def test_tokenizer_files_come_along_from_where_the_model_was_loaded(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "source", tied=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(4, 20, (48, 8), generator=torch.Generator().manual_seed(0))
    result = lowrank.compress_model(model, error_budget=0.2, calibration=list(ids.split(16)), progress=False)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
