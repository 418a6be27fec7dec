"""A little GPT over characters, pretrained here on plays, and the texts that it is adapted to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from _shared.data import REPORTS, kept, text

CONTEXT = 128
PRETRAINING = 600
# Printable ASCII and the line end; anything else becomes a question mark.
LETTERS = "\n" + "".join(map(chr, range(32, 127)))


def gpt(vocabulary: int, layers: int = 4, width: int = 256) -> nn.Module:
    """Make an untrained GPT-2 of 3.2 million parameters at the default size, the same one each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
    )
    return GPT2LMHeadModel(config)


def ids_of(text: str) -> Tensor:
    """Write characters as numbers."""
    number = {letter: index for index, letter in enumerate(LETTERS)}
    return torch.tensor([number.get(letter, number["?"]) for letter in text])


def texts() -> dict[str, dict[str, Tensor]]:
    """Read for each task what is trained on, what chooses the best step, and what no step saw."""
    train = text("shakespeare/train.txt")
    cut = int(0.8 * len(train))
    wiki = text("wikitext2/valid.txt")
    first, second = int(0.8 * len(wiki)), int(0.9 * len(wiki))
    return {
        "pretraining": {"train": ids_of(train[:cut])},
        "shakespeare": {
            "train": ids_of(train[cut:]),
            "valid": ids_of(text("shakespeare/valid.txt")),
            "test": ids_of(text("shakespeare/test.txt")),
        },
        "wikitext2": {
            "train": ids_of(wiki[:first]),
            "valid": ids_of(wiki[first:second])[:60_000],
            "test": ids_of(wiki[second:])[:60_000],
        },
    }


def stretches(ids: Tensor, size: int, count: int | None = None, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make batches of stretches of the text: random ones where a count of batches is given, else all in a row."""
    if count is None:
        rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    else:
        starts = torch.randint(0, len(ids) - CONTEXT, (count * size,), generator=torch.Generator().manual_seed(seed))
        rows = torch.stack([ids[start : start + CONTEXT] for start in starts])
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return exp of the mean negative log-likelihood a character."""
    model.eval()
    total = count = 0.0
    for batch in stretches(ids, 32):
        rows = batch["labels"].shape[0] * (CONTEXT - 1)
        total += float(model(**batch).loss) * rows
        count += rows
    return math.exp(total / count)


def pretrained(data: Tensor) -> nn.Module:
    """Train the language model on 80 % of the plays; kept in ``reports/lora_ranks/.cache``."""

    def train(model: nn.Module) -> None:
        import lowrank

        batches = stretches(data, 32, PRETRAINING)
        lowrank.finetune(model, batches, steps=PRETRAINING, lr=1e-3, weight_decay=0.1, warmup=50, seed=0)

    return kept(gpt(len(LETTERS)), REPORTS / "lora_ranks" / ".cache" / f"gpt-{PRETRAINING}.safetensors", train)
