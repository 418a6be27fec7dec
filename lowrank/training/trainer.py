"""One optimiser step and one evaluation: the arithmetic of training, alone or among several processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import evaluating
from lowrank.errors import NumericsError
from lowrank.integrations.accelerate import Processes
from lowrank.training.data import Example, derived_seed
from lowrank.training.history import Row
from lowrank.training.losses import LossFn, item_count, metric_value, run_example
from lowrank.training.optimizer import build_optimizer, has_trainable, trainable_named
from lowrank.training.options import TrainingOptions, learning_rate_factor

__all__ = ["Trainer"]

_NO_GRADIENT = (
    "finetune: no trainable parameter got a gradient from the loss; does the loss depend on the model's output, and the "
    "output on them? Adapters that are merged do not train: lowrank.unmerge_lora(model) first"
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """The optimiser and how a step is computed; what is done when is the loop's business.

    Args:
        model: with trainable parameters.
        options: of the run.
        loss_fn: of an output and labels; ``None`` for the default of :func:`lowrank.training.losses.run_example`.
        total: steps of the whole run.
        processes: that share each batch, sample by sample.
    """

    def __init__(
        self, model: nn.Module, options: TrainingOptions, loss_fn: LossFn | None, total: int, processes: Processes
    ) -> None:
        self.model = model
        self.options = options
        self.loss_fn = loss_fn
        self.total = total
        self.processes = processes
        self.parameters = trainable_named(model)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = build_optimizer(model, options)
        # Only float16 has so few exponents that small gradients vanish.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.mixed_precision == "fp16")

    def step(self, step: int, group: Sequence[Example]) -> Row:
        """Take step ``step`` (from 0) on a group of batches: the mean over all their items.

        Without an item that counts, and where float16 overflows at the present loss scale, nothing is updated; the row
        says ``skipped``.

        Raises:
            NumericsError: a loss or gradient that is NaN or infinite; nothing has changed then.
        """
        factor = learning_rate_factor(step, self.total, self.options.warmup_steps(self.total), self.options.schedule)
        for settings in self.optimizer.param_groups:
            settings["lr"] = settings["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        shares = [example.share(self.processes.rank, self.processes.count) for example in group]
        weights = self._weights(shares)
        row: Row = {"loss": None, "learning_rate": self.options.lr * factor, "gradient_norm": None}
        if weights is None:
            return row | {"skipped": True}
        loss = torch.zeros((), dtype=torch.float64)
        for number, (example, weight) in enumerate(zip(shares, weights, strict=True)):
            if example is not None and weight:
                torch.manual_seed(derived_seed(self.options.seed, 2, step, number, self.processes.rank))
                loss += self._backward(example.to(self.device), weight)
        loss = self.processes.total(loss)
        if not math.isfinite(float(loss)):
            raise NumericsError(
                f"finetune: the loss is {float(loss)} at step {step + 1}; lower lr (now {self.options.lr:g}), warm up, "
                "or look for bad values in that batch"
            )
        norm = self._update(step)
        row |= {"loss": float(loss), "gradient_norm": norm}
        return row | {"skipped": True} if norm is None else row

    def _weights(self, shares: Sequence[Example | None]) -> list[float] | None:
        """Each batch's share of the items of the step, over all processes; ``None`` where there is no item."""
        counts = [0 if example is None else item_count(self.model, example) for example in shares]
        total = self.processes.total(torch.tensor(float(sum(counts)), dtype=torch.float64))
        return [count / float(total) for count in counts] if float(total) else None

    def _backward(self, example: Example, weight: float) -> float:
        with self._autocast():
            outcome = run_example(self.model, example, self.loss_fn)
        if not outcome.loss.requires_grad:
            raise NumericsError(_NO_GRADIENT)
        loss = outcome.loss * weight
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def _update(self, step: int) -> float | None:
        """Norm of the gradient before clipping; ``None`` where the scaler leaves the step out and lowers its scale."""
        parameters = list(self.parameters.values())
        if self.processes.count > 1:
            _sum_gradients(parameters, self.processes)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            raise NumericsError(_NO_GRADIENT)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)) and not self.scaler.is_enabled():
            raise NumericsError(
                f"finetune: a gradient is {float(norm)} at step {step + 1}, though the loss is finite; lower lr, or train in float32"
            )
        if self.options.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.options.max_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(norm) if bool(torch.isfinite(norm)) else None

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Measure the metric of the options: over the validation batches, or of the model where it is a callable.

        Raises:
            NumericsError: it is NaN or infinite.
            UsageError: a callable that returns no number.
        """
        metric = self.options.metric
        if callable(metric):
            with evaluating(self.model):
                value = metric_value(metric, self.model)
        else:
            sums = torch.zeros(3, dtype=torch.float64)
            with evaluating(self.model), self._autocast():
                for example in examples:
                    mine = example.share(self.processes.rank, self.processes.count)
                    if mine is not None:
                        sums += self._judged(mine.to(self.device), count_right=metric == "accuracy")
            loss, items, right = self.processes.total(sums).tolist()
            mean = loss / max(items, 1.0)
            value = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / max(items, 1.0)}[
                metric
            ]
        if not math.isfinite(value):
            raise NumericsError(
                f"finetune: the validation {self.options.metric_name} is {value}; nothing can be compared with it"
            )
        return value

    def _judged(self, example: Example, *, count_right: bool) -> Tensor:
        outcome = run_example(self.model, example, self.loss_fn, count_right=count_right)
        loss = float(outcome.loss) * outcome.items if outcome.items else 0.0
        return torch.tensor([loss, outcome.items, outcome.right or 0], dtype=torch.float64)

    def training_mode(self) -> None:
        """Switch dropout on; running statistics of norms whose own parameters are frozen stay as they are."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and not has_trainable(module):
                module.eval()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.mixed_precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.options.mixed_precision])


def _sum_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Add up every process's gradients, a dtype at a time in one message."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        members = [parameter for parameter in parameters if parameter.dtype is dtype]
        # Which parameters have a gradient may differ where a process had no sample; a zero says nothing.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
        summed = processes.total(flat)
        pieces = summed.split([parameter.numel() for parameter in members])
        for parameter, piece in zip(members, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
