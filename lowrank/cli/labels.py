"""What ``lowrank finetune`` trains on: batches with labels, or without them, out of the files that were named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank import training
from lowrank.calibration.batches import evaluating
from lowrank.calibration.outputs import model_tensor
from lowrank.calibration.preparing import prepare_batches
from lowrank.cli import data as cli_data
from lowrank.cli.models import model_batches
from lowrank.cli.shell import note
from lowrank.errors import CalibrationError
from lowrank.io import printable
from lowrank.training.data import IGNORED, read_example, read_examples
from lowrank.training.losses import is_causal, require_counting

__all__ = ["labelled", "unlabelled"]


def unlabelled(
    data: cli_data.Data, path: Path | None, model: nn.Module, source: Path, max_tokens: int, batch_size: int
) -> list[Any]:
    """Batches without labels; what the model refuses is said by the name of the file."""
    if isinstance(data, dict):
        data = {name: array for name, array in data.items() if name != "labels"}
    batches = model_batches(data, path, model, source, max_tokens, batch_size) or []
    prepare_batches(model, batches, printable(path))
    return batches


def labelled(
    data: cli_data.Data,
    path: Path | None,
    model: nn.Module,
    source: Path,
    max_tokens: int,
    batch_size: int,
    quiet: bool,
) -> list[Any]:
    """Batches with labels: a text's own tokens, or the array of that name."""
    where = printable(path)
    if isinstance(data, list):
        if not is_causal(model):
            raise CalibrationError(
                f"{where}: texts train causal language models that shift their labels themselves, and this is a "
                f"{type(model).__name__}; give an .npz file with labels, or --heal-from ORIGINAL"
            )
        texts = model_batches(data, path, model, source, max_tokens, batch_size) or []
        return training.language_model_batches(_long_enough(texts, where, quiet))
    if "labels" not in data:
        raise CalibrationError(
            f"{where}: holds no array named labels, only {', '.join(map(printable, data))}; add one, or use --heal-from"
        )
    inputs = {name: array for name, array in data.items() if name != "labels"}
    if not inputs:
        raise CalibrationError(f"{where}: holds labels alone; add arrays named like the model's inputs")
    batches = model_batches(inputs, path, model, source, max_tokens, batch_size) or []
    prepare_batches(model, batches, where)
    parts = data["labels"].split(batch_size)
    labels = [part if part.is_floating_point() else part.long() for part in parts]
    if is_causal(model) and "input_ids" in inputs and data["labels"].shape == inputs["input_ids"].shape:
        # Such a model is to predict the next token: it shifts its labels itself.
        found = [{**batch, "labels": part} for batch, part in zip(batches, labels, strict=True)]
        require_counting(model, read_examples(found, where, own_loss=True), where)
        return found
    pairs = list(zip(batches, labels, strict=True))
    _check_labels(model, pairs, where)
    require_counting(model, read_examples(pairs, where, own_loss=True), where)
    return pairs


def _long_enough(batches: list[dict[str, Tensor]], where: str, quiet: bool) -> list[dict[str, Tensor]]:
    """Without the texts of one token, after which there is none to predict."""
    lengths = [batch["attention_mask"].sum(dim=1) for batch in batches]
    total, short = sum(len(found) for found in lengths), sum(int((found < 2).sum()) for found in lengths)
    if short == total:
        raise CalibrationError(
            f"{where}: none of its {total} texts has two tokens, and what is learnt is to predict the next one; give longer "
            "texts (--max-tokens cuts them)"
        )
    if short and not quiet:
        note(f"{where}: {short} of {total} texts left out: of one token, after which there is none to predict")
    kept = [
        {name: rows[found > 1] for name, rows in batch.items()} for batch, found in zip(batches, lengths, strict=True)
    ]
    return [batch for batch in kept if len(batch["input_ids"])]


def _check_labels(model: nn.Module, pairs: list[tuple[Any, Tensor]], where: str) -> None:
    """Refuse labels that do not fit the output, before an hour of training and by the name of their file."""
    example = read_example(pairs[0], where, own_loss=True)
    with evaluating(model):
        output = model_tensor(example.batch.run(model))
    labels = pairs[0][1]
    wanted = output.shape if labels.is_floating_point() else output.shape[:-1]
    if labels.shape != wanted:
        shapes = [("n", *shape[1:]) for shape in (labels.shape, output.shape, output.shape[:-1])]
        given, floats, classes = (f"({', '.join(map(str, shape))})" for shape in shapes)
        raise CalibrationError(
            f"{where}: labels of shape {given} do not fit this {type(model).__name__}, whose output is {floats}: they must be "
            f"floating numbers of that shape, or whole ones, the classes, of shape {classes}; or use --heal-from, which needs none"
        )
    if labels.is_floating_point():
        return
    last = output.shape[-1] - 1
    for _, part in pairs:
        outside = part[(part != IGNORED) & ((part < 0) | (part > last))]
        if outside.numel():
            raise CalibrationError(
                f"{where}: labels: must be classes from 0 to {last} ({IGNORED} is left out), got {int(outside[0])}"
            )
