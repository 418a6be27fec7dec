"""How fast a compressed model really is, layer by layer and as a whole, in paired runs next to the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from lowrank.analysis.stopwatch import Spread, host_facts, interleaved, spread
from lowrank.calibration.batches import Batch, ForwardFn, evaluating
from lowrank.calibration.preparing import prepare_batches
from lowrank.compression.formats import DENSE
from lowrank.errors import UsageError, is_whole
from lowrank.io import printable
from lowrank.kernels import routes_in_use
from lowrank.layers import CompressedLayer, compressed_layers
from lowrank.reporting import html
from lowrank.reporting.report import Report, Table
from lowrank.reporting.text import Column

__all__ = ["BenchmarkReport", "BenchmarkRow", "benchmark"]

ROUNDS = 11
SECONDS = 0.02
# Layers whose inputs are held at a time: one forward each would be slow, all at once would hold every activation.
_LAYERS_A_PASS = 16
COLUMNS = (
    Column("layer"),
    Column("format"),
    Column("shape", numeric=True),
    Column("rows", numeric=True),
    Column("time", numeric=True),
    Column(DENSE.format, numeric=True),
    Column("speed-up", numeric=True),
    Column("route"),
    Column(""),
)
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BenchmarkRow:
    """State one compressed layer, over all its calls in one forward of the model.

    Attributes:
        name, kind, format, shape, rank, activations: of the layer.
        calls: how often one forward calls it; 0 for one that the inputs do not reach.
        rows: tokens (or look-ups, or positions) of all calls together.
        seconds: of these calls.
        dense_seconds: of the original's layer of that name on the same inputs; ``None`` without one.
        speedup: ``dense_seconds / seconds`` within the rounds.
        routes: ways that its integer products took.
    """

    name: str
    kind: str
    format: str
    shape: tuple[int, ...]
    rank: int | None
    activations: str | None
    calls: int
    rows: int
    seconds: Spread | None
    dense_seconds: Spread | None
    speedup: Spread | None
    routes: tuple[str, ...]

    @property
    def slower(self) -> bool:
        """Tell whether the median says that the layer got slower."""
        return self.speedup is not None and self.speedup.median < 1.0


@dataclass(frozen=True)
class BenchmarkReport(Report):
    """Hold what :func:`benchmark` measured.

    Attributes:
        rows: one per compressed layer, in the model's order.
        seconds: of one pass of the whole model over all batches.
        against_seconds: of the original; ``None`` without one.
        speedup: ``against_seconds / seconds`` within the rounds.
        inputs: what one pass read, in words.
        rounds: how many.
        host: see :func:`lowrank.analysis.stopwatch.host_facts`.
    """

    heading = "Benchmark"
    stem = "benchmark"
    what = "a benchmark"
    usual_width = None

    rows: tuple[BenchmarkRow, ...]
    seconds: Spread
    against_seconds: Spread | None
    speedup: Spread | None
    inputs: str
    rounds: int
    host: Mapping[str, Any]

    @property
    def slower(self) -> tuple[str, ...]:
        """Name the layers that got slower."""
        return tuple(row.name for row in self.rows if row.slower)

    def summary(self) -> list[str]:
        """Say nothing before the table: it is to stand in documents of others, with its remarks below it."""
        return []

    def _content(self) -> dict[str, Any]:
        return asdict(self) | {"slower": list(self.slower)}

    def _tables(self, full: bool) -> list[Table]:
        body = [
            [
                printable(row.name),
                row.format
                + (f" r{row.rank}" if row.rank else "")
                + (" weight-only" if row.activations == "float" else ""),
                "x".join(map(str, row.shape)),
                str(row.rows or "-"),
                _time(row.seconds),
                _time(row.dense_seconds),
                _ratio(row.speedup),
                "+".join(row.routes) or "-",
                "SLOWER" if row.slower else "not reached" if row.calls == 0 else "",
            ]
            for row in self.rows
        ]
        whole = ["whole model", "", "", "", _time(self.seconds), _time(self.against_seconds), _ratio(self.speedup)]
        return [Table(COLUMNS, [*body, [*whole, "", ""]], named=False)]

    def _remarks(self, full: bool) -> list[str]:
        about = self.host
        lines = [
            f"Median (quartiles) of {self.rounds} interleaved rounds; {self.inputs}.",
            f"{about['cpu']}, threads: {about['threads']}, {about['capability']}, integer route {about['route']}, "
            f"torch {about['torch']}.",
        ]
        compared = [row for row in self.rows if row.speedup is not None]
        if self.slower:
            lines.append(
                f"{len(self.slower)} of {len(compared)} layers got slower: {', '.join(map(printable, self.slower))}."
            )
        elif compared:
            lines.append(f"None of the {len(compared)} compressed layers got slower.")
        if self.speedup is not None and self.speedup.median < 1.0:
            lines.append("The whole model got SLOWER.")
        return ["\n".join(lines)]

    def _sections(self) -> list[str]:
        (table,), (remarks,) = self._tables(full=True), self._remarks(full=True)
        return [html.section("Layers", table.to_html(), *map(html.section_text, remarks.split("\n")))]


def benchmark(
    model: nn.Module,
    against: nn.Module | None = None,
    *,
    inputs: Iterable[Any],
    rounds: int = ROUNDS,
    at_least: float = SECONDS,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
) -> BenchmarkReport:
    """Time a compressed model and each of its compressed layers, next to the original's.

    Every round runs all contenders one after the other, so that a ratio compares moments that lie side by side. Layers
    are timed alone, on the inputs that the first batch brings them.

    Args:
        model: with compressed layers.
        against: the original; layers are compared with those of the same name.
        inputs: batches as ``calibration`` of :func:`lowrank.compress_model` takes them; one pass runs them all.
        rounds: 1 or more; medians and quartiles are over them.
        at_least: seconds for which each contender is repeated in a round.
        forward_fn: ``forward_fn(model, batch) -> output`` calls a model that takes objects.
        progress: a bar on standard error.

    Raises:
        UsageError: ``rounds`` below 1.
        CalibrationError: inputs that the model cannot run on.

    Example:
        >>> import torch
        >>> from lowrank.layers import QuantizedLinear
        >>> dense = nn.Sequential(nn.Linear(64, 64))
        >>> small = nn.Sequential(QuantizedLinear.from_linear(dense[0]))
        >>> found = benchmark(small, dense, inputs=[torch.zeros(4, 64)], rounds=1, at_least=0.0)
        >>> found.rows[0].name, found.rows[0].rows, found.speedup.median > 0.0
        ('0', 4, True)
    """
    if not is_whole(rounds, 1):
        raise UsageError(f"rounds: must be an integer from 1, got {rounds!r}")
    # A batch that comes twice is to be timed twice.
    batches = prepare_batches(model, inputs, "inputs", forward_fn=forward_fn, repeats=True)
    models = {"model": model} if against is None else {"model": model, "against": against}
    with contextlib.ExitStack() as stack:
        for each in models.values():
            stack.enter_context(evaluating(each))
        rows = _layer_rows(model, against, batches[0], rounds, at_least, progress)
        passes = {name: _pass_over(each, batches) for name, each in models.items()}
        seconds = interleaved(passes, rounds, at_least)
    return BenchmarkReport(
        rows=tuple(rows),
        seconds=spread(seconds["model"]),
        against_seconds=spread(seconds["against"]) if against is not None else None,
        speedup=_quotient(seconds["against"], seconds["model"]) if against is not None else None,
        inputs=_described(batches),
        rounds=rounds,
        host=host_facts(),
    )


def _pass_over(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            batch.run(model)

    return run


def _layer_rows(
    model: nn.Module, against: nn.Module | None, batch: Batch, rounds: int, at_least: float, progress: bool
) -> list[BenchmarkRow]:
    layers = list(compressed_layers(model).items())
    originals = dict(against.named_modules()) if against is not None else {}
    rows = []
    with tqdm(total=len(layers), desc="timing layers", delay=2, disable=not progress) as bar:
        for start in range(0, len(layers), _LAYERS_A_PASS):
            some = layers[start : start + _LAYERS_A_PASS]
            calls = _captured(model, dict(some), batch)
            for name, layer in some:
                rows.append(_row(name, layer, originals.get(name), calls.pop(name), rounds, at_least))
                bar.update()
    return rows


def _captured(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[_Call]]:
    """What each layer is called with while the batch runs."""
    calls: dict[str, list[_Call]] = {name: [] for name in layers}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                # Copies: what the model does to a tensor after the call must not change what is timed.
                # One copy of a tensor passed twice: attention is faster where query and key are the same.
                copies: dict[int, Tensor] = {}
                values = tuple(_copy(value, copies) for value in args)
                calls[name].append((values, {key: _copy(value, copies) for key, value in kwargs.items()}))

            stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        batch.run(model)
    return calls


def _copy(value: Any, copies: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) not in copies:
        copies[id(value)] = value.detach().clone()
    return copies[id(value)]


def _row(
    name: str, layer: CompressedLayer, dense: nn.Module | None, calls: list[_Call], rounds: int, at_least: float
) -> BenchmarkRow:
    def run(module: nn.Module) -> Callable[[], None]:
        def all_calls() -> None:
            for args, kwargs in calls:
                module(*args, **kwargs)

        return all_calls

    seconds: dict[str, list[float]] = {}
    routes: tuple[str, ...] = ()
    if calls:
        before = routes_in_use()
        run(layer)()
        routes = tuple(sorted(route for route, count in routes_in_use().items() if count > before.get(route, 0)))
        # An original that is itself compressed, or is called otherwise, is no dense layer to compare with.
        contenders = {"own": run(layer)}
        if dense is not None and not isinstance(dense, CompressedLayer):
            contenders["original"] = run(dense)
        seconds = interleaved(contenders, rounds, at_least)
    return BenchmarkRow(
        name=name,
        kind=layer.kind,
        format=layer.format,
        shape=tuple(layer.shape),
        rank=layer.rank,
        activations=getattr(layer, "activations", None),
        calls=len(calls),
        rows=sum(_row_count(call, layer) for call in calls),
        seconds=spread(seconds["own"]) if calls else None,
        dense_seconds=spread(seconds["original"]) if "original" in seconds else None,
        speedup=_quotient(seconds["original"], seconds["own"]) if "original" in seconds else None,
        routes=routes,
    )


def _row_count(call: _Call, layer: CompressedLayer) -> int:
    """Tokens of a call: all dimensions of its input but the features."""
    args, kwargs = call
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None:
        return 0
    if not x.is_floating_point():
        return x.numel()
    # A convolution's channels stand before its positions, which are counted before its stride.
    features = -max(len(list(layer.shape)) - 1, 1)
    return x.numel() // max(x.shape[features], 1)


def _quotient(above: Sequence[float], below: Sequence[float]) -> Spread:
    return spread([one / other for one, other in zip(above, below, strict=True)])


def _described(batches: Sequence[Batch]) -> str:
    shapes: dict[str, int] = {}
    for batch in batches:
        tensors = batch.tensors
        shape = "x".join(map(str, tensors[0].shape)) if tensors else "no tensor"
        shapes[shape] = shapes.get(shape, 0) + 1
    listed = ", ".join(f"{count} of {shape}" for shape, count in list(shapes.items())[:4])
    more = "" if len(shapes) <= 4 else " and others"
    return f"{len(batches)} {'batch' if len(batches) == 1 else 'batches'} a pass: {listed}{more}"


def _time(value: Spread | None) -> str:
    if value is None:
        return "-"
    scale, unit = (1e6, "us") if value.median < 1e-3 else (1e3, "ms") if value.median < 1.0 else (1.0, "s")
    low, middle, high = (f"{scale * each:.3g}" for each in (value.lower_quartile, value.median, value.upper_quartile))
    return f"{middle} ({low}-{high}) {unit}"


def _ratio(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.2f} ({value.lower_quartile:.2f}-{value.upper_quartile:.2f})"
