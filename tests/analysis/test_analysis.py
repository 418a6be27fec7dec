"""Analysis against spectra known beforehand, from modules and from files, one tensor in memory at a time."""

from __future__ import annotations

import builtins
import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix_with_spectrum
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.analysis.model import analyze_model
from lowrank.analysis.page import _Group, _spectra_chart, kinds
from lowrank.analysis.report import AnalysisReport
from lowrank.analysis.rows import AnalysisRow, size_error_curve
from lowrank.compression.compress import compress_model, plan_model
from lowrank.errors import CheckpointError, NumericsError, UsageError
from lowrank.io import TensorSource


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_with(sigma: list[float], out_features: int, in_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    values = torch.tensor(sigma, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(matrix_with_spectrum(out_features, in_features, values, generator()))
    return layer


class Small(nn.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 4)
        self.steep = linear_with([2.0**-i for i in range(16)], 24, 16)
        self.flat = linear_with([1.0] * 16, 16, 16)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.steep(x)[..., :16])  # type: ignore[no-any-return]


def by_name(report: AnalysisReport) -> dict[str, AnalysisRow]:
    return {row.name: row for row in report.rows}


# ---- one module


def test_numbers_of_a_prescribed_spectrum() -> None:
    row = by_name(analyze_model(Small()))["steep"]
    squares = [4.0**-i for i in range(16)]
    share = [sum(squares[: i + 1]) / sum(squares) for i in range(16)]
    assert row.ranks == {str(p): next(i + 1 for i in range(16) if share[i] >= p) for p in (0.9, 0.95, 0.99)}
    assert row.full_rank == 16
    assert row.break_even_rank == 24 * 16 / 40
    # float32 weights: singular values are good to a few eps of it.
    assert row.stable_rank == pytest.approx(sum(squares), rel=1e-5)
    assert row.errors is not None
    for size, rank in (("0.25", 2), ("0.5", 4), ("0.75", 7)):
        assert row.errors[size] == pytest.approx(math.sqrt(1 - share[rank - 1]), rel=1e-4)
    sigma = torch.tensor([2.0**-i for i in range(16)], dtype=torch.float64)
    entropy = -float((sigma / sigma.sum() * (sigma / sigma.sum()).log()).sum())
    assert row.effective_rank == pytest.approx(math.exp(entropy), rel=1e-5)
    assert row.spectrum[0] == 1.0
    assert row.spectrum[-1] == pytest.approx(2.0**-15, rel=1e-2)
    assert row.energy[-1] == pytest.approx(1.0, rel=1e-12)
    assert row.parameters == 24 * 16 + 24, "the bias belongs to the layer"


def test_every_module_with_weights_has_a_row_and_the_skipped_a_reason() -> None:
    rows = by_name(analyze_model(Small()))
    assert set(rows) == {
        "embed", "conv", "norm", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "steep", "flat", "head", "ids",
    }  # fmt: skip
    reasons = {name: row.reason for name, row in rows.items() if not row.analysed}
    assert reasons == {
        "norm": "no matrix",
        "head": "tied with embed",
        "ids": "int64 is not a floating dtype that can be factored",
    }
    assert rows["head"].parameters == 0
    assert rows["conv"].shape == (6, 3, 3, 3)
    assert rows["conv"].full_rank == 6


def test_totals_count_every_element_once() -> None:
    model = Small()
    report = analyze_model(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert report.totals["parameters"] == parameters == sum(row.parameters for row in report.rows)
    assert report.totals["buffers"] == 5
    assert "with 5 elements in buffers" in report.summary()[0]
    assert report.totals["bytes"] == sum(p.nbytes for p in model.parameters()) + 40
    assert report.totals["analysed"] == sum(row.analysed for row in report.rows)


def test_verdicts_are_what_compress_plans_for_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        linear_with([1.0] * 8 + [1e-4] * 56, 64, 64),
        nn.Linear(64, 64),
        linear_with([1.0] * 4 + [0.0] * 60, 64, 64),
        nn.Linear(64, 3),
    )
    report = analyze_model(model)
    for budget in (0.02, 0.05, 0.1):
        plan = plan_model(model, error_budget=budget, metric="weight", progress=False)
        wanted = {entry.name: (entry.format, entry.rank) for entry in plan.entries}
        said = {row.name: (row.plans or {})[str(budget)] for row in report.rows}
        assert {name: (each["format"], each["rank"]) for name, each in said.items()} == wanted
        assert report.totals["plans"][str(budget)]["size_ratio"] == pytest.approx(
            (report.totals["bytes"] - sum(p.nbytes for p in model.parameters()) + plan.bytes) / report.totals["bytes"]
        )
    assert report.rows[2].verdict == "lowrank-int8 r4"
    assert "data tell" in " ".join(report.notes)


def test_verdicts_speak_only_of_what_can_be_replaced() -> None:
    bound = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(bound, nn.Linear(32, 32))
    model.table = nn.Parameter(torch.randn(8, 8, generator=generator()))
    model.register_buffer("positions", torch.randn(8, 8, generator=generator()))
    report = analyze_model(model)
    rows = by_name(report)
    assert rows["0.parametrizations.weight.original1"].verdict.startswith("cannot be replaced: parametrized")
    assert rows["table"].verdict == "cannot be replaced: no layer of a kind that is known"
    assert rows["positions"].reason == "a buffer: not a parameter, left as it is"
    assert report.totals["plans"]["0.1"]["formats"] == {"int8": 1}
    nothing = analyze_model(nn.Sequential(bound))
    assert nothing.verdict == "no layer that can be replaced"
    assert "no layer that can be compressed" in nothing.notes[0]


def test_budgets_are_checked_and_may_be_none() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    assert set(analyze_model(model, budgets=[0.3]).totals["plans"]) == {"0.3"}
    none = analyze_model(model, budgets=())
    assert (none.rows[0].verdict, none.rows[0].plans, none.totals["plans"]) == ("", None, {})
    for budgets in ("5%", (0.0,), (math.nan,), (True,), 0.1):
        with pytest.raises(UsageError, match="budgets"):
            analyze_model(model, budgets=budgets)  # type: ignore[arg-type]


def test_a_compressed_model_is_said_to_be_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    result = compress_model(model, error_budget=0.1, ignore=["1"], progress=False)
    report = analyze_model(result.model)
    assert report.totals["compressed"] == {"int8": 1}
    assert "The model is compressed already (int8 1)" in report.to_text(200)
    assert [row.reason for row in report.rows] == ["already compressed: int8", None]
    result.save(tmp_path / "out")
    assert analyze_model(tmp_path / "out").totals["compressed"] == {"int8": 1}


def test_numbers_agree_with_their_nouns() -> None:
    assert (
        analyze_model(nn.Sequential(nn.Linear(2, 2)))
        .summary()[0]
        .startswith("1 of 1 layer holds a matrix: 4 of 6 parameters")
    )


def test_edges_of_shape_and_kind() -> None:
    model = nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 1), nn.Linear(1, 1), nn.Conv1d(4, 4, 3, groups=4))
    model.append(nn.Linear(3, 3, device="meta"))
    model.append(nn.LazyLinear(3))
    model.append(nn.Linear(4, 4, dtype=torch.float64))
    model.append(nn.Linear(4, 4, dtype=torch.bfloat16))
    report = analyze_model(model)
    rows = by_name(report)
    assert [rows[name].full_rank for name in "012"] == [1, 1, 1]
    assert rows["3"].shape == (4, 1, 3)
    assert rows["4.weight" if "4.weight" in rows else "4"].reason == "on the meta device: it holds no numbers"
    assert "lazy" in str(rows["5"].reason)
    assert rows["6"].dtype == "float64"
    assert rows["7"].dtype == "bfloat16"
    for text in (report.to_text(120), report.to_markdown(), report.to_json(), report.to_html()):
        assert "nan" not in text.replace("nano", "").lower()


