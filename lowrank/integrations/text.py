"""Calibration text: samples out of a file, and batches of token ids out of samples, by a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CalibrationError, CheckpointError, ResourceError, UsageError
from lowrank.io import printable, read_bounded

__all__ = ["read_text_samples", "token_limit", "tokenize"]

SEPARATOR = "<|endoftext|>"
# Calibration needs thousands of lines, not gigabytes of them.
MAX_TEXT_BYTES = 1 << 30
# Longer texts are cut: attention over more costs much and teaches a layer's statistics little.
DEFAULT_MAX_TOKENS = 512


def read_text_samples(path: str | Path) -> list[str]:
    """Read calibration text: one sample a line, or, where the file has lines ``<|endoftext|>``, the text between them.

    Blank samples are left out; white space around a sample is removed.

    Raises:
        CalibrationError: not a regular UTF-8 file, or nothing in it.
        ResourceError: larger than 1 GiB.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.txt")
        ...     _ = path.write_text("one\\n\\ntwo\\n")
        ...     read_text_samples(path)
        ['one', 'two']
    """
    try:
        raw = read_bounded(path, MAX_TEXT_BYTES)
    except ResourceError:
        raise
    except CheckpointError as error:
        raise CalibrationError(str(error)) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{printable(path)}: text must be UTF-8; byte {error.start} is not") from error
    # Not splitlines: form feeds and Unicode separators stand inside real text.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if any(line.strip() == SEPARATOR for line in lines):
        samples: list[str] = []
        current: list[str] = []
        for line in [*lines, SEPARATOR]:
            if line.strip() == SEPARATOR:
                samples.append("\n".join(current))
                current = []
            else:
                current.append(line)
    else:
        samples = lines
    kept = [sample.strip() for sample in samples if sample.strip()]
    if not kept:
        raise CalibrationError(
            f"{printable(path)}: holds no text; give one sample a line, or samples between lines {SEPARATOR}"
        )
    return kept


def token_limit(model: nn.Module, tokenizer: Any, limit: int = DEFAULT_MAX_TOKENS) -> int:
    """Longest sample in tokens: the least of ``limit``, what the tokenizer says and the positions the model has.

    Example:
        >>> from types import SimpleNamespace
        >>> token_limit(nn.Linear(1, 1), SimpleNamespace(model_max_length=128))
        128
    """
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [limit, getattr(tokenizer, "model_max_length", None), *(getattr(config, name, None) for name in names)]
    return min(value for value in limits if isinstance(value, int) and value > 0)


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = DEFAULT_MAX_TOKENS,
    batch_size: int = 8,
    *,
    vocabulary: int | None = None,
) -> list[dict[str, Tensor]]:
    """Turn texts into batches, sorted by length so that little is padding, cut at ``max_length`` tokens.

    Where the tokenizer has no padding token its end token is used (the mask keeps it out of everything), and without
    that each batch holds texts of one length.

    Args:
        tokenizer: of transformers.
        texts: one sample each.
        max_length: tokens of a sample, at least 1.
        batch_size: samples of a batch, at least 1.
        vocabulary: number of ids the model knows, to check against.

    Returns:
        Dictionaries of (samples, positions) int64 tensors, to be passed to the model by keyword.

    Raises:
        CalibrationError: no text, a text without tokens, or an id outside the vocabulary.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> [batch["input_ids"].tolist() for batch in tokenize(tokenizer, ["a b a", "b a", "b b"])]
        [[[1, 0], [1, 1]], [[0, 1, 0]]]
    """
    if max_length < 1 or batch_size < 1:
        raise UsageError(f"max_length and batch_size: must be at least 1, got {max_length} and {batch_size}")
    if not texts:
        raise CalibrationError("texts: empty; at least one is needed")
    encoding = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)
    encoded: dict[str, list[list[int]]] = dict(encoding)
    ids = encoded["input_ids"]
    for number, row in enumerate(ids):
        if not row:
            shown = printable(texts[number][:40])
            raise CalibrationError(f"sample {number}: the tokenizer makes no token of {shown!r}; take it out")
        if vocabulary is not None and not 0 <= min(row) <= max(row) < vocabulary:
            bad = max(row) if max(row) >= vocabulary else min(row)
            raise CalibrationError(
                f"sample {number}: token id {bad} is outside the model's vocabulary of {vocabulary}; "
                "is it the model's own tokenizer?"
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    batches = []
    for group in _groups(order, [len(row) for row in ids], batch_size, mixed=pad is not None):
        width = max(len(ids[number]) for number in group)
        kept = [len(ids[number]) for number in group]
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in kept])
        batch = {"attention_mask": mask}
        for key, rows in encoded.items():
            fill = pad if key == "input_ids" and pad is not None else 0
            batch[key] = torch.tensor([rows[number] + [fill] * (width - len(ids[number])) for number in group])
        batches.append(batch)
    return batches


def _groups(order: Sequence[int], lengths: Sequence[int], size: int, *, mixed: bool) -> list[list[int]]:
    groups: list[list[int]] = []
    for number in order:
        last = groups[-1] if groups else None
        if last is not None and len(last) < size and (mixed or lengths[last[-1]] == lengths[number]):
            last.append(number)
        else:
            groups.append([number])
    return groups
