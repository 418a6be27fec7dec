"""lowrank finetune and merge: texts too short to teach, GPT-2, and what healing or truncation is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tiny_models import WORDS, make_directory, make_text, make_tokenizer

import lowrank
from lowrank.checkpoint import save_compressed
from lowrank.cli.app import main
from lowrank.integrations.transformers import load_pretrained


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose tokenizer adds no token of its own, a llama, and texts."""
    from tokenizers import processors
    from transformers import GPT2Config, GPT2LMHeadModel

    room = tmp_path_factory.mktemp("cli-labels")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 4, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(room / "gpt2")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])  # type: ignore[attr-defined]
    tokenizer.save_pretrained(room / "gpt2")  # type: ignore[attr-defined]
    make_directory(room / "llama")
    make_text(room / "texts.txt", 12)
    (room / "words.txt").write_text("cat\ndog\nsat\n")
    (room / "mixed.txt").write_text("cat\n" + (room / "texts.txt").read_text() + "dog\n")
    return room


def finetune(room: Path, out: str, *more: str, model: str = "gpt2", data: str = "texts.txt") -> int:
    arguments = ["finetune", str(room / model), "--data", str(room / data), "-o", str(room / out), "--rank", "2"]
    return main([*arguments, "--overwrite", "--steps", "2", "--json", *more])


def test_gpt2_is_trained_on_texts_and_on_labels_that_it_shifts(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2LMHeadModel

    assert finetune(room, "a", "-q") == 0
    capfd.readouterr()
    ids = np.random.default_rng(0).integers(4, 20, (8, 6))
    np.savez(room / "data.npz", input_ids=ids, labels=ids)
    assert finetune(room, "a", "-q", "--batch-size", "8", data="data.npz") == 0
    history = json.loads(capfd.readouterr().out)["history"]
    rows = torch.from_numpy(ids)
    model = GPT2LMHeadModel.from_pretrained(room / "gpt2").eval()
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    # GPT-2 has dropout, and training has it on.
    assert history[0]["loss"] == pytest.approx(float(expected), rel=0.05)


def test_texts_too_short_to_teach_are_left_out_and_counted(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert finetune(room, "a", "--validation", str(room / "mixed.txt"), data="mixed.txt") == 0
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if "left out" in line]
    assert len(said) == 2 and all("mixed.txt: 2 of 14 texts left out" in line for line in said), err
    mixed = json.loads(out)
    assert finetune(room, "b", "--validation", str(room / "texts.txt"), "-q") == 0
    out, err = capfd.readouterr()
    assert err == "" and json.loads(out)["evaluations"][0]["value"] == pytest.approx(mixed["evaluations"][0]["value"])
    assert finetune(room, "a", "-q", data="mixed.txt") == 0
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("where", ["data", "validation"])
def test_a_file_without_anything_to_learn_is_refused_by_name(
    room: Path, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez(room / "blank.npz", input_ids=np.ones((4, 6), dtype=np.int64), labels=np.full((4, 6), -100))
    np.savez(room / "good.npz", input_ids=np.ones((4, 6), dtype=np.int64), labels=np.ones((4, 6), dtype=np.int64))
    for bad, good, part in (
        ("words.txt", "texts.txt", "none of its 3 texts has two tokens"),
        ("blank.npz", "good.npz", "batch 0: none of its 24 labels counts"),
    ):
        names = (bad, good) if where == "data" else (good, bad)
        capfd.readouterr()
        assert finetune(room, "never", "--validation", str(room / names[1]), "-q", data=names[0]) == 3
        err = capfd.readouterr().err
        assert bad in err and part in err and len(err.splitlines()) == 1, err
        assert not (room / "never").exists()


def test_a_decoder_that_does_not_shift_its_labels_is_told_what_texts_train(
    room: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import BartConfig, BartForCausalLM

    sides = {f"decoder_{what}": 2 for what in ("layers", "attention_heads", "ffn_dim")}
    BartForCausalLM(BartConfig(vocab_size=30, d_model=16, **sides)).save_pretrained(room / "bart")
    assert finetune(room, "never", "-q", model="bart") == 3
    assert "shift their labels themselves, and this is a BartForCausalLM" in capfd.readouterr().err


@pytest.mark.parametrize("option", [["--modules-to-save", "norm"], ["--dropout", "0.5"]])
def test_what_healing_does_not_use_is_refused(room: Path, option: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert finetune(room, "never", "-q", "--heal-from", str(room / "llama"), *option, model="llama") == 2
    assert f"{option[0]}: not with --heal-from" in capfd.readouterr().err
    assert not (room / "never").exists()


@pytest.mark.parametrize("option", [["--rank", "1"], ["--max-error", "0.999"]])
def test_a_change_that_truncation_loses_is_not_laid_on_rounding(
    room: Path, option: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_pretrained(room / "llama", tokenizer=False)[0]
    name = "model.layers.0.mlp.up_proj"
    layer = lowrank.SVDCompressedLinear.from_linear(model.get_submodule(name), rank=8)
    model.set_submodule(name, layer)
    save_compressed(model, room / "factored", overwrite=True, source=room / "llama")
    config = lowrank.LoRAConfig(r=2, target_modules=[name], init_lora_weights=False)
    lowrank.save_adapter(lowrank.add_lora(model, config, seed=0), room / "change", overwrite=True)
    capfd.readouterr()
    start = ["merge", str(room / "factored"), str(room / "change"), "-o", str(room / "merged"), "--overwrite", "-q"]
    assert main([*start, *option]) == 0
    said = capfd.readouterr().out
    assert f"{option[0]}: truncation took over half of the change from 1 layers (first {name})" in said
    assert "rounding" not in said
