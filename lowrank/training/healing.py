"""``heal``: win back what compression lost, without a label."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.batches import Batch, ForwardFn, evaluating, sample_count
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import input_embedding, prepare_batches, told
from lowrank.calibration.untouched import restore_modes, set_modes
from lowrank.checkpoint import stored_tensors
from lowrank.errors import CalibrationError, NumericsError
from lowrank.targets.copying import copy_model
from lowrank.training.data import derived_seed
from lowrank.training.distillation import Distillation, is_logits
from lowrank.training.forms import TrainableForm
from lowrank.training.options import HealOptions, check_seed, learning_rate_factor
from lowrank.training.sample_pool import SamplePool

__all__ = ["HealReport", "HealResult", "heal", "heal_batches"]

# Samples set aside to compare before and after: enough to tell a gain from none, few enough to leave the rest to learn from.
_SET_ASIDE_SHARE, _MAX_SET_ASIDE = 0.1, 256
_MIN_SAMPLES = 8
WARMUP = 0.05
# A memory of 100 steps for squares: healing has few, and its gradients shrink while it goes on.
BETAS = (0.9, 0.99)


@dataclass
class HealReport:
    """What healing did, measured on samples it was not trained on.

    Attributes:
        metric: "output" (‖f(x)−f'(x)‖/‖f(x)‖) or, for logits, "kl" (nats).
        error_before, error_after: on those samples; ``error_after`` is the returned model's.
        kept: "after", or "before" where training made it no better and the model is the one that was passed in.
        what: "factors" or "adapters".
        trained: numbers that were trained.
        steps: that were run.
        samples, samples_held_out: trained on, and set aside.
        bytes: of the model's tensors, the same before and after.
        losses: of every step.
        run: seconds.
    """

    metric: str
    error_before: float
    error_after: float
    kept: str
    what: str
    trained: int
    steps: int
    samples: int
    samples_held_out: int
    bytes: int
    losses: list[float] = field(default_factory=list)
    run: dict[str, float] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Give all but how long it took, which differs between equal runs."""
        return {key: value for key, value in asdict(self).items() if key != "run"}

    def to_json(self) -> str:
        """Write :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)


@dataclass
class HealResult:
    """The healed model, of the same formats and bytes, and the report."""

    model: nn.Module
    report: HealReport


def heal(
    compressed: nn.Module,
    original: nn.Module,
    calibration: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 4e-4,
    what: str = "auto",
    hidden_weight: float = 1.0,
    batch_size: int = 32,
    validation: Iterable[Any] | None = None,
    vary: bool = False,
    max_grad_norm: float = 1.0,
    output_fn: Callable[[Any], Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HealResult:
    """Train a compressed model to do what its original does, on inputs alone.

    The compressed model's hidden states (outputs of the blocks that the model repeats; else of the compressed layers)
    and outputs are drawn to the original's: see :class:`lowrank.training.distillation.Distillation` for the loss. Float
    factors, biases and norms are trained as they are; int8 factors and matrices, of linear layers and convolutions, are rounded in
    every forward pass, straight through in the backward, and end in the same format, rank and number of bytes.

    Both models are run in evaluation mode, and neither is changed.

    Args:
        compressed: with compressed layers (or adapters).
        original: the model it was made from, or stands for: takes the same inputs.
        calibration: batches without labels, as :func:`lowrank.compress_model` takes them.
        steps, epochs: at most one of them; by default 20 epochs, but 100 to 400 steps.
        lr: AdamW's peak learning rate; it rises over a twentieth of the steps and falls as a cosine.
        what: "factors", "adapters" (what :func:`lowrank.add_lora` added, of the active adapter), or "auto": adapters
            where there are any.
        hidden_weight: of the hidden states against the output.
        batch_size: samples a step, where dimension 0 counts samples.
        validation: batches to compare before and after; else a tenth of the samples (256 at most) is set aside.
        vary: samples are other ones each time: spans of texts joined and tokens exchanged, arrays of floats mixed in pairs, and
            images mirrored and shifted besides. The original says what is right for any input. It then runs in every
            step; else what it makes of a batch is kept, a third of the time of a step.
        max_grad_norm: gradients are clipped to it.
        output_fn: picks the tensor to match out of the model's output.
        forward_fn: ``forward_fn(model, batch) -> output`` calls a model that takes objects.
        seed: of the split, the order and the variation; same input, seed and thread count give the same bytes.
        progress: a bar with the loss on standard error.

    Returns:
        The better of the healed model and a copy of the one passed in, and what was measured.

    Raises:
        UsageError: an argument that means nothing, or nothing to train.
        CalibrationError: data that cannot be used.
        NumericsError: a loss that is NaN or infinite; the step is named.

    Example:
        >>> from lowrank.layers import SVDCompressedLinear
        >>> original = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        >>> compressed = nn.Sequential(SVDCompressedLinear.from_linear(original[0], rank=6), nn.Tanh(), original[2])
        >>> report = heal(compressed, original, [torch.randn(256, 16)], steps=60, progress=False).report
        >>> report.kept, report.error_after < report.error_before
        ('after', True)
    """
    check_seed(seed)
    options = HealOptions(steps, epochs, lr, what, hidden_weight, batch_size, vary, max_grad_norm)
    called: dict[str, Any] = {"output_fn": output_fn, "forward_fn": forward_fn}
    batches = told(prepare_batches(original, calibration, **called))
    checks = None if validation is None else told(prepare_batches(original, validation, "validation", **called))
    train, held = _set_aside(batches, checks, seed)
    return heal_batches(compressed, original, train, held, options, output_fn=output_fn, seed=seed, progress=progress)


def heal_batches(
    compressed: nn.Module,
    original: nn.Module,
    train: Sequence[Batch],
    held: Sequence[Batch],
    options: HealOptions,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HealResult:
    """Heal as :func:`heal` does, on batches that are prepared, and set aside, already.

    Args:
        train: to learn from.
        held: to compare before and after.
    """
    started = time.perf_counter()
    metric = _metric_for(original, held[0], output_fn)
    judge = Evaluator(original, held, metric, output_fn)
    before = judge.measure(compressed).value
    halves = {tensor.dtype for tensor in compressed.parameters() if tensor.is_floating_point()} == {torch.float16}
    teacher = original
    healed = copy_model(compressed)
    if halves:
        # Gradients and steps of training leave float16's range; what has only that dtype is trained in float32.
        healed, teacher = healed.float(), copy_model(original).float()
        train = [batch.widened() for batch in train]
    modes = {name: module.training for name, module in healed.named_modules()}
    original_modes = [(module, module.training) for module in teacher.modules()]
    size = _bytes(compressed)
    form = TrainableForm(healed, options.what, teacher)
    total = options.total_steps(sample_count(train))
    pool = SamplePool.of(train, vocabulary=_vocabulary(original), vary=options.vary)
    try:
        healed.eval()
        teacher.eval()
        fixed = () if pool.varies else tuple(pool.epoch(options.batch_size, _generator(seed, 0)))
        loss = Distillation(healed, teacher, options.hidden_weight, output_fn, fixed)
        drawn = _shuffled(fixed, seed) if fixed else _varied(pool, options.batch_size, seed)
        bar = tqdm(range(total), desc="heal", disable=not progress)
        losses = _train(form, loss, drawn, bar, options)
    finally:
        form.close()
        restore_modes(original_modes)
        set_modes(healed, modes)
    if halves:
        healed = _halved(healed, compressed)
    after = judge.measure(healed).value
    better = after < before
    if better and _bytes(healed) != size:
        raise AssertionError(f"healing changed the size from {size} to {_bytes(healed)} bytes")
    report = HealReport(
        metric=metric,
        error_before=before,
        error_after=after if better else before,
        kept="after" if better else "before",
        what=form.what,
        trained=sum(parameter.numel() for parameter in form.parameters),
        steps=total,
        samples=sample_count(train),
        samples_held_out=sample_count(held),
        bytes=size,
        losses=losses,
        run={"seconds": time.perf_counter() - started},
    )
    return HealResult(healed if better else copy_model(compressed), report)


def _halved(healed: nn.Module, like: nn.Module) -> nn.Module:
    """Back to the dtypes that each tensor had."""
    healed.half()
    wanted = like.state_dict()
    for name, tensor in stored_tensors(healed).items():
        if tensor.dtype is not wanted[name].dtype:
            raise AssertionError(f"healing changed {name} from {wanted[name].dtype} to {tensor.dtype}")
    return healed


def _train(
    form: TrainableForm,
    distillation: Distillation,
    drawn: Iterator[Batch],
    steps: tqdm[int],
    options: HealOptions,
) -> list[float]:
    total = len(steps)
    optimizer = torch.optim.AdamW(form.parameters, lr=options.lr, betas=BETAS, weight_decay=0.0, foreach=False)
    losses: list[float] = []
    with torch.enable_grad(), steps:
        for step in steps:
            loss = distillation.loss(next(drawn))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NumericsError(f"heal: the loss is {value} at step {step + 1}; lower lr (now {options.lr:g})")
            for parameter in form.parameters:
                parameter.grad = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(form.parameters, options.max_grad_norm)
            factor = learning_rate_factor(step, total, math.ceil(WARMUP * total), "cosine")
            optimizer.param_groups[0]["lr"] = options.lr * factor
            optimizer.step()
            losses.append(value)
            steps.set_postfix(loss=f"{value:.4g}", refresh=False)
    return losses


def _shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """The same batches in another order every epoch, so that the original need not see them twice."""
    epoch = 0
    while True:
        epoch += 1
        for index in torch.randperm(len(batches), generator=_generator(seed, epoch)).tolist():
            yield batches[index]


def _varied(pool: SamplePool, batch_size: int, seed: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from pool.epoch(batch_size, _generator(seed, epoch))
        epoch += 1


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, 3, epoch))


def _set_aside(batches: Sequence[Batch], checks: list[Batch] | None, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Samples to train on, and samples to compare on."""
    if checks is not None:
        return list(batches), checks
    total = sample_count(batches)
    if total < _MIN_SAMPLES:
        raise CalibrationError(
            f"calibration: {total} samples (index of dimension 0); at least {_MIN_SAMPLES} are needed, or validation batches"
        )
    aside = min(max(round(_SET_ASIDE_SHARE * total), 2), _MAX_SET_ASIDE)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:aside]] = True
    train: list[Batch] = []
    held: list[Batch] = []
    start = 0
    for batch in batches:
        mine = chosen[start : start + batch.size]
        start += batch.size
        for part, wanted in ((train, ~mine), (held, mine)):
            indices = torch.nonzero(wanted).flatten()
            if len(indices):
                part.append(batch.select(indices))
    return train, held


def _metric_for(original: nn.Module, batch: Batch, output_fn: Callable[[Any], Tensor] | None) -> str:
    if output_fn is not None:
        return "output"
    # In evaluation mode: running statistics are the original's own.
    with evaluating(original):
        return "kl" if is_logits(batch.run(original)) else "output"


def _vocabulary(model: nn.Module) -> int:
    """Number of token ids of a model in transformers' manner; 0 where it does not say."""
    count = getattr(input_embedding(model), "num_embeddings", 0)
    return count if isinstance(count, int) else 0


def _bytes(model: nn.Module) -> int:
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in stored_tensors(model).values() if tensor.numel()}
    return sum(unique.values())
