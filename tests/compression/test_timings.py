"""Timing tables: fits give back what they were made from, files are read strictly, the user's table comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import load_study, results_of

from lowrank.analysis.stopwatch import host_facts, interleaved, spread
from lowrank.analysis.tuning import measure_points
from lowrank.compression.timings import (
    SHIPPED,
    Curve,
    Point,
    TimingTable,
    cross_validate,
    fit_table,
    load_timings,
    timing_key,
    user_path,
)
from lowrank.errors import CheckpointError, LowRankError, ResourceError, StorageError

SHAPES = [(8, 16), (64, 16), (128, 128), (32, 256), (512, 64)]
STUDY = Path(__file__).resolve().parents[2] / "reports" / "timings"


def law(rows: int, outputs: int, inputs: int) -> float:
    return 3e-6 + rows * (2e-10 * outputs + 1e-10 * inputs + 5e-12 * outputs * inputs) + 4e-11 * outputs * inputs


def points(rows: tuple[int, ...] = (1, 16, 256)) -> list[Point]:
    dense = [Point("dense/-/float32", n, o, i, None, law(n, o, i)) for n in rows for o, i in SHAPES]
    factored = [
        Point("lowrank/-/float32", n, o, i, r, law(n, r, i) + law(n, o, r))
        for n in rows
        for o, i in SHAPES
        for r in (2, 6)
    ]
    return dense + factored


def test_a_fit_gives_back_the_law_that_made_the_points() -> None:
    table = fit_table(points(), {"cpu": "made up"})
    for outputs, inputs in [(100, 50), (1000, 1000), (8, 8)]:
        for rows in (1, 16, 256):
            got = table.seconds("dense", None, "float32", rows, outputs, inputs)
            assert got == pytest.approx(law(rows, outputs, inputs), rel=1e-4)
            got = table.seconds("lowrank", None, "float32", rows, outputs, inputs, 5)
            assert got == pytest.approx(law(rows, 5, inputs) + law(rows, outputs, 5), rel=1e-4)
    assert cross_validate(points())["p90_error"] < 1e-3
    assert cross_validate(points())["wrong_order"] == 0.0


def test_between_measured_rows_logarithms_are_interpolated_and_beyond_them_rows_count() -> None:
    curve = Curve((1, 100), ((1e-6, 0.0, 0.0, 0.0), (1e-4, 0.0, 0.0, 0.0)))
    assert curve.seconds(10, 4, 4) == pytest.approx(1e-5)
    assert curve.seconds(1000, 4, 4) == pytest.approx(1e-3)
    assert curve.seconds(0, 4, 4) == pytest.approx(1e-6)


def test_cross_validation_sees_a_shape_that_breaks_the_law() -> None:
    half = [
        Point("int8/int8/float32", p.rows, p.outputs, p.inputs, None, p.seconds / 2) for p in points() if p.rank is None
    ]
    assert cross_validate([*points(), *half])["wrong_order"] == 0.0
    odd = [replace(point, seconds=point.seconds * 8) if point.outputs == 128 else point for point in half]
    found = cross_validate([*points(), *odd])
    # The 3 int8 points of that shape are slower than dense, which no other shape foretells; its own numbers mislead others.
    assert found["wrong_order"] >= 3 / 45 - 1e-4
    assert found["p90_error"] > 0.5 > found["median_error"]


def test_a_table_survives_its_file() -> None:
    table = fit_table(points(), {"cpu": "made up", "threads": 2}, {"median_error": 0.1})
    again = TimingTable.from_json(table.to_json(), source="x.json")
    assert (again.curves, again.host, again.accuracy) == (table.curves, table.host, table.accuracy)
    assert again.to_json() == table.to_json()
    assert "x.json" in again.name


def _curve(content: dict[str, Any], **changes: Any) -> None:
    content["curves"]["dense/-/float32"] |= changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("host"), "exactly the fields"),
        (lambda c: c.update(more=1), "exactly the fields"),
        (lambda c: c.update(format_version=2), "newer lowrank"),
        (lambda c: c.update(format_version=True), "format_version"),
        (lambda c: c.update(host=[]), "host must be an object"),
        (lambda c: c["host"].update(threads=1.5), "threads"),
        (lambda c: c["accuracy"].update(x=-1), "accuracy"),
        (lambda c: c.update(curves={}), "holds none"),
        (lambda c: c["curves"].update(a=3), "curve a"),
        (lambda c: _curve(c, rows=[]), "rows must be ascending"),
        (lambda c: _curve(c, rows=[16, 1, 256]), "rows must be ascending"),
        (lambda c: _curve(c, rows=[0, 1, 2]), "rows must be ascending"),
        (lambda c: _curve(c, rows=[1, 2, 10**30]), "rows must be ascending"),
        (lambda c: _curve(c, rows=[1, 16, 256.0]), "rows must be ascending"),
        (lambda c: _curve(c, coefficients=[[1, 1, 1, 1]]), "one list of coefficients for each"),
        (lambda c: _curve(c, coefficients=[[1, 1, 1]] * 3), "lists of 4 numbers"),
        (lambda c: _curve(c, coefficients=[[1, 1, 1, -1]] * 3), "lists of 4 numbers"),
        (lambda c: _curve(c, coefficients=[[1, 1, 1, "1"]] * 3), "lists of 4 numbers"),
        (lambda c: _curve(c, coefficients=[[1] * 4, [1] * 4, [1] * 5]), "lists of 4 numbers"),
        (lambda c: _curve(c, coefficients=[[1] * 5] * 3), "lists of 4 numbers"),
        (lambda c: c["curves"]["lowrank/-/float32"].update(coefficients=[[1] * 4] * 3), "lists of 5 numbers"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(change: Any, message: str) -> None:
    content = json.loads(fit_table(points(), {"threads": 2}).to_json())
    change(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        TimingTable.from_json(json.dumps(content), source="mine.json")
    assert "mine.json" in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.exit_code == 3


def test_text_that_is_no_json_is_refused() -> None:
    for text in ("", "[1]", '{"curves": NaN}', "[" * 100_000):
        with pytest.raises(CheckpointError):
            TimingTable.from_json(text, source="mine.json")


def test_the_users_table_comes_first(tmp_path: Path) -> None:
    settings = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "APPDATA": str(tmp_path)}
    assert load_timings(settings).origin == "shipped with lowrank"
    path = user_path(settings)
    path.parent.mkdir(parents=True)
    path.write_text(fit_table(points(), {"cpu": "mine"}).to_json())
    assert load_timings(settings).host == {"cpu": "mine"}
    named = tmp_path / "named.json"
    with pytest.raises(StorageError, match="LOWRANK_TIMINGS"):
        load_timings(settings | {"LOWRANK_TIMINGS": str(named)})
    named.write_text(fit_table(points(), {"cpu": "named"}).to_json())
    assert load_timings(settings | {"LOWRANK_TIMINGS": str(named)}).host == {"cpu": "named"}
    named.write_bytes(b" " * (2 << 20))
    with pytest.raises(ResourceError):
        load_timings(settings | {"LOWRANK_TIMINGS": str(named)})
    named.unlink()
    named.mkdir()
    with pytest.raises(LowRankError):
        load_timings(settings | {"LOWRANK_TIMINGS": str(named)})


@pytest.mark.parametrize("route", SHIPPED)
def test_the_shipped_tables_know_every_kind_of_linear_layer(route: str, tmp_path: Path) -> None:
    table = load_timings({"HOME": str(tmp_path)}, route=route)
    assert table.host["route"] == route
    for dtype in ("float32", "bfloat16"):
        for kind, mode in (("dense", None), ("lowrank", None), ("int8", "int8"), ("int8", "float")):
            assert timing_key(kind, mode, dtype) in table.curves
            for rows in (1, 100, 100_000):
                taken = table.seconds(kind, mode, dtype, rows, 512, 512, 64 if kind == "lowrank" else None)
                assert taken is not None and 0.0 < taken < 60.0
    assert table.seconds("dense", None, "float64", 1, 8, 8) is None


def test_points_cover_the_grid() -> None:
    found = measure_points([(16, 32), (32, 16)], [1, 4], ["float32"], rounds=1, at_least=0.0)
    assert {(point.outputs, point.inputs, point.rows) for point in found} == {
        (o, i, n) for o, i in ((16, 32), (32, 16)) for n in (1, 4)
    }
    assert {point.key for point in found} == {
        timing_key(kind, mode, "float32")
        for kind, mode in (
            ("dense", None),
            ("lowrank", None),
            ("int8", "int8"),
            ("int8", "float"),
            ("lowrank-int8", "int8"),
            ("lowrank-int8", "float"),
        )
    }


def test_runs_are_interleaved_there_and_back() -> None:
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 2, 0.0)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert all(len(values) == 2 and min(values) > 0.0 for values in found.values())


def test_spread_of_one_value() -> None:
    assert spread([2.0]) == spread([2.0, 2.0, 2.0])


def test_host_facts_can_be_kept_in_a_table() -> None:
    table = fit_table(points(), host_facts())
    assert TimingTable.from_json(table.to_json(), source="x").host == table.host


@pytest.mark.parametrize("route", SHIPPED)
def test_the_studys_table_and_the_shipped_one_are_those_of_its_results(route: str) -> None:
    study = load_study("timings")
    results = results_of("timings", study.ENDINGS[route])
    assert results["host"]["route"] == route
    assert study.table_of(results).to_json() == SHIPPED[route].read_text()


def test_the_study_runs_and_leaves_the_shipped_table_alone(tmp_path: Path) -> None:
    before = [path.read_bytes() for path in SHIPPED.values()]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(STUDY.parents[1]), *sys.path])}
    environment |= {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(STUDY / "study.py"), "--smoke", "--threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in SHIPPED.values()] == before
    (folder,) = tmp_path.glob("timings_*")
    assert "Convolutions" in (folder / "table.md").read_text()
    table = TimingTable.from_json((folder / "timings.json").read_bytes(), source="timings.json")
    assert timing_key("conv-lowrank-int8", "int8", "float32") in table.curves
