"""How long a layer takes: predictions from a table that was measured, for plans made for speed.

Pure numbers; what measures is :mod:`lowrank.tuning`. At each measured number of rows (tokens of one call) the seconds
of a layer are fitted as a sum with coefficients from 0: a fixed cost, a cost per input, rank component and output (what
is done to each token), and a cost per weight. Between the measured numbers of rows logarithms are interpolated.
A table never touches what a model computes; it only decides what a plan prefers.
"""

from __future__ import annotations

import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from lowrank.compression.formats import FORMATS, WeightFormat, format_named
from lowrank.errors import CheckpointError, StorageError, is_whole
from lowrank.io import parse_json, printable, read_bounded
from lowrank.io.version import PACKAGE

__all__ = [
    "CONV_PREFIX",
    "SHIPPED",
    "Curve",
    "Point",
    "TimingTable",
    "cross_validate",
    "fit_table",
    "load_timings",
    "timing_key",
    "user_path",
]

# By the route of integer layers, on which they depend most; for other routes the first stands in.
SHIPPED = {
    "native": Path(__file__).with_name("timings.json"),
    "native-avx2": Path(__file__).with_name("timings-avx2.json"),
}
VARIABLE = "LOWRANK_TIMINGS"
TIMINGS_VERSION = 1
_MAX_BYTES = 1 << 20
_MAX_ROWS = 2**40
# Of the keys of convolutions, before the format's name.
CONV_PREFIX = "conv-"


