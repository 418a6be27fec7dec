"""``objective="latency"``: seconds are the price, nothing slower than dense is taken, and the plan says by which table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from tiny_models import make_directory, make_text
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.checkpoint import load_model
from lowrank.cli.app import main
from lowrank.compression import formats
from lowrank.compression.compress import CompressionResult, compress_model, plan_model
from lowrank.compression.latency import Speed, record_calls
from lowrank.compression.layer_data import LayerData
from lowrank.compression.plan import Plan
from lowrank.compression.timings import Curve, TimingTable
from lowrank.errors import BudgetError, CheckpointError, UsageError
from lowrank.layers import CompressedLayer
from lowrank.targets.survey import survey

# Seconds per call, input, output and weight; or per call, input, output, rank component and weight.
DENSE, INT8, FACTORED = (0.0, 0.0, 0.0, 1e-9), (2e-6, 0.0, 0.0, 1e-10), (3e-6, 0.0, 0.0, 0.0, 1e-10)


def table(**changes: tuple[float, ...]) -> TimingTable:
    """Dense costs 1 ns a weight; rounded layers a tenth of it and a fixed cost of 2 and 3 us."""
    lines: Mapping[str, tuple[float, ...]] = {
        "dense/-/float32": DENSE,
        "int8/int8/float32": INT8,
        "int8/float/float32": tuple(3 * each for each in INT8),
        "lowrank/-/float32": tuple(10 * each for each in FACTORED),
        "lowrank-int8/int8/float32": FACTORED,
        "lowrank-int8/float/float32": tuple(3 * each for each in FACTORED),
    } | changes
    return TimingTable(
        {"cpu": "made up", "threads": 1, "route": "none"}, {k: Curve((1, 10**6), (v, v)) for k, v in lines.items()}, {}
    )


@pytest.fixture(autouse=True)
def _made_up_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(table(), tmp_path, monkeypatch)


def install(given: TimingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timings.json"
    path.write_text(given.to_json())
    monkeypatch.setenv("LOWRANK_TIMINGS", str(path))


def model() -> nn.Sequential:
    """A wide layer, one so small that int8's fixed cost is more than the whole of it, a middling one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 96)).eval()


DATA = torch.randn(256, 96, generator=seeded(1))


def compress(net: nn.Module | None = None, budget: float = 0.2, **options: Any) -> CompressionResult:
    return compress_model(
        net or model(), error_budget=budget, calibration=[DATA], objective="latency", progress=False, **options
    )


def test_only_layers_that_get_faster_by_the_table_are_replaced() -> None:
    result = compress()
    assert [isinstance(layer, CompressedLayer) for layer in result.model] == [True, False, False, False, False]
    assert result.plan.entry("2").format == result.plan.entry("4").format == "dense"
    totals = result.report.totals
    assert totals["error_upper"] <= 0.2
    dense = 1e-9 * (96 * 128 + 128 * 8 + 8 * 96)
    assert totals["predicted_seconds_dense"] == pytest.approx(dense)
    assert totals["predicted_seconds"] < dense
    assert totals["predicted_speedup"] == pytest.approx(dense / totals["predicted_seconds"])


def test_the_plan_and_the_report_name_the_table_and_the_rows() -> None:
    result = compress()
    assert result.plan.metadata["objective"] == "latency"
    assert "made up" in result.plan.metadata["timings"]
    assert any("at 256 rows a call" in note for note in result.report.notes)
    again = type(result.plan).from_json(result.plan.to_json())
    assert again == result.plan


def test_a_table_in_which_dense_wins_leaves_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(table(**{"dense/-/float32": (0.0, 0.0, 0.0, 1e-13)}), tmp_path, monkeypatch)
    with pytest.raises(BudgetError, match="nothing could be compressed"):
        compress()


def test_the_faster_plan_is_taken_though_a_smaller_one_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_factors = dict.fromkeys(("lowrank/-/float32", "lowrank-int8/int8/float32"), (1.0, 0.0, 0.0, 0.0, 0.0))
    install(table(**slow_factors, **{"lowrank-int8/float/float32": (1.0, 0.0, 0.0, 0.0, 0.0)}), tmp_path, monkeypatch)
    low_rank = model()
    with torch.no_grad():
        low_rank[0].weight.copy_(torch.outer(torch.linspace(-1, 1, 128), torch.linspace(0.5, 1, 96)) / 8)
    small = compress_model(low_rank, error_budget=0.2, calibration=[DATA], progress=False)
    assert small.plan.entry("0").rank is not None
    fast = compress(low_rank)
    assert (fast.plan.entry("0").format, fast.plan.entry("0").activations) == ("int8", "int8")


def test_a_dtype_without_timings_stays_dense_and_is_named() -> None:
    with pytest.raises(BudgetError, match="nothing could be compressed"):
        compress_model(
            model().double(), error_budget=0.2, calibration=[DATA.double()], objective="latency", progress=False
        )
    mixed = nn.Sequential(
        nn.Linear(96, 128), nn.Tanh(), nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(512, 96)
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mixed.eval()

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.body):
                x = layer(x[:, None] if index == 2 else x)
            return x

    result = compress(Net())
    assert type(result.model.body[2]) is nn.Conv1d  # type: ignore[index, union-attr]
    assert any("no timings" in note and "body.2" in note for note in result.report.notes)


def test_an_override_is_obeyed_though_it_is_slower() -> None:
    result = compress(overrides={"2": "int8"})
    assert result.plan.entry("2").format == "int8"


