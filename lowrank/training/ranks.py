"""Ranks of adapters by what they matter to the loss, within a budget of ranks."""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowrank.errors import RankError, UsageError
from lowrank.lora import LoRAConfig, LoRALayer, add_lora
from lowrank.lora.bases import largest_rank
from lowrank.training.data import derived_seed, read_examples
from lowrank.training.finetuning import finetune
from lowrank.training.losses import LossFn, run_example

__all__ = ["allocate_ranks", "rank_scores"]

# B starts at zero, where gradient × weight says nothing; a few steps of any size make it speak. An unmeasured
# heuristic.
WARM_STEPS, WARM_RATE = 8, 1e-3


def allocate_ranks(
    model: nn.Module,
    config: LoRAConfig | None,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    total_rank: int | None = None,
    ranks: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Give ranks where they count: a ``rank_pattern`` for :class:`lowrank.LoRAConfig`.

    Adapters of rank ``config.r`` are put everywhere (on a copy), trained for a few steps, and scored layer by layer with
    Σ|gradient · weight| over the batches. Ranks go one step at a time to the layer with the most score a rank, so that
    they end up in proportion to the scores.

    Args:
        model: as for :func:`lowrank.add_lora`; stays as it is.
        config: of the adapters, without a ``rank_pattern``.
        batches: training batches, see :func:`lowrank.finetune`; a few are enough.
        loss_fn: as there.
        total_rank: sum over all adapted layers; ``config.r`` times their number by default.
        ranks: the ranks a layer may have; any from 1 on by default.
        seed: of initialisation and order.

    Returns:
        A pattern for every adapted layer, in the model's order, to its rank.

    Raises:
        RankError: a rank that is no positive integer, or a total below the least that the layers can have.
        UsageError: a configuration with a ``rank_pattern``, or one that ``add_lora`` refuses.
        CalibrationError: data that cannot be used.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        >>> data = [(torch.randn(16, 8), torch.randn(16, 8))]
        >>> pattern = allocate_ranks(model, LoRAConfig(r=2, target_modules=["0", "2"]), data)
        >>> list(pattern), sum(pattern.values())
        (['^0', '^2'], 4)
    """
    scores, limits, steps = rank_scores(model, config, batches, loss_fn, seed=seed)
    config = LoRAConfig() if config is None else config
    total = config.r * len(scores) if total_rank is None else total_rank
    for name, value in (("total_rank", total), *(("ranks", rank) for rank in ranks or ())):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RankError(f"{name}: must be integers of at least 1, got {value!r}")
    if ranks is not None and not ranks:
        raise RankError("ranks: is empty; give the ranks a layer may have, [8, 16, 32] say")
    given = _given(scores, limits, steps, total, sorted(set(ranks)) if ranks else None)
    return {f"^{re.escape(name)}": rank for name, rank in given.items()}


def rank_scores(
    model: nn.Module,
    config: LoRAConfig | None,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """Score each layer by its adapter's Σ|gradient · weight| over the batches.

    Returns:
        The scores, the largest rank each layer can use, min(out, in · kernel), and what its rank must be a multiple of (the
        groups of a convolution).
    """
    config = LoRAConfig() if config is None else config
    if config.rank_pattern:
        raise UsageError("config: has a rank_pattern already, which is what this function is to find; leave it out")
    examples = list(batches)
    read_examples(examples, "batches", own_loss=loss_fn is None)
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(seed, 4))
        adapted = add_lora(model, dataclasses.replace(config, lora_dropout=0.0))
        finetune(
            adapted,
            examples,
            loss_fn=loss_fn,
            steps=WARM_STEPS,
            lr=WARM_RATE,
            schedule="constant",
            seed=seed,
            progress=False,
        )
    adapted.eval()
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoRALayer)}
    scores = dict.fromkeys(layers, 0.0)
    device = next(adapted.parameters()).device
    for example in read_examples(examples, "batches", own_loss=loss_fn is None):
        adapted.zero_grad(set_to_none=True)
        with torch.enable_grad():
            run_example(adapted, example.to(device), loss_fn).loss.backward()
        for name, layer in layers.items():
            scores[name] += _gradient_times_weight(layer)
    limits = {name: largest_rank(layer.unmerged_base) for name, layer in layers.items()}
    return scores, limits, {name: getattr(layer.unmerged_base, "groups", 1) for name, layer in layers.items()}


def _gradient_times_weight(layer: LoRALayer) -> float:
    pairs = [
        (parameter.grad, parameter)
        for name, parameter in layer.named_parameters()
        if "lora_" in name and parameter.grad is not None
    ]
    return sum(float((gradient.double() * weight.detach().double()).abs().sum()) for gradient, weight in pairs)


def _given(
    scores: Mapping[str, float],
    limits: Mapping[str, int],
    steps: Mapping[str, int],
    total: int,
    allowed: Sequence[int] | None,
) -> dict[str, int]:
    """Ranks in proportion to the scores: each step goes to the layer with the most score a rank that it has.

    Example:
        >>> limits, steps = {"a": 64, "b": 64}, {"a": 1, "b": 1}
        >>> _given({"a": 3.0, "b": 1.0}, limits, steps, 16, None)
        {'a': 12, 'b': 4}
        >>> _given({"a": 3.0, "b": 1.0}, limits, steps, 40, [8, 16, 32])
        {'a': 32, 'b': 8}
    """
    fitting = {name: [rank for rank in allowed or () if rank % steps[name] == 0] for name in scores}
    for name, ranks in fitting.items():
        if allowed and not ranks:
            raise RankError(f"ranks: none of {list(allowed)} divides into the {steps[name]} groups of layer {name}")
    given = {name: fitting[name][0] if allowed else steps[name] for name in scores}
    left = total - sum(given.values())
    if left < 0:
        raise RankError(
            f"total_rank: {total} is not enough for {len(scores)} layers of rank {min(given.values())} or more; "
            f"give at least {sum(given.values())}"
        )
    # The order of the model breaks ties.
    order = {name: number for number, name in enumerate(scores)}
    heap = [(-scores[name] / rank, order[name], name) for name, rank in given.items()]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        higher = [rank for rank in fitting[name] if rank > given[name]] if allowed else [given[name] + steps[name]]
        if not higher or higher[0] > limits[name] or higher[0] - given[name] > left:
            continue
        left -= higher[0] - given[name]
        given[name] = higher[0]
        heapq.heappush(heap, (-scores[name] / given[name], order[name], name))
    return given
