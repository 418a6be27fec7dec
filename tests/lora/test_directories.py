"""From a compressed directory to a fine-tuned, merged one: the formats stay, the file loads bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_models import TOKENS, Tiny, compressed
from lora_bases import randomise

import lowrank
from lowrank.checkpoint import save_compressed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_saved_and_loaded_in_its_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    base = compressed(dtype)
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["up", "down"]))
    randomise(model)
    with torch.no_grad():
        separate = model(TOKENS)
        plain = lowrank.unload_lora(lowrank.merge_lora(model))
        merged = plain(TOKENS)
    assert not torch.equal(merged, base(TOKENS))
    assert float((merged - separate).norm() / separate.norm()) < 0.05
    formats = {name: module.format for name, module in base.named_modules() if hasattr(module, "format")}
    assert {name: module.format for name, module in plain.named_modules() if hasattr(module, "format")} == formats
    assert plain.up.rank == base.up.rank + 2 and plain.down.rank == base.down.rank + 2  # type: ignore[union-attr, operator]
    save_compressed(plain, tmp_path / "merged")
    loaded = lowrank.load_model(tmp_path / "merged", model=Tiny().to(dtype).eval())
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), merged)


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path: Path) -> None:
    model = lowrank.add_lora(compressed(), lowrank.LoRAConfig(r=2, target_modules=["up"], modules_to_save=["norm"]))
    with pytest.raises(lowrank.UsageError, match=r"layer up has adapters.*save_adapter.*merge_lora"):
        save_compressed(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_compressed(lowrank.unload_lora(lowrank.merge_lora(model)), tmp_path / "model")
