"""``lowrank.benchmark`` and ``lowrank benchmark``: what is timed, what is marked, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state
from tiny_models import make_directory, make_text
from torch import Tensor, nn

import lowrank
import lowrank.analysis.benchmark as timing
from lowrank.analysis.stopwatch import Spread
from lowrank.cli import app as cli
from lowrank.errors import UsageError
from lowrank.layers import QuantizedEmbedding, QuantizedLinear, QuantizedLowRankLayer


class Sleepy(QuantizedLinear):
    """A layer whose forward takes at least two milliseconds."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return super().forward(x)


class Net(nn.Module):
    """An embedding, a layer called twice, a head, and a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.embed(ids)).relu_()))


def pair(kind: type[QuantizedLinear] = QuantizedLinear) -> tuple[Net, Net]:
    torch.manual_seed(0)
    dense = Net()
    small = Net()
    small.embed = QuantizedEmbedding.from_embedding(dense.embed)  # type: ignore[assignment]
    small.twice = kind.from_linear(dense.twice)  # type: ignore[assignment]
    small.head = QuantizedLowRankLayer.from_linear(dense.head, rank=2)  # type: ignore[assignment]
    small.unused = QuantizedLinear.from_linear(dense.unused)  # type: ignore[assignment]
    return dense, small


IDS = torch.arange(10).reshape(2, 5)


def test_every_compressed_layer_has_a_row_with_what_it_was_called_with() -> None:
    dense, small = pair()
    report = lowrank.benchmark(small, dense, inputs=[IDS], rounds=3, at_least=0.0)
    by_name = {row.name: row for row in report.rows}
    assert list(by_name) == ["embed", "twice", "head", "unused"]
    assert [(row.calls, row.rows) for row in report.rows] == [(1, 10), (2, 20), (1, 10), (0, 0)]
    head = by_name["head"]
    assert (head.kind, head.format, head.rank, head.activations) == ("QuantizedLowRankLayer", "lowrank-int8", 2, "int8")
    for name in ("embed", "twice", "head"):
        row = by_name[name]
        assert row.seconds is not None and row.dense_seconds is not None and row.speedup is not None
        assert 0.0 < row.seconds.lower_quartile <= row.seconds.median <= row.seconds.upper_quartile
    assert by_name["twice"].routes and not by_name["embed"].routes
    assert by_name["unused"].seconds is None and not by_name["unused"].slower
    assert report.speedup is not None and report.against_seconds is not None


def test_a_layer_that_got_slower_is_marked_everywhere() -> None:
    dense, small = pair(Sleepy)
    report = lowrank.benchmark(small, dense, inputs=[IDS], rounds=3, at_least=0.0)
    row = next(row for row in report.rows if row.name == "twice")
    assert row.slower and row.seconds is not None and row.seconds.median >= 0.004
    assert report.speedup is not None and report.speedup.median < 1.0
    assert "twice" in report.slower and "twice" in json.loads(report.to_json())["slower"]
    for text in (report.to_text(), report.to_markdown()):
        line = next(line for line in text.splitlines() if "twice" in line)
        assert "SLOWER" in line
        assert "The whole model got SLOWER." in text
        assert "not reached" in next(line for line in text.splitlines() if "unused" in line)


@pytest.mark.parametrize("batches", [1, 2])
def test_what_is_between_the_layers_has_a_row(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(runs: dict[str, object], rounds: int, at_least: float) -> dict[str, list[float]]:
        """Seconds that do not depend on the machine: of a layer, then of all batches, then of the first alone."""
        if "own" in runs:
            return {"own": [0.5], "original": [1.0]}
        whole = next(wholes)
        return {"model": [whole], "against": [whole - 3.0]}

    monkeypatch.setattr(timing, "interleaved", told)
    dense, small = pair()
    inputs = [IDS + k for k in range(batches)]
    wholes = iter([10.0] if batches == 1 else [30.0, 10.0])
    report = lowrank.benchmark(small, dense, inputs=inputs, rounds=1)
    # Three layers are reached; of the first batch, as the layers are, not of the whole pass.
    assert (report.rest, report.against_rest) == (8.5, 4.0)
    assert report.seconds.median == (10.0 if batches == 1 else 30.0)
    line = next(line for line in report.to_text().splitlines() if line.startswith("everything else"))
    assert "8.5 s" in line and "4 s" in line
    assert "Everything else, what is not in compressed layers, got SLOWER" in report.to_text()
    wholes = iter([10.0] * 2)
    assert lowrank.benchmark(small, inputs=inputs, rounds=1).against_rest is None


def test_json_holds_the_numbers_of_the_report() -> None:
    dense, small = pair()
    report = lowrank.benchmark(small, dense, inputs=[IDS, IDS[:1]], rounds=2, at_least=0.0)
    content = json.loads(report.to_json())
    assert content["seconds"] == vars(report.seconds)
    assert [row["name"] for row in content["rows"]] == [row.name for row in report.rows]
    assert content["rows"][1]["seconds"] == vars(report.rows[1].seconds)
    assert content["inputs"] == "2 batches a pass: 1 of 2x5, 1 of 1x5"
    assert content["host"]["threads"] == torch.get_num_threads()


def test_without_an_original_nothing_is_compared() -> None:
    _, small = pair()
    report = lowrank.benchmark(small, inputs=[IDS], rounds=1, at_least=0.0)
    assert report.speedup is None and report.against_seconds is None and report.slower == ()
    assert all(row.dense_seconds is None for row in report.rows)
    assert "slower" not in report.to_text().lower()


def test_models_stay_as_they_were() -> None:
    dense, small = pair()
    small.train()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    lowrank.benchmark(small, dense, inputs=[IDS], rounds=1, at_least=0.0)
    assert small.training and small.twice.training
    assert not any(module._forward_pre_hooks for module in small.modules())
    assert_same_state(small, before)


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5])
def test_rounds_that_mean_nothing_are_refused(rounds: object) -> None:
    with pytest.raises(UsageError, match="rounds"):
        lowrank.benchmark(nn.Sequential(nn.Linear(2, 2)), inputs=[torch.zeros(1, 2)], rounds=rounds)  # type: ignore[arg-type]


def test_units_of_the_table() -> None:
    from lowrank.analysis.benchmark import _time

    assert _time(Spread(2e-6, 1e-6, 3e-6)) == "2 (1-3) us"
    assert _time(Spread(0.25, 0.2, 0.3)) == "250 (200-300) ms"
    assert _time(Spread(2.5, 2.0, 3.0)) == "2.5 (2-3) s"


# the command


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("benchmark")
    make_directory(folder / "model")
    make_text(folder / "text.txt")
    arguments = ["compress", str(folder / "model"), "-o", str(folder / "small"), "--error-budget", "0.3", "-q"]
    assert cli.main(arguments) == 0
    return folder


def test_the_command_prints_a_table_and_writes_json(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = room / "found.json"
    arguments = ["benchmark", str(room / "small"), "--against", str(room / "model"), "--batch", "2", "--tokens", "6"]
    assert cli.main([*arguments, "--rounds", "2", "--json", str(out), "-q"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    content = json.loads(out.read_text())
    assert content["inputs"] == "1 batch a pass: 1 of 2x6"
    for row in content["rows"]:
        assert row["name"] in printed.out
    assert "whole model" in printed.out and content["speedup"]["median"] > 0.0


def test_the_command_reads_a_data_file(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "benchmark",
        str(room / "small"),
        "--data",
        str(room / "text.txt"),
        "--batch",
        "4",
        "--json",
        "-",
        "-q",
    ]
    assert cli.main([*arguments, "--rounds", "1"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content["inputs"].startswith("4 batches a pass:")
    assert content["against_seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "COMPRESSED"),
        (["{room}/nowhere"], 3, "nowhere"),
        (["{room}/small", "--tokens", "0"], 2, "tokens"),
        (["{room}/small", "--tokens", "5000"], 2, "--tokens"),
        (["{room}/small", "--batch", "0"], 2, "batch"),
        (["{room}/small", "--rounds", "0"], 2, "rounds"),
        (["{room}/small", "--json", "{room}"], 2, "--json"),
        (["{room}/small", "--data", "{room}/no.txt"], 3, "no.txt"),
        (["{room}/small", "--against", "{room}/text.txt"], 3, "text.txt"),
    ],
)
def test_the_command_refuses_in_one_line(
    room: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["benchmark", *(each.format(room=room) for each in arguments), "-q"]) == code
    printed = capfd.readouterr()
    assert printed.out == "" and message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_tuning_saves_a_table_that_plans_then_use(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank.analysis.tuning import measure_timings
    from lowrank.cli import benchmark as cli_benchmark
    from lowrank.compression.timings import load_timings

    small = {"shapes": [(16, 32), (32, 16)], "rows": [1], "dtypes": ["float32"], "rounds": 1, "at_least": 0.0}
    monkeypatch.setattr(cli_benchmark, "measure_timings", lambda progress: measure_timings(progress=progress, **small))
    path = tmp_path / "deep" / "mine.json"
    monkeypatch.setenv("LOWRANK_TIMINGS", str(path))
    assert cli.main(["benchmark", "--tune", "-q"]) == 0
    assert str(path) in capfd.readouterr().out
    assert load_timings().host["threads"] == torch.get_num_threads()
    assert [file.name for file in path.parent.iterdir()] == ["mine.json"]
    path.parent.chmod(0o555)
    before = path.read_bytes()
    monkeypatch.setenv("LOWRANK_TIMINGS", str(tmp_path / "text" / "mine.json"))
    (tmp_path / "text").write_text("a file where a directory would have to be")
    assert cli.main(["benchmark", "--tune", "-q"]) == 5
    path.parent.chmod(0o755)
    assert path.read_bytes() == before


def test_a_compressed_layer_is_not_taken_for_the_dense_one() -> None:
    dense, small = pair()
    other = Net()
    other.twice = QuantizedLowRankLayer.from_linear(dense.twice, rank=2)  # type: ignore[assignment]
    by_name = {row.name: row for row in lowrank.benchmark(small, other, inputs=[IDS], rounds=1, at_least=0.0).rows}
    assert by_name["twice"].dense_seconds is None and by_name["head"].dense_seconds is not None
