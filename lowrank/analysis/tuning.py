"""Measures layers of many shapes on this machine, for the table that plans made for speed go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.analysis.stopwatch import host_facts, interleaved
from lowrank.compression.formats import DENSE
from lowrank.compression.timings import CONV_PREFIX, Point, TimingTable, cross_validate, fit_table, timing_key
from lowrank.layers import (
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedLowRankConv2d,
    QuantizedLowRankLayer,
    SVDCompressedConv2d,
    SVDCompressedLinear,
)
from lowrank.layers.base import ACTIVATIONS

__all__ = ["ROWS", "SHAPES", "measure_conv_points", "measure_points", "measure_timings"]

# (out, in) of layers in models from MiniLM to a small Llama, and heads and bottlenecks: wide, tall and square.
SHAPES = (
    (384, 384),
    (1536, 384),
    (384, 1536),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (2048, 2048),
    (64, 256),
    (4096, 1024),
)
# Tokens of a call.
ROWS = (1, 8, 32, 128, 512, 2048)
# (in, out, kernel size) of convolutions, and (samples, side) of what they read: of small images.
CHANNELS = ((3, 16, 3), (16, 16, 3), (16, 32, 1), (32, 32, 3), (64, 64, 3), (64, 128, 1), (128, 128, 3))
IMAGES = ((1, 8), (1, 16), (1, 32), (64, 8), (64, 16), (64, 32))
DTYPES = ("float32", "bfloat16")
# Ranks, as shares of the smaller side.
SHARES = (0.125, 0.375)
ROUNDS = 5
SECONDS = 0.004


def measure_points(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[str] = DTYPES,
    *,
    rounds: int = ROUNDS,
    at_least: float = SECONDS,
    progress: bool = False,
) -> list[Point]:
    """Measure the seconds of every kind of linear layer at every shape and number of rows; contents are random.

    Of the rounds the fastest counts: other work on the machine only ever adds to it.

    Args:
        shapes: (out, in).
        rows: tokens of a call.
        dtypes: of the model.
        rounds, at_least: see :func:`lowrank.analysis.stopwatch.interleaved`.
        progress: a bar on standard error.

    Example:
        >>> points = measure_points([(16, 32)], [2], ["float32"], rounds=1, at_least=0.0)
        >>> sorted({point.key for point in points})[0], all(point.seconds > 0.0 for point in points)
        ('dense/-/float32', True)
    """
    points = []
    cases = [(shape, dtype) for shape in shapes for dtype in dtypes]
    with torch.no_grad():
        for (outputs, inputs), dtype in tqdm(cases, desc="timing layers", delay=2, disable=not progress):
            layers = list(_layers(outputs, inputs, dtype))
            for count in rows:
                x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
                calls: dict[str, Callable[[], Any]] = {}
                for key, rank, layer in layers:
                    calls[f"{key} {rank}"] = lambda layer=layer, x=x: layer(x)  # type: ignore[misc]
                seconds = interleaved(calls, rounds, at_least)
                points += [
                    Point(key, count, outputs, inputs, rank, min(seconds[f"{key} {rank}"])) for key, rank, _ in layers
                ]
    return points


def _layers(outputs: int, inputs: int, dtype: str) -> Iterator[tuple[str, int | None, nn.Module]]:
    """Every kind of layer of one shape, under the key of its curve."""
    generator = torch.Generator().manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    bias = torch.zeros(outputs, dtype=kind)
    yield timing_key(DENSE.format, None, dtype), None, nn.Linear(inputs, outputs, dtype=kind)
    dense, scale = codes(outputs, inputs), torch.full((outputs,), 1e-4)
    for mode in ACTIVATIONS:
        layer = QuantizedLinear.from_tensors(dense, scale, bias, activations=mode)
        yield timing_key(layer.format, mode, dtype), None, layer
    for share in SHARES:
        rank = max(int(min(outputs, inputs) * share), 1)
        thin = SVDCompressedLinear(inputs, outputs, rank, dtype=kind)
        yield timing_key(thin.format, None, dtype), rank, thin
        left, right = codes(outputs, rank), codes(rank, inputs)
        between = torch.full((rank,), 1e-6)
        for mode in ACTIVATIONS:
            factored = QuantizedLowRankLayer.from_tensors(left, right, between, bias, activations=mode)
            yield timing_key(factored.format, mode, dtype), rank, factored


def measure_conv_points(
    channels: Sequence[tuple[int, int, int]] = CHANNELS,
    images: Sequence[tuple[int, int]] = IMAGES,
    *,
    rounds: int = ROUNDS,
    at_least: float = SECONDS,
    progress: bool = False,
) -> list[Point]:
    """Measure the seconds of every kind of 2-d convolution (zeros around, one group, float32), as :func:`measure_points`.

    Args:
        channels: (in, out, kernel size).
        images: (samples, height and width).

    Example:
        >>> points = measure_conv_points([(2, 4, 3)], [(1, 5)], rounds=1, at_least=0.0)
        >>> points[0].key, points[0].rows, points[0].outputs, points[0].inputs
        ('conv-dense/-/float32', 25, 4, 18)
    """
    points = []
    with torch.no_grad():
        for inputs, outputs, size in tqdm(channels, desc="timing convolutions", delay=2, disable=not progress):
            layers = list(_conv_layers(inputs, outputs, size))
            for samples, side in images:
                x = torch.randn(samples, inputs, side, side, generator=torch.Generator().manual_seed(0))
                calls: dict[str, Callable[[], Any]] = {}
                for key, rank, layer in layers:
                    calls[f"{key} {rank}"] = lambda layer=layer, x=x: layer(x)  # type: ignore[misc]
                seconds = interleaved(calls, rounds, at_least)
                rows, columns = samples * side * side, inputs * size * size
                points += [
                    Point(key, rows, outputs, columns, rank, min(seconds[f"{key} {rank}"])) for key, rank, _ in layers
                ]
    return points


def _conv_layers(inputs: int, outputs: int, size: int) -> Iterator[tuple[str, int | None, nn.Module]]:
    def key(format: str, mode: str | None) -> str:
        return timing_key(CONV_PREFIX + format, mode, "float32")

    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    yield key(DENSE.format, None), None, conv
    for mode in ACTIVATIONS:
        whole = QuantizedConv2d.from_conv2d(conv, activations=mode)
        yield key(whole.format, mode), None, whole
    for share in SHARES:
        rank = max(int(min(outputs, inputs * size * size) * share), 1)
        thin = SVDCompressedConv2d.from_conv2d(conv, rank=rank)
        yield key(thin.format, None), rank, thin
        for mode in ACTIVATIONS:
            rounded = QuantizedLowRankConv2d.from_conv2d(conv, rank=rank, activations=mode)
            yield key(rounded.format, mode), rank, rounded


def measure_timings(*, progress: bool = False, **grid: Any) -> TimingTable:
    """Measure the table of this machine, with the number of threads that torch is set to; minutes for the whole grid.

    Args:
        progress: a bar on standard error.
        grid: ``shapes``, ``rows``, ``dtypes``, ``rounds``, ``at_least`` of :func:`measure_points`; with any of them
            convolutions are left out.
    """
    points = measure_points(progress=progress, **grid)
    if not grid:
        points += measure_conv_points(progress=progress)
    return fit_table(points, host_facts(), cross_validate(points))