def test_nothing_to_analyse_is_reported_not_raised() -> None:
    report = analyze_model(nn.Sequential(nn.ReLU()))
    assert report.rows == []
    assert "0 of 0 layers" in report.to_text(80)
    assert "0 of 0 layers" in report.to_html()


def test_conv1d_of_transformers_is_turned() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 6
            self.weight = nn.Parameter(torch.randn(4, 6, generator=generator()))
            self.bias = nn.Parameter(torch.zeros(6))

    assert analyze_model(nn.Sequential(Conv1D())).rows[0].shape == (6, 4)


def test_non_finite_weights_name_layer_and_index() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[2, 3] = math.nan
    with pytest.raises(NumericsError, match=r"layer 0.*2, 3"):
        analyze_model(model)


def test_counters_of_batch_norm_are_part_of_its_row() -> None:
    rows = analyze_model(nn.Sequential(nn.BatchNorm1d(4))).rows
    assert [(row.name, row.reason, row.parameters) for row in rows] == [("0", "no matrix", 8)], (
        "as torch counts: buffers apart"
    )


def test_the_data_move_the_verdict_as_they_move_the_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    inputs = torch.zeros(128, 64)
    inputs[:, :6] = torch.randn(128, 6, generator=generator())
    assert analyze_model(model).rows[0].verdict == "int8"
    report = analyze_model(model, calibration=iter([inputs]))
    plan = plan_model(model, calibration=[inputs], error_budget=0.05, progress=False)
    assert report.totals["plans_metric"] == "output"
    assert (report.rows[0].plans or {})["0.05"]["rank"] == plan.entry("0").rank
    assert "lowrank-int8" in report.verdict


