from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tiny_models import WORDS, make_causal_model, make_directory, make_text, make_tokenizer

from lowrank.errors import CalibrationError, CheckpointError, UsageError
from lowrank.integrations.transformers import (
    build_from_config,
    is_model_directory,
    load_pretrained,
    load_tokenizer,
    read_text_samples,
    token_limit,
    tokenize,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("hf") / "model with spaces")


def edit_config(directory: Path, target: Path, **changes: object) -> Path:
    """A copy of the directory with a changed config.json."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_loads_what_was_saved_in_evaluation_mode(directory: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    reference = make_causal_model()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert tokenizer is not None
    assert_same_state(reference, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    make_causal_model().to(dtype).save_pretrained(tmp_path / "m")
    assert load_pretrained(tmp_path / "m")[0].dtype == dtype
    assert load_pretrained(tmp_path / "m", torch.float32)[0].dtype == torch.float32
    assert build_from_config(tmp_path / "m").dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_a_built_model_with_the_same_weights_gives_the_same_bits(directory: Path) -> None:
    model, _ = load_pretrained(directory, tokenizer=False)
    built = build_from_config(directory)
    built.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(built(ids).logits, model(ids).logits)
    assert built.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_ties_survive_building() -> None:
    model = make_causal_model(tied=True)
    built = build_from_config({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    assert built.lm_head.weight is built.model.embed_tokens.weight


def test_nothing_is_printed_and_settings_come_back(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_pretrained(directory)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_remote_code_is_never_run(directory: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    known = edit_config(directory, tmp_path / "known", auto_map=auto_map)
    changes = {"auto_map": auto_map, "model_type": "evil", "architectures": ["EvilModel"]}
    unknown = edit_config(directory, tmp_path / "unknown", **changes)
    for target in (known, unknown):
        (target / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert type(load_pretrained(known)[0]).__name__ == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match=r"code of its own.*never runs"):
        load_pretrained(unknown)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "already quantised .bitsandbytes."),
        ({"quantization_config": {"quant_method": "lowrank"}}, "already compressed by lowrank"),
        ({"model_type": "no-such"}, "no model type 'no-such'"),
        ({"model_type": ["llama"]}, "no model type"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 1e\\+07 but the file holds"),
        ({"hidden_size": 10**12}, "hidden_size is 1e\\+12 but the largest dimension"),
        ({"hidden_size": "wide"}, "refuses the configuration|cannot load the weights"),
        ({"num_hidden_layers": 3}, "weights of LlamaForCausalLM are not in the file"),
        ({"intermediate_size": 16}, "cannot load the weights"),
    ],
)
def test_configurations_that_are_refused(
    directory: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    target = edit_config(directory, tmp_path / "m", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(target)
    assert "\n" not in str(caught.value)


def test_without_a_known_architecture_the_tensors_name_the_class(directory: Path, tmp_path: Path) -> None:
    target = edit_config(directory, tmp_path / "m", architectures=["Trainer"], model_type="llama")
    model, _ = load_pretrained(target)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert_same_state(make_causal_model(), model)


def test_pickled_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    target = edit_config(directory, tmp_path / "m")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load_pretrained(target)
    assert caught.value.exit_code == 3


def test_truncated_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    target = edit_config(directory, tmp_path / "m")
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained(target)


def test_a_directory_without_config_or_tokenizer(tmp_path: Path) -> None:
    assert not is_model_directory(tmp_path)
    with pytest.raises(CheckpointError, match="not a Hugging Face model directory"):
        load_pretrained(tmp_path)
    make_causal_model().save_pretrained(tmp_path / "m")
    assert load_pretrained(tmp_path / "m")[1] is None


def test_a_damaged_tokenizer_is_named(directory: Path, tmp_path: Path) -> None:
    target = edit_config(directory, tmp_path / "m")
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_tokenizer(target)


def test_samples_a_line_and_between_separators(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \n")
    assert read_text_samples(path) == ["one", "two"]
    path.write_text("a\nb\n<|endoftext|>\n\n<|endoftext|>\nc")
    assert read_text_samples(path) == ["a\nb", "c"]


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "holds no text"), (b"ok\n\xff\n", "byte 3 is not")])
def test_bad_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text_samples(tmp_path / "text")


def test_text_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path("/dev/null")):
        with pytest.raises(CalibrationError, match=path.name):
            read_text_samples(path)


def test_batches_are_sorted_padded_and_masked() -> None:
    batches = tokenize(make_tokenizer(), ["the cat sat on a mat", "the dog", "a dog ran"], batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (1, 7)]
    assert batches[0]["input_ids"][0].tolist() == [1, 4, 6, 3]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_without_a_padding_token_the_end_token_pads_and_without_both_lengths_are_not_mixed() -> None:
    tokenizer = make_tokenizer(pad=False)
    padded = tokenize(tokenizer, ["the dog", "a dog ran"])
    assert padded[0]["input_ids"][0].tolist() == [1, 4, 6, 2]
    tokenizer.eos_token = None  # type: ignore[attr-defined]
    batches = tokenize(tokenizer, ["the dog", "a dog ran", "a cat"])
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 4, 6], [1, 9, 5]], [[1, 9, 6, 11]]]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_padding_changes_nothing_that_is_kept() -> None:
    model, texts = make_causal_model(), ["the dog", "the cat sat on a mat"]
    (batch,) = tokenize(make_tokenizer(), texts, batch_size=2)
    alone = tokenize(make_tokenizer(), texts[:1])[0]
    with torch.no_grad():
        together = model(**batch).logits[0, :3]
        single = model(**alone).logits[0]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


def test_long_text_is_cut_to_what_the_model_takes() -> None:
    model, tokenizer = make_causal_model(), make_tokenizer()
    limit = token_limit(model, tokenizer)
    assert limit == 32
    assert tokenize(tokenizer, ["the cat " * 50], limit)[0]["input_ids"].shape == (1, 32)


def test_ids_outside_the_vocabulary_and_texts_without_tokens() -> None:
    number = WORDS.index("play") + 4
    with pytest.raises(CalibrationError, match=f"token id {number} is outside the model's vocabulary of 10"):
        tokenize(make_tokenizer(), ["the", "play"], vocabulary=10)
    with pytest.raises(CalibrationError, match="empty"):
        tokenize(make_tokenizer(), [])
    with pytest.raises(UsageError, match="at least 1"):
        tokenize(make_tokenizer(), ["the"], 0)


def test_text_helper_is_read_back(tmp_path: Path) -> None:
    assert len(read_text_samples(make_text(tmp_path / "t.txt", 12))) == 12


def test_a_directory_whose_name_is_not_utf8(directory: Path, tmp_path: Path) -> None:
    target = edit_config(directory, tmp_path / "mod\udcff")
    model, tokenizer = load_pretrained(target)
    assert torch.equal(model.lm_head.weight, make_causal_model().lm_head.weight)
    assert tokenizer is not None
    built = build_from_config(target)
    assert built.generation_config.eos_token_id == 2