def test_both_budgets_bind() -> None:
    net = model()
    with torch.no_grad():
        # Of rank 30: as factors smaller than as int8, but slower by the table.
        left, right = (torch.randn(*shape, generator=seeded(7)) for shape in ((128, 30), (30, 96)))
        net[0].weight.copy_(left @ right / 60)
    free = compress(net)
    assert free.plan.entry("0").format == "int8"
    ratio = free.report.totals["size_ratio"]
    tight = compress(net, size_budget=ratio * 0.9)
    assert tight.plan.entry("0").format == "lowrank-int8"
    assert tight.report.totals["size_ratio"] <= ratio * 0.9
    assert tight.report.totals["predicted_seconds"] > free.report.totals["predicted_seconds"]


def test_a_plan_by_prediction_alone_is_priced_too() -> None:
    plan = plan_model(model(), error_budget=0.2, calibration=[DATA], objective="latency", progress=False)
    assert plan.metadata["objective"] == "latency"
    assert plan.entry("2").format == "dense"


def test_latency_needs_an_error_budget_and_data() -> None:
    with pytest.raises(UsageError, match="error_budget"):
        compress_model(model(), size_budget=0.5, calibration=[DATA], objective="latency")
    with pytest.raises(UsageError, match="calibration"):
        compress_model(model(), error_budget=0.5, objective="latency")


def test_the_weight_metric_may_be_planned_for_speed() -> None:
    result = compress(metric="weight")
    assert result.plan.entry("0").format != "dense" and result.plan.entry("2").format == "dense"
    assert result.report.totals["error_upper"] <= 0.2


def test_calls_are_counted_with_their_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.layer = nn.Linear(3, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.layer(self.table(ids))[:, :1])

    net = Twice()
    modules = {"table": net.table, "layer": net.layer}
    batches = [Batch((torch.zeros(2, 4, dtype=torch.long),)), Batch((torch.zeros(1, 4, dtype=torch.long),))]
    calls = record_calls(net, batches, modules)
    assert calls == {"table": {4: 0.5, 8: 0.5}, "layer": {1: 0.5, 2: 0.5, 4: 0.5, 8: 0.5}}
    assert not net.layer._forward_pre_hooks


def test_convolutions_count_positions_and_are_priced_by_their_own_curves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 5, 3, groups=5)).eval()
    calls = record_calls(net, [Batch((torch.zeros(4, 3, 8, 8),))], {"0": net[0], "1": net[1]})
    assert calls == {"0": {4 * 4 * 4: 1.0}, "1": {4 * 2 * 2: 1.0}}
    curve = Curve((64,), ((0.0, 0.0, 0.0, 1e-9),))
    known = TimingTable(
        {}, {"conv-dense/-/float32": curve, "dense/-/float32": Curve((1,), ((1.0, 0.0, 0.0, 0.0),))}, {}
    )
    plain, grouped = (LayerData(target) for target in survey(net).targets)
    speed = Speed(known, calls)
    assert speed.seconds(plain, formats.DENSE) == pytest.approx(5 * 27 * 1e-9)
    assert speed.seconds(plain, formats.INT8.spec("int8")) is None
    assert speed.seconds(grouped, formats.DENSE) is None


def test_seconds_add_up_over_calls_and_lookups_are_free() -> None:
    net = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16, bias=False))
    net[1].weight = net[0].weight
    (target,) = survey(net).targets
    data = LayerData(target)
    speed = Speed(table(), {"1": {1: 2.0}})
    assert speed.seconds(data, formats.DENSE) == pytest.approx(2 * 16 * 12 * 1e-9)
    assert speed.seconds(data, formats.INT8.spec("int8")) == pytest.approx(2 * (2e-6 + 16 * 12 * 1e-10))
    # Factors make the look-up a product.
    assert speed.seconds(data, formats.LOWRANK_INT8.spec(2, None, "int8")) is None


def test_no_planned_layer_is_slower_than_dense_by_the_table() -> None:
    result = compress(budget=0.4)
    found = {target.name: LayerData(target) for target in survey(model()).targets}
    speed = Speed(table(), {name: {256: 1.0} for name in found})
    assert {entry.name for entry in result.plan.entries} == found.keys() and found
    for entry in result.plan.entries:
        planned, dense = (
            speed.seconds(found[entry.name], entry.spec),
            speed.seconds(found[entry.name], formats.DENSE),
        )
        assert planned is not None and dense is not None and planned <= dense


def test_the_command_line_plans_for_speed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    source, text, out = make_directory(tmp_path / "model"), make_text(tmp_path / "text.txt"), tmp_path / "fast"
    arguments = ["compress", str(source), "--objective", "latency", "-q", "--error-budget", "0.3"]
    assert main([*arguments, "-o", str(out)]) == 2
    assert "calibration" in capfd.readouterr().err
    assert main([*arguments, "-o", str(out), "--calibration", str(text), "--batch-size", "8"]) == 0
    assert "objective latency: by timings" in capfd.readouterr().out
    plan = Plan.from_json((out / "plan.json").read_text())
    assert plan.metadata["objective"] == "latency"
    assert isinstance(load_model(out), nn.Module)


def test_a_damaged_table_stops_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    monkeypatch.setenv("LOWRANK_TIMINGS", str(path))
    with pytest.raises(CheckpointError, match=r"broken\.json"):
        compress()