# ---- ignore, energy, kinds of input


def test_ignored_layers_are_listed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    rows = by_name(analyze_model(model, ignore=["0"]))
    assert {name: row.reason for name, row in rows.items()} == {"0.0": "ignored", "0.1": "ignored", "1": None}


def test_a_pattern_that_matches_nothing_lists_near_misses() -> None:
    with pytest.raises(UsageError, match=r"'stepe'.*steep"):
        analyze_model(Small(), ignore=["stepe"])


@pytest.mark.parametrize("energy", [(), (0.0,), (1.5,), (float("nan"),), (True,), "0.9", 0.9])
def test_energies_outside_their_range_are_refused(energy: Any) -> None:
    with pytest.raises(UsageError, match="energy"):
        analyze_model(Small(), energy=energy)


def test_other_energies_name_their_columns() -> None:
    report = analyze_model(Small(), energy=[0.5, 1.0])
    assert set(by_name(report)["flat"].ranks or {}) == {"0.5", "1.0"}
    assert by_name(report)["flat"].ranks == {"0.5": 8, "1.0": 16}
    assert "r50" in report.to_text(160)
    assert "r100" in report.to_text(160)


@pytest.mark.parametrize("model", [None, 3, torch.zeros(2, 2)])
def test_other_things_are_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="model"):
        analyze_model(model)


# ---- calibration


def test_calibration_shows_what_the_data_uses() -> None:
    model = nn.Sequential(linear_with([1.0] * 16, 16, 16))
    inputs = torch.zeros(64, 16)
    inputs[:, :3] = torch.randn(64, 3, generator=generator())
    report = analyze_model(model, calibration=[inputs])
    row = report.rows[0]
    assert row.ranks is not None
    assert row.data_ranks is not None
    assert row.ranks["0.99"] == 16
    assert row.data_ranks["0.99"] <= 3, "inputs of three directions need no more of the weight"
    assert row.tokens == 64
    assert row.data_errors is not None
    assert row.data_errors["0.5"] == pytest.approx(0.0, abs=1e-6)
    assert "r99 data" in report.to_markdown()
    assert "r99 data" not in analyze_model(model).to_markdown()


def test_few_tokens_are_noted() -> None:
    report = analyze_model(nn.Sequential(nn.Linear(16, 16)), calibration=[torch.randn(5, 16, generator=generator())])
    assert "the fewest 5" in report.notes[0]
    assert report.notes[0].startswith("1 layer saw")
    assert any(note.startswith("compressing would refuse this: calibration: 5 samples") for note in report.notes)
    assert report.totals["plans_metric"] == "weight", "too few to probe with"
    assert report.notes[0] in report.to_text(400)


