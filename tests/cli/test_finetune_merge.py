"""lowrank finetune and lowrank merge, as a new user would run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tiny_models import WORDS, make_causal_model, make_directory, make_text

import lowrank
from lowrank.cli.app import main


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same compressed, and texts."""
    room = tmp_path_factory.mktemp("cli-training")
    make_directory(room / "model", width=64)
    make_text(room / "texts.txt", 64)
    # Every word is followed by the next of the list: something to learn.
    lines = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in range(24)]
    (room / "order.txt").write_text("\n".join(lines * 2) + "\n")
    (room / "held-out.txt").write_text("\n".join(lines[:12]) + "\n")
    arguments = ["compress", str(room / "model"), "-o", str(room / "out"), "--size-budget", "40%", "-q"]
    assert main([*arguments, "--calibration", str(room / "texts.txt")]) == 0
    return room


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


def failure(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capfd.readouterr()
    code = main(arguments)
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return code, err.strip().removeprefix("lowrank: error: ")


def test_texts_train_an_adapter_that_merges_into_the_compressed_model(
    room: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = room / "adapter", room / "merged"
    arguments = ["finetune", str(room / "out"), "--data", str(room / "order.txt"), "-o", str(adapter), "-q"]
    arguments += ["--validation", str(room / "held-out.txt"), "--metric", "perplexity", "--rank", "4", "--lr", "0.02"]
    assert main([*arguments, "--epochs", "6", "--batch-size", "8", "--json"]) == 0
    history = json.loads(capfd.readouterr().out)
    assert history["best_value"] < 0.55 * history["evaluations"][0]["value"]
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.json",
        "state.json",
    ]
    adapted = lowrank.load_adapter(lowrank.load_model(room / "out"), adapter)
    plain = lowrank.load_model(room / "out")
    change = (logits(adapted) - logits(plain)).norm() / logits(plain).norm()
    assert change > 0.3
    assert main(["merge", str(room / "out"), str(adapter), "-o", str(merged), "--requantize", "-q"]) == 0
    assert "layers" in capfd.readouterr().out
    again = lowrank.load_model(merged)
    difference = (logits(again) - logits(adapted)).norm() / (logits(adapted) - logits(plain)).norm()
    assert difference < 0.25
    assert {type(module) for module in again.modules()} == {type(module) for module in plain.modules()}
    assert (merged / "tokenizer.json").is_file()


def test_a_dense_model_merges_into_a_directory_that_transformers_loads(
    room: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    adapter, merged = room / "dense-adapter", room / "dense-merged"
    arguments = ["finetune", str(room / "model"), "--data", str(room / "order.txt"), "-o", str(adapter), "-q"]
    assert main([*arguments, "--target-modules", "q_proj,v_proj", "--steps", "4", "--lr", "0.01"]) == 0
    assert "trainable params: " in capfd.readouterr().out
    assert main(["merge", str(room / "model"), str(adapter), "-o", str(merged), "-q"]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    adapted = lowrank.load_adapter(AutoModelForCausalLM.from_pretrained(room / "model"), adapter)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-5)


def test_healing_needs_no_labels(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["finetune", str(room / "out"), "--data", str(room / "texts.txt"), "-o", str(room / "healed"), "-q"]
    arguments += ["--heal-from", str(room / "model"), "--rank", "4", "--steps", "20", "--batch-size", "16", "--json"]
    assert main(arguments) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["what"], report["metric"], report["steps"]) == ("adapters", "kl", 20)
    assert report["error_after"] <= report["error_before"]
    assert (room / "healed" / "adapter_model.safetensors").is_file()


def test_arrays_with_labels_train_a_classifier(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(1, 30, (64, 6))
    labels = (ids[:, 0] > 15).astype(np.uint8)
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=labels)
    np.savez(tmp_path / "bare.npz", input_ids=ids)
    start = [
        "finetune",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "adapter"),
        "-q",
        "--batch-size",
        "16",
        "--rank",
        "2",
    ]
    options = ["--data", str(tmp_path / "data.npz"), "--validation", str(tmp_path / "data.npz"), "--metric", "accuracy"]
    assert main([*start, *options, "--lr", "0.02", "--epochs", "16", "--modules-to-save", "classifier", "--json"]) == 0
    history = json.loads(capfd.readouterr().out)
    assert history["trainable"] > 2 * 17
    assert history["best_value"] > max(history["evaluations"][0]["value"], 0.7)
    code, message = failure([*start, "--overwrite", "--data", str(tmp_path / "bare.npz")], capfd)
    assert (code, "holds no array named labels, only input_ids" in message) == (3, True)


def test_what_cannot_be_done_is_said_in_one_line(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, out = str(room / "order.txt"), str(room / "out")
    (room / "full").mkdir()
    (room / "full" / "mine.txt").write_text("mine")
    new = str(room / "new")
    cases = [
        (["finetune", out, "--data", text, "-o", str(room / "full")], 2, "exists and is not empty"),
        (["finetune", out, "--data", text, "-o", out, "--overwrite"], 2, "output"),
        (["finetune", out, "--data", text, "-o", str(room / "no" / "new")], 5, "parent directory does not exist"),
        (["finetune", out, "--data", text, "-o", new, "--rank", "0"], 3, "r: "),
        (["finetune", out, "--data", text, "-o", new, "--alpha", "nan"], 3, "lora_alpha"),
        (
            ["finetune", out, "--data", text, "-o", new, "--rank", "-1"],
            3,
            "r: must be an integer of at least 1, got -1",
        ),
        (["finetune", out, "--data", text, "-o", new, "--rank", "2.5"], 2, "'2.5' is not a valid integer"),
        (["finetune", out, "--data", text, "-o", new, "--rank", "1e400"], 2, "'1e400' is not a valid integer"),
        (["finetune", out, "--data", text, "-o", new, "--alpha", "-inf"], 3, "lora_alpha: must be a finite number"),
        (["finetune", out, "--data", text, "-o", new, "--dropout", "1"], 3, "lora_dropout: must be a number in [0, 1)"),
        (
            ["finetune", out, "--data", text, "-o", new, "--dropout", "-0.1"],
            3,
            "lora_dropout: must be a number in [0, 1)",
        ),
        (
            ["finetune", out, "--data", text, "-o", new, "--dropout", "nan"],
            3,
            "lora_dropout: must be a number in [0, 1)",
        ),
        (["finetune", out, "--data", text, "-o", new, "--target-modules", ""], 2, "names no module"),
        (["finetune", out, "--data", text, "-o", new, "--target-modules", "q_proj,v_prj"], 2, "did you mean v_proj"),
        (["finetune", out, "--data", text, "-o", new, "--target-modules", ".*q_prj"], 2, "did you mean q_proj"),
        (["finetune", out, "--data", text, "-o", new, "--modules-to-save", "lm_had"], 2, "did you mean lm_head"),
        (["finetune", out, "--data", text, "-o", new, "--target-modules", "q_prj"], 2, "q_proj"),
        (["finetune", out, "--data", text, "-o", new, "--steps", "1", "--epochs", "1"], 2, "give one of them"),
        (["finetune", out, "--data", text, "-o", new, "--steps", "0"], 2, "steps: must be an integer of at least 1"),
        (["finetune", out, "--data", text, "-o", new, "--lr", "0"], 2, "lr: must be a finite number above 0"),
        (
            ["finetune", out, "--data", text, "-o", new, "--heal-from", str(room / "model"), "--lr", "0"],
            2,
            "lr: must be",
        ),
        (["finetune", out, "--data", text, "-o", new, "--metric", "accuracy"], 2, "validation"),
        (["finetune", out, "--data", str(room / "none.txt"), "-o", new], 3, "no such file"),
        (
            ["finetune", out, "--data", text, "-o", new, "--heal-from", out, "--patience", "2"],
            2,
            "--patience: not with",
        ),
        (["merge", out, str(room / "model"), "-o", new], 3, "adapter_config.json: missing"),
        (["merge", out, str(room / "nowhere"), "-o", new], 3, "not a directory with an adapter"),
        (["merge", out, text, "-o", str(room / "full")], 2, "exists and is not empty"),
    ]
    for arguments, expected, part in cases:
        code, message = failure([*arguments, "-q"], capfd)
        assert (code, part in message) == (expected, True), (arguments, code, message)
        assert not Path(new).exists()
    assert (room / "full" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("heal", [False, True])
def test_the_history_is_plotted(heal: bool, room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture, adapter = room / f"losses-{heal}.png", room / f"plotted-{heal}"
    arguments = ["finetune", str(room / "out"), "--data", str(room / "order.txt"), "-o", str(adapter), "-q"]
    arguments += ["--rank", "2", "--steps", "2", "--plot", str(picture)]
    arguments += ["--heal-from", str(room / "model")] if heal else ["--validation", str(room / "held-out.txt")]
    assert main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, code, part in (("a.gif", 2, "a .png, .svg or .pdf file"), ("no/a.png", 5, "directory does not exist")):
        arguments[arguments.index("-o") + 1] = str(room / "unplotted")
        arguments[arguments.index("--plot") + 1] = str(room / name)
        found, message = failure(arguments, capfd)
        assert (found, part in message) == (code, True), message
    assert not (room / "unplotted").exists()


def test_labels_and_arrays_that_do_not_fit_are_refused_by_their_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    BertModel(config).save_pretrained(tmp_path / "encoder")
    ids = np.random.default_rng(0).integers(1, 30, (8, 6))
    none = np.zeros(8, dtype=np.int64)
    shape = (
        r"labels of shape (n{}) do not fit this BertModel, whose output is (n, 6, 16): they must be floating numbers"
    )
    cases = [
        ("classifier", ids, none + 2, "labels: must be classes from 0 to 1 (-100 is left out), got 2"),
        ("classifier", ids, none - 1, "labels: must be classes from 0 to 1 (-100 is left out), got -1"),
        ("classifier", ids + 30, none, "batch 0"),
        ("encoder", ids, none, shape.format("")),
        ("encoder", ids, np.zeros((8, 16), dtype=np.float32), shape.format(", 16")),
        ("encoder", ids, np.zeros(8, dtype=np.float32), "or use --heal-from, which needs none"),
    ]
    for model, inputs, labels, part in cases:
        np.savez(tmp_path / "data.npz", input_ids=inputs, labels=labels)
        arguments = ["finetune", str(tmp_path / model), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "a")]
        code, message = failure([*arguments, "--rank", "2", "--steps", "1", "-q"], capfd)
        assert (code, "data.npz" in message, part in message) == (3, True, True), message
    np.savez(tmp_path / "data.npz", input_ids=ids + 30)
    arguments = ["finetune", str(tmp_path / "encoder"), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "a")]
    code, message = failure([*arguments, "--heal-from", str(tmp_path / "encoder"), "--steps", "1", "-q"], capfd)
    assert (code, "data.npz: batch 0 holds token id" in message) == (3, True), message
    labels = np.random.default_rng(0).random((8, 6, 16))
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=labels)
    assert main([*arguments, "--steps", "1", "-q"]) == 0


def test_a_change_that_rounding_loses_is_said(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = lowrank.load_model(room / "out")
    codes = [
        name
        for name, module in out.named_modules()
        if isinstance(module, (lowrank.QuantizedLinear, lowrank.PackedLinear))
    ]
    small = lowrank.add_lora(out, lowrank.LoRAConfig(r=2, target_modules=codes[:1], init_lora_weights=False))
    with torch.no_grad():
        small.get_submodule(codes[0]).lora_B["default"].weight.mul_(1e-4)
    lowrank.save_adapter(small, room / "small")
    start = ["merge", str(room / "out"), str(room / "small"), "-o", str(room / "merged-small"), "--requantize", "-q"]
    assert main(start) == 0
    said = capfd.readouterr().out
    assert f"rounding took over half of the change from 1 layers (first {codes[0]})" in said
    assert "error: share of the change that was lost" in said


def test_merging_the_head_of_tied_embeddings_keeps_both_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    make_directory(tmp_path / "model", tied=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = lowrank.LoRAConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    adapted = lowrank.add_lora(base, config)
    lowrank.save_adapter(adapted, tmp_path / "adapter")
    start = ["merge", str(tmp_path / "model"), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "-q"]
    assert main(start) == 0
    assert "added to the weight" in capfd.readouterr().out
    document = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert document["tie_word_embeddings"] is False
    assert "_name_or_path" not in document
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_labels_of_a_causal_model_are_shifted_by_the_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_directory(tmp_path / "model")
    ids = np.random.default_rng(0).integers(4, 20, (8, 6))
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=ids)
    arguments = ["finetune", str(tmp_path / "model"), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "a")]
    assert main([*arguments, "--steps", "1", "--batch-size", "8", "-q", "--json"]) == 0
    history = json.loads(capfd.readouterr().out)["history"]
    with torch.no_grad():
        model = make_causal_model()
        rows = torch.from_numpy(ids)
        expected = float(model(input_ids=rows, labels=rows).loss)
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_seed_is_that_of_the_adapters_start_too(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stored = []
    for name, seed in (("one", "5"), ("again", "5"), ("other", "6")):
        arguments = ["finetune", str(room / "out"), "--data", str(room / "order.txt"), "-o", str(room / name), "-q"]
        torch.rand(3)  # what the process has drawn before does not matter
        assert main([*arguments, "--rank", "2", "--steps", "1", "--seed", seed]) == 0
        stored.append((room / name / "adapter_model.safetensors").read_bytes())
    assert stored[0] == stored[1] != stored[2]


def test_a_rank_that_would_take_all_memory_is_bad_input(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["finetune", str(room / "out"), "--data", str(room / "order.txt"), "-o", str(room / "huge"), "-q"]
    code, message = failure([*arguments, "--rank", "1000000000000", "--steps", "1"], capfd)
    assert code == 3 and message.startswith("r: layer ") and "between 1 and " in message
    assert "got 1,000,000,000,000" in message
    assert not (room / "huge").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "end"), [("bart", "lm_head"), ("bert", "cls.predictions.decoder"), ("gpt2", "wte"), ("switch", "lm_head")]
)
def test_what_else_was_tied_is_not_lost_where_a_merge_unties_a_pair(kind: str, end: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sides = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    base: Any = {
        "bart": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(d_model=16, decoder_start_token_id=2, forced_eos_token_id=2, **sides, **sizes)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **sizes
            )
        ),
        # Scales the inputs of its head where the configuration says tied.
        "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_decoder_layers=1,
                num_sparse_encoder_layers=0,
                num_sparse_decoder_layers=0,
                num_heads=2,
                num_experts=2,
                decoder_start_token_id=0,
                **sizes,
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **sizes)
        ),
    }[kind]()
    with torch.no_grad():
        # Biases start at zero, which is also what a lost one would be.
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    adapted = lowrank.add_lora(base.eval(), lowrank.LoRAConfig(r=2, target_modules=[end], init_lora_weights=False))

    def outputs(model: Any) -> torch.Tensor:
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            return model(input_ids=ids, **({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})).logits

    base.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted, tmp_path / "adapter")
    expected = outputs(adapted)
    merged = lowrank.unload_lora(lowrank.merge_lora(adapted))
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(type(base).from_pretrained(tmp_path / "merged").eval()), outputs(merged))
    start = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "shell"), "-q"]
    assert main(start) == 0
    again = type(base).from_pretrained(tmp_path / "shell").eval()
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_into_one_end_of_a_tied_pair_is_told_to_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).eval()
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    merged = lowrank.unload_lora(lowrank.merge_lora(model))
    assert merged.config.tie_word_embeddings is False and base.config.tie_word_embeddings is True
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged)) and not torch.equal(logits(again), logits(base))
    # An adapter elsewhere leaves the pair, and what the configuration says of it.
    other = lowrank.add_lora(base, lowrank.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert lowrank.unload_lora(lowrank.merge_lora(other)).config.tie_word_embeddings is True
