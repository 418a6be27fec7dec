"""``finetune``: train what is trainable, keep the best of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank import lora
from lowrank.calibration.batches import ForwardFn
from lowrank.calibration.untouched import restore_modes
from lowrank.errors import CalibrationError, UsageError
from lowrank.integrations.accelerate import processes
from lowrank.io import lock_destination
from lowrank.lora.adapters import lora_layers, saved_modules
from lowrank.lora.files import reread_adapter
from lowrank.training.blocks import checkpointed
from lowrank.training.data import (
    Example,
    TrainingData,
    derived_seed,
    examples_fingerprint,
    read_examples,
    seeded_numbers,
)
from lowrank.training.history import TrainingResult
from lowrank.training.losses import LossFn, check_validation, require_counting
from lowrank.training.optimizer import changing_tensors, optimizer_tensors, restore_optimizer, trainable_named
from lowrank.training.options import TrainingOptions
from lowrank.training.run_directory import HISTORY_NAME, RunDirectory, model_fingerprint
from lowrank.training.trainer import Trainer

__all__ = ["finetune"]


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    warmup: int | float = 0,
    schedule: str = "cosine",
    max_grad_norm: float | None = 1.0,
    gradient_accumulation: int = 1,
    mixed_precision: str | None = None,
    lora_plus_ratio: float | None = None,
    gradient_checkpointing: bool = False,
    patience: int | None = None,
    evaluate_every: int | None = None,
    metric: str | Callable[[nn.Module], float] = "loss",
    higher_is_better: bool = False,
    forward_fn: ForwardFn | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train the model's trainable parameters (an adapter's, after :func:`lowrank.add_lora`) with AdamW, in place.

    The model is evaluated before the first step, at the end of every epoch (or every ``evaluate_every`` steps) and at
    the end; at the end of the run it holds the best tensors seen. The same input, seed and thread count give the same
    bytes, also where a run was interrupted and resumed; the caller's random numbers are left as they were.

    Under ``torchrun`` the processes share every batch sample by sample: the result is that of one process to rounding.

    Args:
        model: with trainable parameters.
        train: batches: (inputs, labels), or a dict with ``labels`` for a model that computes its own loss. Inputs are a
            tensor, a tuple of positional arguments or a dict. A sequence is shuffled every epoch; a ``DataLoader``
            shuffles itself, with the epoch's random numbers.
        validation: batches of the same kind.
        loss_fn: ``loss_fn(output, labels)`` to a scalar, a mean over samples. Default: the model's own loss, else
            cross-entropy for integer labels (−100 is left out), mean squared error for floating ones. A step without a
            label that counts updates nothing.
        epochs, steps: exactly one of them; a step is one update.
        lr: peak learning rate.
        weight_decay: of matrices; biases and norms have none.
        warmup: steps (int) or share of the steps (float) over which the learning rate rises.
        schedule: "cosine", "linear" or "constant" after it.
        max_grad_norm: clip the gradient to this norm; ``None`` for not at all.
        gradient_accumulation: batches a step.
        mixed_precision: "bf16" or "fp16" (with loss scaling) autocast.
        lora_plus_ratio: learning rate of ``lora_B`` over that of the rest (LoRA+).
        gradient_checkpointing: recompute the activations of repeated blocks in the backward pass.
        patience: evaluations in a row without a better value before the run stops.
        evaluate_every: steps; by default once an epoch.
        metric: "loss", "accuracy", "perplexity", or a callable(model) -> float, which needs no validation data.
        higher_is_better: for a callable.
        forward_fn: ``forward_fn(model, inputs) -> output`` calls a model that takes objects; of a pair (inputs, labels) the inputs.
        output_dir: where the run's state is kept at every evaluation and, in the end, the best adapter alone with
            ``history.json``. What one active adapter does not hold (several of them, further parameters, a model without
            adapters) is in ``trained.safetensors``, all trained tensors by name.
        resume: go on from the state in ``output_dir``, if there is one.
        overwrite: replace what is in ``output_dir``.
        seed: of the order of the data and of dropout.
        progress: a bar with the loss on standard error.

    Returns:
        History, best step and value.

    Raises:
        UsageError: an option that means nothing, or a model without trainable parameters.
        CalibrationError: data that cannot be used.
        NumericsError: a loss that is NaN or infinite; the step is named, and the model holds its best tensors so far.
        CheckpointError: ``resume`` from the state of another run.
        StorageError: ``output_dir`` cannot be written, or another run is writing to it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
        >>> result = finetune(model, data, data, epochs=3, lr=0.1, progress=False)
        >>> len(result.history), result.best_value < result.evaluations[0]["value"]
        (12, True)
    """
    options = TrainingOptions(
        epochs=epochs,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
        gradient_accumulation=gradient_accumulation,
        mixed_precision=mixed_precision,
        lora_plus_ratio=lora_plus_ratio,
        gradient_checkpointing=gradient_checkpointing,
        patience=patience,
        evaluate_every=evaluate_every,
        metric=metric,
        higher_is_better=higher_is_better,
        seed=seed,
    )
    if not callable(metric) and validation is None and (patience or evaluate_every or metric != "loss"):
        raise UsageError("validation: patience, evaluate_every and a metric need validation data")
    parameters = trainable_named(model)
    own_loss = loss_fn is None
    # A DataLoader draws random numbers when it is read.
    with seeded_numbers(derived_seed(seed, 5)):
        checks = (
            None
            if validation is None
            else read_examples(validation, "validation", own_loss=own_loss, forward_fn=forward_fn)
        )
    if checks is not None and not callable(metric):
        check_validation(model, checks, metric, own_loss=own_loss)
    data = TrainingData(train, seed, own_loss=own_loss, forward_fn=forward_fn)
    require_counting(model, data.look_through(), "train")
    device = next(iter(parameters.values())).device
    team = processes(device)
    directory = None
    if output_dir is not None:
        facts = {
            "model": model_fingerprint(model, changing_tensors(model)),
            "adapters": _adapter_facts(model),
            "data": data.fingerprint(),
            "validation": None if checks is None else examples_fingerprint(checks),
            **options.to_json(),
        }
        directory = RunDirectory(Path(output_dir), facts, resume=resume, overwrite=overwrite)
    elif resume or overwrite:
        raise UsageError("output_dir: resume and overwrite need one")
    total = options.total_steps(-(-len(data) // gradient_accumulation))
    run = _Run(Trainer(model, options, loss_fn, total, team), data, checks, directory, progress)
    if directory is not None and directory.finished:
        return run.reread()
    started = time.perf_counter()
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        if directory is not None and team.first:
            stack.enter_context(lock_destination(directory.directory))
            directory.start()
        with torch.random.fork_rng(devices=devices), _modes_kept(model):
            if gradient_checkpointing:
                stack.enter_context(checkpointed(model))
            with _refusals_explained(loss_fn is None and not callable(metric)):
                run.train()
        run.finish()
    run.result.run = {"seconds": time.perf_counter() - started}
    return run.result


class _Run:
    """The loop, its best tensors so far, and how both go to disk and come back."""

    def __init__(
        self,
        trainer: Trainer,
        data: TrainingData,
        checks: list[Example] | None,
        directory: RunDirectory | None,
        progress: bool,
    ) -> None:
        self.trainer, self.data, self.checks, self.directory = trainer, data, checks, directory
        self.model, self.options, self.team, self.total = (
            trainer.model,
            trainer.options,
            trainer.processes,
            trainer.total,
        )
        self.progress = progress and self.team.first
        self.per_epoch = -(-len(data) // self.options.gradient_accumulation)
        self.judged = callable(self.options.metric) or checks is not None
        self.tensors = changing_tensors(self.model)
        self.best = _copies(self.tensors)
        self.stale = 0
        counts = lora.trainable_parameters(self.model)
        self.result = TrainingResult(metric=self.options.metric_name, trainable=counts[0], total=counts[1])

    def train(self) -> None:
        """Run all steps that are left, and put the best tensors back in the model, whatever happens."""
        first = self._restore()
        try:
            if first == 0 and self.judged:
                self._evaluate(0)
            self._steps(first)
        finally:
            if self.judged or self.result.steps < self.total:
                _put(self.tensors, self.best)

    def _steps(self, first: int) -> None:
        result, every = self.result, self.options.evaluate_every
        bar = tqdm(
            range(first, self.total), initial=first, total=self.total, desc="finetune", disable=not self.progress
        )
        for step in bar:
            if result.stopped_early:
                break
            epoch, index = divmod(step, self.per_epoch)
            self.trainer.training_mode()
            group = self.data.group(epoch, index, self.options.gradient_accumulation)
            row = self.trainer.step(step, group)
            result.steps = step + 1
            result.history.append({"step": step + 1, "epoch": (step + 1) / self.per_epoch, **row})
            bar.set_postfix(loss="-" if row["loss"] is None else f"{row['loss']:.4g}", refresh=False)
            last = step + 1 == self.total
            if last or (step + 1) % (every or self.per_epoch) == 0:
                if self.judged:
                    self._evaluate(step + 1)
                else:
                    result.best_step = step + 1
                if not last and not result.stopped_early:
                    self._save_state()

    def _evaluate(self, step: int) -> None:
        value, result = self.trainer.evaluate(self.checks or ()), self.result
        result.evaluations.append({"step": step, "value": value})
        best = result.best_value
        if best is None or (value > best if self.options.maximise else value < best):
            result.best_step, result.best_value, self.stale = step, value, 0
            self.best = _copies(self.tensors)
        else:
            self.stale += 1
            result.stopped_early = self.options.patience is not None and self.stale >= self.options.patience

    def _save_state(self) -> None:
        if self.directory is None:
            return
        if self.team.first:
            tensors = {f"current/{name}": tensor for name, tensor in self.tensors.items()}
            tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
            moments = optimizer_tensors(self.model, self.trainer.optimizer)
            tensors |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
            progress = {
                "result": self.result.to_json(),
                "stale": self.stale,
                "scaler": self.trainer.scaler.state_dict(),
            }
            self.directory.save_state(progress, tensors)
        self.team.wait()

    def _restore(self) -> int:
        """Go on from the state that was found; the number of steps already done."""
        if self.directory is None or self.directory.found is None:
            return 0
        progress, stored = self.directory.found["progress"], self.directory.tensors()
        parts: dict[str, dict[str, Tensor]] = {"current": {}, "best": {}, "optimizer": {}}
        for name, tensor in stored.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        _put(self.tensors, parts["current"])
        self.best = {name: tensor.to(self.tensors[name].device) for name, tensor in parts["best"].items()}
        restore_optimizer(self.model, self.trainer.optimizer, parts["optimizer"])
        if progress["scaler"]:
            self.trainer.scaler.load_state_dict(progress["scaler"])
        self.result = TrainingResult.from_json(progress["result"], "training state")
        self.stale = progress["stale"]
        return self.result.steps

    def finish(self) -> None:
        """Write the outcome to the directory."""
        if self.directory is None:
            return
        if self.team.first:
            with tempfile.TemporaryDirectory() as folder:
                adapter, held = _adapter_files(self.model, Path(folder, "adapter"))
                tensors = {} if all(id(tensor) in held for tensor in self.tensors.values()) else self.tensors
                self.directory.save_outcome(self.result.to_json(), tensors, adapter)
        self.team.wait()
        self.result.directory = self.directory.directory

    def reread(self) -> TrainingResult:
        """Read the outcome of a run that has come to its end before."""
        assert self.directory is not None
        file = self.directory.adapter_file
        if file is not None:
            (adapter,) = _active(self.model)
            reread_adapter(self.model, adapter, file)
        else:
            _put(self.tensors, self.directory.tensors())
        text = (self.directory.directory / HISTORY_NAME).read_text(encoding="utf-8")
        self.result = TrainingResult.from_json(text)
        self.result.directory = self.directory.directory
        return self.result


def _adapter_files(model: nn.Module, directory: Path) -> tuple[Path | None, set[int]]:
    """The one active adapter in PEFT's files and the ids of its tensors; nothing where there is none, or several."""
    active = _active(model)
    if len(active) != 1:
        return None, set()
    (adapter,) = active
    lora.save_adapter(model, directory, adapter)
    held: list[Tensor] = [
        parameter for layer in lora_layers(model).values() for parameter in layer.adapter_parameters(adapter)
    ]
    for module in saved_modules(model).values():
        if adapter in module.modules_to_save:
            whole = module.modules_to_save[adapter]
            held += [*whole.parameters(), *whole.buffers()]
    return directory, {id(tensor) for tensor in held}


def _active(model: nn.Module) -> set[str]:
    """Of adapted layers; modules that are trained whole do not count."""
    return {adapter for layer in lora_layers(model).values() for adapter in layer.active_adapters}


def _adapter_facts(model: nn.Module) -> dict[str, Any]:
    """What adapters compute with besides their tensors."""
    return {
        name: {
            adapter: [layer.scaling[adapter], layer.configs[adapter].lora_dropout, adapter in layer.active_adapters]
            for adapter in layer.configs
        }
        for name, layer in lora_layers(model).items()
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _put(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(values[name])


@contextlib.contextmanager
def _refusals_explained(ours: bool) -> Iterator[None]:
    """An index out of range comes from the data where the caller's own code has no part in the loss."""
    try:
        yield
    except IndexError as error:
        if not ours:
            raise
        raise CalibrationError(
            f"finetune: the model or its loss refused a batch ({error}); is a token id outside the vocabulary, or a label not "
            "among the classes?"
        ) from error


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        restore_modes(modes)
