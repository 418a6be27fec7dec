"""The loss of one batch, how many items it is a mean of, how many of them were right, and data that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.calibration.outputs import model_tensor
from lowrank.errors import CalibrationError, UsageError
from lowrank.integrations.transformers import shifts_labels
from lowrank.training.data import IGNORED, Example

__all__ = [
    "LossFn",
    "Outcome",
    "check_validation",
    "is_causal",
    "item_count",
    "metric_value",
    "require_counting",
    "run_example",
]

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Of one batch: the mean loss over ``items``, and where the labels are classes how many were right."""

    loss: Tensor
    items: int
    right: int | None


def run_example(model: nn.Module, example: Example, loss_fn: LossFn | None, *, count_right: bool = False) -> Outcome:
    """Run the model on a batch and judge its output.

    Without a ``loss_fn``: the ``loss`` that the model computes from the labels it was passed; else cross-entropy for
    integer labels and mean squared error for floating ones, against ``logits`` or the first tensor of the output.

    Raises:
        UsageError: the loss is no scalar, or labels and output do not fit.
        CalibrationError: the model did not compute a loss.
    """
    output = example.batch.run(model)
    if loss_fn is not None:
        loss = loss_fn(output, example.labels)
    elif example.own_loss:
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(found, Tensor):
            raise CalibrationError(
                f"{type(model).__name__}: was passed labels but returned no loss; give pairs (inputs, labels) or a loss_fn"
            )
        loss = found
    else:
        loss = _default_loss(model_tensor(output), example.labels)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"loss_fn: must return a tensor with one value, got {shape}; take the mean")
    right = _right(model, output, example) if count_right else None
    return Outcome(loss.reshape(()), item_count(model, example), right)


def item_count(model: nn.Module, example: Example) -> int:
    """Count what the loss is a mean over: label entries that count, for a causal model without the first of each row; else
    samples.

    Example:
        >>> item_count(nn.Linear(1, 1), Example(labels=torch.tensor([3, -100, 1]), batch=None))
        2
    """
    labels = example.labels
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim:
        return int((_shifted(model, example) != IGNORED).sum())
    return example.batch.size


def _shifted(model: nn.Module, example: Example) -> Tensor:
    labels: Tensor = example.labels
    causal = example.own_loss and labels.ndim == 2 and is_causal(model)
    return labels[:, 1:] if causal else labels


def is_causal(model: nn.Module) -> bool:
    """Say whether the model predicts the next token and shifts its labels itself."""
    return shifts_labels(model)


def require_counting(model: nn.Module, examples: Iterable[Example], name: str) -> None:
    """Refuse data of which no label counts; what is read is no more than up to the first that does.

    Raises:
        CalibrationError: none does.

    Example:
        >>> require_counting(nn.Linear(1, 1), [Example(labels=torch.tensor([-100]), batch=None)], "train")
        Traceback (most recent call last):
            ...
        lowrank.errors.CalibrationError: train: batch 0: none of its 1 labels counts (-100 is left out); give labels that do
    """
    blank: list[Example] = []
    for example in examples:
        if item_count(model, example):
            return
        blank.append(example)
    labels = blank[0].labels
    number = labels.numel() if isinstance(labels, Tensor) else blank[0].batch.size
    shifted = isinstance(labels, Tensor) and _shifted(model, blank[0]).shape != labels.shape
    first = ", and so is the first token of a row, which a causal model does not predict" if shifted else ""
    others = ", nor does one of any other batch" if len(blank) > 1 else ""
    raise CalibrationError(
        f"{name}: batch 0: none of its {number} labels counts ({IGNORED} is left out{first}){others}; give labels that do"
    )


def check_validation(model: nn.Module, checks: Sequence[Example], metric: str, *, own_loss: bool) -> None:
    """Refuse validation data that the metric cannot be measured on.

    Raises:
        UsageError: a perplexity of labels that are no classes.
        CalibrationError: no label counts.
    """
    if metric == "perplexity" and own_loss:
        for example in checks:
            if isinstance(example.labels, Tensor) and example.labels.is_floating_point():
                raise UsageError("metric 'perplexity': needs labels that are classes; use metric='loss', or a callable")
    require_counting(model, checks, "validation")


def metric_value(metric: Callable[[nn.Module], Any], model: nn.Module) -> float:
    """Ask a metric of the caller's own what it says of a model.

    Raises:
        UsageError: no number.

    Example:
        >>> metric_value(lambda model: torch.tensor(0.5), nn.Linear(1, 1))
        0.5
    """
    found = metric(model)
    try:
        # float() would read text, too.
        if not isinstance(found, (str, bytes)):
            return float(found)
    except (TypeError, ValueError, RuntimeError):
        pass
    name, shown = getattr(metric, "__name__", type(metric).__name__), repr(found)[:60]
    raise UsageError(f"metric {name}: must return a number, got {shown} of type {type(found).__name__}")


def _default_loss(output: Tensor, labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise UsageError(f"labels: must be a tensor, got {type(labels).__name__}; give a loss_fn for anything else")
    if labels.is_floating_point():
        if labels.shape != output.shape:
            raise UsageError(f"labels: of shape {tuple(labels.shape)} for an output of shape {tuple(output.shape)}")
        return F.mse_loss(output, labels)
    if output.ndim == labels.ndim + 1 and output.shape[:-1] == labels.shape:
        return F.cross_entropy(output.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORED)
    raise UsageError(
        f"labels: classes of shape {tuple(labels.shape)} need an output of shape {(*labels.shape, 'classes')}, "
        f"got {tuple(output.shape)}; give a loss_fn"
    )


def _right(model: nn.Module, output: Any, example: Example) -> int:
    logits, labels = model_tensor(output), example.labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise UsageError("metric 'accuracy': needs labels that are classes; use metric='loss', or a callable")
    guesses = logits.argmax(dim=-1)
    targets = _shifted(model, example)
    if targets.shape != labels.shape:
        guesses = guesses[:, :-1]
    return int(torch.where(targets == IGNORED, False, guesses == targets).sum())