def test_calibration_needs_a_module(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration"):
        analyze_model(tmp_path, calibration=[torch.zeros(1)])


# ---- files


def test_a_file_and_a_module_agree(tmp_path: Path) -> None:
    model = Small()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    of_file, of_module = by_name(analyze_model(tmp_path)), by_name(analyze_model(model))
    assert set(of_file) == set(of_module) - {"head"}
    for name, row in of_file.items():
        other = of_module[name]
        same = ("shape", "parameters", "bytes", "dtype", "ranks", "errors", "reason", "spectrum")
        assert {key: getattr(row, key) for key in same} == {key: getattr(other, key) for key in same}
    # A file does not say that a recurrent layer reads these two.
    assert {name for name in of_file if of_file[name].verdict != of_module[name].verdict} == {
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    }
    single = analyze_model(tmp_path / "model.safetensors")
    assert single.to_json().replace("model.safetensors", tmp_path.name) == analyze_model(str(tmp_path)).to_json()


def test_shards_are_read_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{i}.weight" for i in (0, 2, 10, 1)]
    for part, group in (("a", names[:2]), ("b", names[2:])):
        save_file({name: torch.randn(12, 8, generator=generator()) for name in group}, tmp_path / f"{part}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{'a' if name in names[:2] else 'b'}.safetensors" for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    handed_out: list[weakref.ref[Tensor]] = []
    original = TensorSource.read

    def read(self: TensorSource, name: str) -> Tensor:
        gc.collect()
        assert [ref for ref in handed_out if ref() is not None] == [], "the tensor before must be gone by now"
        tensor = original(self, name)
        handed_out.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorSource, "read", read)
    report = analyze_model(tmp_path)
    assert [row.name for row in report.rows] == ["layers.0", "layers.1", "layers.2", "layers.10"], "in reading order"
    assert len(handed_out) == 4, "each tensor is read once"


def test_integers_and_vectors_of_a_file_are_listed(tmp_path: Path) -> None:
    tensors = {
        "a.codes": torch.zeros(4, 4, dtype=torch.int8),
        "a.scale": torch.ones(4),
        "b.weight": torch.ones(4, 4),
        "guard.weight": torch.zeros(0, 4),
        "c": torch.ones(3, 3),
        "f8": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    rows = by_name(analyze_model(tmp_path / "x.safetensors"))
    assert {name: row.reason for name, row in rows.items()} == {
        "a": "no matrix",
        "a.codes": "int8 is not a floating dtype that can be factored",
        "b": None,
        "c": None,
        "f8": "float8_e4m3fn is not a floating dtype that can be factored",
        "guard": "empty",
    }


def test_damaged_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="broken"):
        analyze_model(tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError):
        analyze_model(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        analyze_model(tmp_path / "absent.safetensors")


def test_hostile_tensor_names_are_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|\x1b[31m.weight"
    save_file({name: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    report = analyze_model(tmp_path / "x.safetensors")
    assert report.to_html().count("<script>") == 1
    for text in (report.to_text(140), report.to_markdown(), report.to_html(), report.to_json()):
        assert "\x1b" not in text


# ---- the whole model


def brute_force(spectra: list[tuple[Tensor, int, int, int]]) -> list[tuple[float, float]]:
    """Every division of ranks among two layers: (size, error)."""
    whole = sum(rows * columns * width for _, rows, columns, width in spectra)
    energy = sum(float(sigma.square().sum()) for sigma, *_ in spectra)
    choices = []
    for sigma, rows, columns, width in spectra:
        cells = [(rows * columns * width, 0.0)]
        cells += [(r * (rows + columns) * width, float(sigma[r:].square().sum())) for r in range(sigma.numel() + 1)]
        choices.append(cells)
    return [((a + c) / whole, math.sqrt((b + d) / energy)) for a, b in choices[0] for c, d in choices[1]]


def test_curve_lies_on_the_lower_hull_of_all_divisions() -> None:
    sigmas = [torch.rand(8, generator=generator(seed), dtype=torch.float64).sort(descending=True)[0] for seed in (1, 2)]
    spectra = [(3 * sigmas[0], 8, 20, 4), (sigmas[1] ** 3, 8, 8, 2)]
    every = brute_force(spectra)
    curve = size_error_curve(spectra)
    assert len(curve) > 5
    assert [size for size, _ in curve] == sorted(size for size, _ in curve)
    for size, error in curve:
        assert any(abs(size - a) < 1e-9 and abs(error - b) < 1e-9 for a, b in every), "a division that exists"
        assert not any(a < size - 1e-9 and b < error - 1e-9 for a, b in every), "none is better in both"


def test_error_at_size_keeps_within_the_size() -> None:
    report = analyze_model(Small())
    curve = report.totals["curve"]
    for size, error in report.totals["error_at_size"].items():
        assert error == min(e for s, e in curve if s <= float(size))
    errors = list(report.totals["error_at_size"].values())
    assert errors == sorted(errors, reverse=True)


# ---- renderings


def test_json_is_deterministic_and_complete() -> None:
    torch.manual_seed(0)
    model = Small()
    text = analyze_model(model).to_json()
    assert analyze_model(model).to_json() == text
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert {row["name"] for row in data["rows"]} == set(by_name(analyze_model(model)))
    assert data["format_version"] == 1


@pytest.mark.parametrize("width", [100, 120, 160])
def test_terminal_table_fits_and_names_every_layer(width: int) -> None:
    report = analyze_model(Small())
    text = report.to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert all(row.name in text for row in report.rows)


def test_save_writes_three_files(tmp_path: Path) -> None:
    folder = analyze_model(Small()).save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.html", "analysis.json", "analysis.md"]
    assert (folder / "analysis.html").read_text(encoding="utf-8").count("<svg") == 4


def test_progress_stays_silent_when_it_is_quick(capfd: pytest.CaptureFixture[str]) -> None:
    analyze_model(Small())
    assert capfd.readouterr() == ("", "")


def test_a_module_used_twice_is_ignored_by_either_name() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = model.first
    rows = analyze_model(model, ignore=["second"]).rows
    assert [(row.name, row.reason) for row in rows] == [("first", "ignored")]


# ---- convolutions in the metric of their patches


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_patches_are_the_inputs_of_a_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 3, **options)
    image = torch.randn(4, 3, 12, 12, generator=generator(5))
    row = analyze_model(nn.Sequential(conv), calibration=[image]).rows[0]
    # All outputs of the layer, bias left out, have the singular values of W Σ^½ times √(number of patches).
    outputs = (conv(image) - conv.bias[:, None, None]).detach().double().transpose(0, 1).flatten(1)
    sigma = torch.linalg.svdvals(outputs)
    share = torch.cumsum(sigma.square(), 0) / sigma.square().sum()
    assert row.tokens == outputs.shape[1]
    assert row.data_ranks == {str(level): int((share < level).sum()) + 1 for level in (0.9, 0.95, 0.99)}
    shares = sigma / sigma.sum()
    assert row.data_effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)


def test_conv1d_has_patches_and_grouped_ones_have_none() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2))
    report = analyze_model(model, calibration=[torch.randn(16, 4, 20, generator=generator(2))])
    assert report.rows[0].data_ranks is not None
    assert report.rows[1].data_ranks is None
    assert report.rows[1].ranks is not None


# ---- the page


def deep() -> nn.Module:
    torch.manual_seed(1)

    def block() -> nn.Module:
        return nn.ModuleDict({"query": nn.Linear(12, 12), "dense": nn.Linear(12, 24)})

    return nn.ModuleDict({"table": nn.Embedding(40, 12), "layers": nn.ModuleList([block() for _ in range(3)])})


def test_layers_of_one_part_are_one_kind() -> None:
    rows = analyze_model(deep()).rows
    assert {name: len(members) for name, members in kinds(rows).items()} == {"table": 1, "query": 3, "dense": 3}
    alone = kinds([row for row in rows if row.name == "layers.0.query"])
    assert list(alone) == ["query"]
    assert list(kinds([AnalysisRow("", "Linear", (2, 2), 4, 16), AnalysisRow("0", "Linear", (2, 2), 4, 16)])) == [
        "Linear",
        "*",
    ]


def test_the_page_stands_alone_and_takes_the_pages_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    report = analyze_model(deep())
    # The charts of pages need no extra.
    monkeypatch.setattr(builtins, "__import__", without)
    page = report.to_html()
    assert page.count('<svg class="plot"') == 4
    assert page.count("<polyline") == 1 + 2 * 7, "the curve, and for each layer its spectrum and its energy"
    assert page.count("<circle") == 7
    for kind in ("table (1)", "query (3)", "dense (3)"):
        assert kind in page
    body = page[page.index("<main>") :]
    assert not re.search(r"#[0-9a-f]{6}|<style|url\(|src=|href=|http", body), "nothing from outside, no fixed colour"
    assert "var(--s1)" in body
    assert page == analyze_model(deep()).to_html(), "the same input gives the same page"


def test_lines_end_below_the_scale_of_spectra() -> None:
    row = AnalysisRow(
        "a",
        "Linear",
        (4, 4),
        16,
        64,
        full_rank=4,
        effective_rank=2.0,
        spectrum=(1.0, 1e-3, 1e-6, 1e-9),
        energy=(1.0,) * 4,
    )
    chart = _spectra_chart([_Group("a", "1", [row])])
    path = re.search(r'points="([^"]*)"', chart)
    assert path is not None
    assert len(path.group(1).split()) == 3, "up to the first value below 1e-4"
    for text in ("10⁰", "10⁻⁴"):
        assert text in chart


def test_the_verdict_stands_beside_the_name() -> None:
    page = analyze_model(deep()).to_html()
    heads = re.findall(r"<th [^>]*>([^<]*)</th>", page)
    assert heads[:2] == ["layer", "verdict"]
    for title in (
        "shape",
        "parameters",
        "r90",
        "r95",
        "r99",
        "eff.",
        "stable",
        "num.",
        "noise",
        "even",
        "err 25%",
        "err 50%",
        "err 75%",
    ):
        assert title in heads