def timing_key(format: str, activations: str | None, dtype: str) -> str:
    """Give the name of a curve.

    Args:
        format: ``"dense"``, ``"lowrank"``, ``"int8"`` or ``"lowrank-int8"``; with ``"conv-"`` before it for
            convolutions.
        activations: ``"int8"``, ``"float"`` or ``None``.
        dtype: of the model, as in ``"float32"``.

    Example:
        >>> timing_key("int8", "float", "float32")
        'int8/float/float32'
    """
    return f"{format}/{activations or '-'}/{dtype}"


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        key: see :func:`timing_key`.
        rows: tokens of a call (for a convolution: positions of its output, over all samples).
        outputs, inputs: of the weight as a matrix.
        rank: of a factored layer, else ``None``.
        seconds: of one call.
    """

    key: str
    rows: int
    outputs: int
    inputs: int
    rank: int | None
    seconds: float


def _features(outputs: int, inputs: int, rank: int | None) -> tuple[float, ...]:
    if rank is None:
        return 1.0, inputs, outputs, inputs * outputs
    return 1.0, inputs, outputs, rank, rank * (inputs + outputs)


@dataclass(frozen=True)
class Curve:
    """Coefficients of one kind of layer.

    Attributes:
        rows: the measured numbers of rows, ascending.
        coefficients: for each, seconds per call, input, output and weight; for factored layers seconds per call, input,
            output, rank component and weight of the factors.

    Example:
        >>> curve = Curve((1, 100), ((1e-6, 0.0, 0.0, 1e-9), (1e-6, 0.0, 0.0, 1e-7)))
        >>> round(curve.seconds(1, 10, 10) * 1e6, 3), round(curve.seconds(200, 10, 10) * 1e6, 3)
        (1.1, 22.0)
    """

    rows: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def seconds(self, rows: int, outputs: int, inputs: int, rank: int | None = None) -> float:
        """Predicted seconds of one call; beyond the largest measured number of rows, proportional to them."""
        rows = max(rows, 1)
        above = bisect_right(self.rows, rows)
        if above == len(self.rows):
            return self._at(-1, outputs, inputs, rank) * rows / self.rows[-1]
        if above == 0:
            return self._at(0, outputs, inputs, rank)
        low, high = (math.log(self._at(index, outputs, inputs, rank)) for index in (above - 1, above))
        share = math.log(rows / self.rows[above - 1]) / math.log(self.rows[above] / self.rows[above - 1])
        return math.exp(low + share * (high - low))

    def _at(self, index: int, outputs: int, inputs: int, rank: int | None) -> float:
        terms = zip(self.coefficients[index], _features(outputs, inputs, rank), strict=True)
        return max(math.fsum(coefficient * feature for coefficient, feature in terms), 1e-9)


@dataclass(frozen=True)
class TimingTable:
    """What layers take on one machine.

    Attributes:
        host: what the numbers depend on: ``cpu``, ``threads``, ``capability``, ``route``, ``torch``.
        curves: by :func:`timing_key`.
        accuracy: what :func:`cross_validate` found.
        origin: where the table came from, for reports.

    Example:
        >>> table = fit_table([Point("dense/-/float32", 1, 8, 8, None, 2e-6)], {"cpu": "test", "threads": 1})
        >>> table.seconds("dense", None, "float32", 1, 8, 8), table.seconds("int8", "int8", "float32", 1, 8, 8)
        (2e-06, None)
        >>> TimingTable.from_json(table.to_json(), source="t.json").curves == table.curves
        True
    """

    host: Mapping[str, Any]
    curves: Mapping[str, Curve]
    accuracy: Mapping[str, float]
    origin: str = "measured now"

    def seconds(
        self,
        format: str,
        activations: str | None,
        dtype: str,
        rows: int,
        outputs: int,
        inputs: int,
        rank: int | None = None,
    ) -> float | None:
        """Predicted seconds of one call, or ``None`` where this kind of layer was not measured."""
        curve = self.curves.get(timing_key(format, activations, dtype))
        return None if curve is None else curve.seconds(rows, outputs, inputs, rank)

    @property
    def name(self) -> str:
        """One line for plans and reports."""
        about = f"{self.host.get('cpu')}, threads: {self.host.get('threads')}, route {self.host.get('route')}"
        return printable(f"{self.origin}: {about}")

    def to_json(self) -> str:
        """Deterministic text."""
        content = {
            "format_version": TIMINGS_VERSION,
            "host": dict(self.host),
            "accuracy": dict(self.accuracy),
            "curves": {
                key: {"rows": list(curve.rows), "coefficients": [list(row) for row in curve.coefficients]}
                for key, curve in self.curves.items()
            },
        }
        return json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> TimingTable:
        """Read a table, strictly.

        Raises:
            CheckpointError: not JSON, or not a table; names the file, the field and the rule.
        """
        content = parse_json(text, source=source)
        where = printable(source)
        required = {"format_version", "host", "accuracy", "curves"}
        if not isinstance(content, dict) or set(content) != required:
            raise CheckpointError(f"{where}: a timing table has exactly the fields {', '.join(sorted(required))}")
        version = content["format_version"]
        if not is_whole(version, 1):
            raise CheckpointError(f"{where}: format_version must be {TIMINGS_VERSION}, got {printable(version)}")
        if version > TIMINGS_VERSION:
            raise CheckpointError(f"{where}: format_version {version} was written by a newer lowrank; measure again")
        for name in ("host", "accuracy", "curves"):
            if not isinstance(content[name], dict):
                raise CheckpointError(f"{where}: {name} must be an object, got {printable(content[name])}")
        for name, value in content["host"].items():
            if not isinstance(value, (str, int)):
                raise CheckpointError(f"{where}: host: {printable(name)} must be text or a whole number")
        for name, value in content["accuracy"].items():
            if not _is_number(value):
                raise CheckpointError(f"{where}: accuracy: {printable(name)} must be a number from 0")
        curves = {
            key: _read_curve(value, _terms(key), f"{where}: curve {printable(key)}")
            for key, value in content["curves"].items()
        }
        if not curves:
            raise CheckpointError(f"{where}: curves: holds none; measure again with lowrank benchmark --tune")
        return cls(content["host"], curves, content["accuracy"], source)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _read_curve(value: Any, length: int, where: str) -> Curve:
    if not isinstance(value, dict) or set(value) != {"rows", "coefficients"}:
        raise CheckpointError(f"{where}: must have exactly the fields coefficients, rows")
    rows, coefficients = value["rows"], value["coefficients"]
    whole = isinstance(rows, list) and all(map(is_whole, rows))
    if not whole or not rows or rows != sorted(set(rows)) or not 1 <= rows[0] <= rows[-1] <= _MAX_ROWS:
        raise CheckpointError(f"{where}: rows must be ascending whole numbers from 1, got {printable(rows)}")
    if not isinstance(coefficients, list) or len(coefficients) != len(rows):
        raise CheckpointError(f"{where}: needs one list of coefficients for each of its {len(rows)} numbers of rows")
    for line in coefficients:
        if not isinstance(line, list) or len(line) != length or not all(_is_number(item) for item in line):
            raise CheckpointError(
                f"{where}: coefficients must be lists of {length} numbers from 0, got {printable(line)}"
            )
    return Curve(tuple(rows), tuple(tuple(float(item) for item in line) for line in coefficients))


def fit_table(
    points: Sequence[Point], host: Mapping[str, Any], accuracy: Mapping[str, float] | None = None
) -> TimingTable:
    """Fit the table of these measurements: relative errors in least squares, no coefficient below 0.

    Raises:
        ValueError: no measurement, or one that is not positive.
    """
    if not points or not all(0.0 < point.seconds < math.inf for point in points):
        raise ValueError("points: need at least one, and positive seconds in each")
    curves = {}
    for key in sorted({point.key for point in points}):
        mine = [point for point in points if point.key == key]
        rows = sorted({point.rows for point in mine})
        curves[key] = Curve(tuple(rows), tuple(_fit([point for point in mine if point.rows == n]) for n in rows))
    return TimingTable(dict(host), curves, dict(accuracy or {}))


def _fit(points: Sequence[Point]) -> tuple[float, ...]:
    features = np.array([_features(point.outputs, point.inputs, point.rank) for point in points], dtype=np.float64)
    weighted = features / np.array([point.seconds for point in points])[:, None]
    sizes = np.linalg.norm(weighted, axis=0)
    solution, _ = nnls(weighted / sizes, np.ones(len(points)))
    return tuple(float(f"{value:.6g}") for value in solution / sizes)


def cross_validate(points: Sequence[Point]) -> dict[str, float]:
    """Say how far predictions are off for a shape that the table has not seen, each shape left out in turn.

    Returns:
        ``median_error`` and ``p90_error`` (relative), and ``wrong_order``: the share of measurements of compressed
        layers that the table puts on the wrong side of the dense layer.
    """
    shapes = sorted({(point.outputs, point.inputs) for point in points})
    errors: list[float] = []
    judged: list[bool] = []
    for shape in shapes if len(shapes) > 1 else ():
        table = fit_table([point for point in points if (point.outputs, point.inputs) != shape], {})
        held = [point for point in points if (point.outputs, point.inputs) == shape]
        dense = {(*_family(p.key), p.rows): p for p in held if _format(p.key).dense}
        for point in held:
            curve = table.curves.get(point.key)
            if curve is None:
                continue
            predicted = curve.seconds(point.rows, point.outputs, point.inputs, point.rank)
            errors.append(abs(predicted / point.seconds - 1.0))
            other = dense.get((*_family(point.key), point.rows))
            if other is not None and other is not point:
                limit = table.curves[other.key].seconds(other.rows, other.outputs, other.inputs)
                judged.append((predicted < limit) != (point.seconds < other.seconds))
    return {
        "median_error": _round(np.median(errors)) if errors else 0.0,
        "p90_error": _round(np.quantile(errors, 0.9)) if errors else 0.0,
        "wrong_order": _round(np.mean(judged)) if judged else 0.0,
    }


def _format(key: str) -> WeightFormat:
    """The format that a curve is of."""
    return format_named(key.split("/")[0].removeprefix(CONV_PREFIX))


def _terms(key: str) -> int:
    """How many coefficients a curve has; of a format that is not known here, by what a matrix needs."""
    known = FORMATS.get(key.split("/")[0].removeprefix(CONV_PREFIX))
    return len(_features(1, 1, 1 if known is not None and known.factored else None))


def _family(key: str) -> tuple[bool, str]:
    """What a layer is compared within: convolutions or matrices, and the dtype."""
    return key.startswith(CONV_PREFIX), key.rsplit("/", 1)[1]


def _round(value: Any) -> float:
    return round(float(value), 4)


def user_path(environment: Mapping[str, str] | None = None) -> Path:
    """Find where ``lowrank benchmark --tune`` saves: ``$LOWRANK_TIMINGS``, else the platform's directory for settings.

    Example:
        >>> str(user_path({"LOWRANK_TIMINGS": "/tmp/mine.json"}))
        '/tmp/mine.json'
    """
    known = os.environ if environment is None else environment
    if known.get(VARIABLE):
        return Path(known[VARIABLE])
    home = Path(known.get("HOME") or Path.home())
    if sys.platform == "darwin":
        folder = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        folder = Path(known.get("APPDATA") or home / "AppData" / "Roaming")
    else:
        folder = Path(known.get("XDG_CONFIG_HOME") or home / ".config")
    return folder / PACKAGE / "timings.json"


def load_timings(environment: Mapping[str, str] | None = None, *, route: str = "native") -> TimingTable:
    """Load the user's table where there is one, else the one that comes with the package.

    Args:
        environment: instead of the process's.
        route: of this machine's integer layers, as :func:`lowrank.kernels.route` names it.

    Raises:
        StorageError: ``$LOWRANK_TIMINGS`` names a file that does not exist.
        CheckpointError: the file is not a timing table.
    """
    known = os.environ if environment is None else environment
    path = user_path(known)
    if path.exists():
        return TimingTable.from_json(read_bounded(path, _MAX_BYTES), source=str(path))
    if known.get(VARIABLE):
        raise StorageError(
            f"{printable(path)}: ${VARIABLE} names it, but it does not exist; lowrank benchmark --tune writes it"
        )
    shipped = SHIPPED.get(route, SHIPPED["native"])
    table = TimingTable.from_json(shipped.read_bytes(), source=shipped.name)
    return TimingTable(table.host, table.curves, table.accuracy, "shipped with lowrank")
