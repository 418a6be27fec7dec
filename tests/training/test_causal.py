"""Which models shift their labels themselves, as seen from their classes; and training them with checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.integrations.transformers import UNSHIFTED
from lowrank.training.losses import is_causal

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
SIDES = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
IDS = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(0))


def build(kind: str, **more: Any) -> Any:
    """A model of the class, of two layers at most."""
    torch.manual_seed(0)
    family = next(end for end in ("LMHeadModel", "For", "Decoder") if end in kind)
    config = getattr(transformers, kind[: kind.index(family)] + "Config")
    encoder_decoder = {"vocab_size": 50, "d_model": 16, **SIDES}
    neo = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}
    sizes: dict[str, Any] = {
        "LlamaForCausalLM": {**SMALL, **KEYS},
        "Qwen2ForCausalLM": {**SMALL, **KEYS},
        "GPT2LMHeadModel": GPT2,
        "OpenAIGPTLMHeadModel": GPT2,
        "GPTNeoForCausalLM": {"vocab_size": 50, "hidden_size": 16, **neo},
        "OPTForCausalLM": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
        "BloomForCausalLM": {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "XLNetLMHeadModel": {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        "T5ForConditionalGeneration": {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
        },
        "BartForCausalLM": encoder_decoder,
        "BartForConditionalGeneration": encoder_decoder,
    }.get(kind, SMALL)
    return getattr(transformers, kind)(config(**sizes, **more)).eval()


def losses(model: nn.Module) -> tuple[float, float, float]:
    """The model's own on labels equal to its inputs; and cross-entropy with and without a shift."""
    with torch.no_grad():
        found = model(input_ids=IDS, labels=IDS)
    flat = nn.functional.cross_entropy(found.logits.flatten(0, 1), IDS.flatten())
    shifted = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return float(found.loss), float(shifted), float(flat)


CAUSAL = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "GPTNeoForCausalLM",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "OpenAIGPTLMHeadModel",
]


@pytest.mark.parametrize("kind", CAUSAL)
def test_models_that_shift_their_labels_are_causal(kind: str) -> None:
    model = build(kind)
    own, shifted, flat = losses(model)
    assert own == pytest.approx(shifted, rel=1e-5) != pytest.approx(flat, rel=1e-3)
    assert is_causal(model)
    assert is_causal(lowrank.add_lora(model, lowrank.LoRAConfig(r=2)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["XLNetLMHeadModel", "BertForMaskedLM", "BartForCausalLM"])
def test_models_that_take_labels_as_they_are_are_not(kind: str) -> None:
    model = build(kind)
    own, _, flat = losses(model)
    assert own == pytest.approx(flat, rel=1e-5)
    assert not is_causal(model)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_encoder_with_a_decoder_is_not_causal(kind: str) -> None:
    assert not is_causal(build(kind))


def test_bert_with_a_head_is_causal_as_a_decoder_only() -> None:
    assert is_causal(build("BertLMHeadModel", is_decoder=True))
    assert not is_causal(build("BertLMHeadModel"))


def test_subclasses_and_wrappers_are_what_they_stand_for() -> None:
    class Mine(transformers.GPT2LMHeadModel):
        pass

    class MyLlama(transformers.LlamaForCausalLM):
        pass

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    class Judge(nn.Module):
        """Holds a language model, but is none."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    assert is_causal(Mine(transformers.GPT2Config(**GPT2)))
    assert is_causal(MyLlama(transformers.LlamaConfig(**SMALL)))
    for kind in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        assert is_causal(Wrapper(Wrapper(build(kind))))
    assert not is_causal(Wrapper(build("BartForCausalLM")))
    assert not is_causal(Wrapper(build("BertForMaskedLM")))
    assert not is_causal(Judge(build("GPT2LMHeadModel")))
    assert not is_causal(transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2)))


def test_the_list_of_models_that_do_not_shift_is_that_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    entries = [[entry] if isinstance(entry, str) else entry for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    names = {name for entry in entries for name in entry}
    own = set()
    for name in names:
        found = getattr(transformers, name)
        source = inspect.getsource(inspect.unwrap(found.forward))
        # All that shift leave their loss to transformers' common function; some have no loss, or labels of three dimensions.
        if "labels" in source and "self.loss_function(" not in source:
            own.add(name)
    assert own - UNSHIFTED <= {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}


def test_accuracy_of_gpt2_is_that_of_the_next_token() -> None:
    model = build("GPT2LMHeadModel")
    data = [{"input_ids": IDS, "labels": IDS}]
    with torch.no_grad():
        guesses = model(input_ids=IDS).logits.argmax(-1)
    expected = float((guesses[:, :-1] == IDS[:, 1:]).float().mean())
    settings = {"steps": 1, "lr": 1e-6, "metric": "accuracy", "progress": False}
    assert lowrank.finetune(model, data, data, **settings).evaluations[0]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_checkpointing_changes_no_number_where_there_is_padding(kind: str) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    batch = {"input_ids": IDS * mask, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}
    settings = {"steps": 3, "lr": 1e-2, "progress": False}
    runs = []
    for checkpointing, cache in ((False, True), (False, False), (True, True)):
        model = build(kind)
        model.config.use_cache = cache
        model = lowrank.add_lora(model, lowrank.LoRAConfig(r=2, init_lora_weights=False), seed=0)
        history = lowrank.finetune(model, [batch], gradient_checkpointing=checkpointing, **settings).history
        runs.append(torch.tensor([[row["loss"], row["gradient_norm"]] for row in history]))
        assert model.config.use_cache is cache
    # With a cache the keys lie otherwise in memory, which changes how sums are rounded.
    assert torch.equal(runs[1], runs[2])
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-3, atol=0.0)


def test_the_cache_is_on_again_after_an_error_and_stays_off_where_it_was() -> None:
    model = build("LlamaForCausalLM")

    def broken(output: Any, labels: Any) -> torch.Tensor:
        assert model.config.use_cache is False
        raise RuntimeError("mine")

    data = [({"input_ids": IDS}, IDS)]
    for before in (True, False):
        model.config.use_cache = before
        with pytest.raises(RuntimeError, match="mine"):
            lowrank.finetune(model, data, loss_fn=broken, steps=1, gradient_checkpointing=True, progress=False)
        assert model.config.use_cache is before
