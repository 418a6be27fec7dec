"""Small Hugging Face directories made on the spot, for tests that need a real one."""

from __future__ import annotations

from pathlib import Path

import torch

_TEXT = "the cat dog sat on a mat ran in park big red ball she saw he was happy and then one day they went home to play"
WORDS = _TEXT.split()


def make_tokenizer(*, pad: bool = True) -> object:
    """A word tokenizer over WORDS with <s> first, </s>, <unk> and, if asked for, <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=32, **extra
    )


def make_causal_model(seed: int = 0, *, width: int = 32, tied: bool = False) -> torch.nn.Module:
    """A llama of two layers, about 30,000 parameters at width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config).eval()


def make_directory(path: Path, *, seed: int = 0, pad: bool = True, width: int = 32, tied: bool = False) -> Path:
    """Save model and tokenizer as a Hugging Face directory."""
    make_causal_model(seed, width=width, tied=tied).save_pretrained(path)
    make_tokenizer(pad=pad).save_pretrained(path)  # type: ignore[attr-defined]
    return path


def make_text(path: Path, samples: int = 64, seed: int = 0) -> Path:
    """A file of sentences over WORDS, one a line."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(samples):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        lines.append(" ".join(WORDS[pick] for pick in picks))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
