"""What the report says of several outputs, of what varies, of numbers near the budget, and why layers stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.metrics import KL, OUTPUT
from lowrank.compression.candidates import Candidate, LayerChoices
from lowrank.compression.formats import DENSE
from lowrank.compression.options import Options
from lowrank.compression.reasons import reasons_for_dense
from lowrank.compression.report import CompressionReport
from lowrank.layers.spec import LayerSpec
from lowrank.reporting.text import beside, rounded_up


def batches(features: int = 32, count: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, features) for _ in range(count)]


def compress(model: nn.Module, budget: float = 0.05, **options: Any) -> CompressionReport:
    options.setdefault("calibration", batches())
    return lowrank.compress_model(model.eval(), error_budget=budget, progress=False, **options).report


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.box, self.score = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.body(x))
        return {"box": self.box(hidden), "score": torch.relu(self.score(hidden)) ** 2}


def test_every_output_is_within_the_budget_and_the_report_says_how_many() -> None:
    model, held = Detector(), torch.randn(512, 32)
    result = lowrank.compress_model(model, error_budget=0.05, calibration=batches(), progress=False)
    report = result.report
    assert not any("does not depend on" in note for note in report.notes)
    assert set(report.totals["outputs"]) == {"box", "score"}
    for item in report.totals["outputs"].values():
        assert 0.0 < item["error"] <= item["upper"] <= 0.05
    with torch.no_grad():
        mine, theirs = result.model(held), model(held)
    for name in ("box", "score"):
        assert float((mine[name] - theirs[name]).norm() / theirs[name].norm()) < 0.05
    for text in (report.to_text(), report.to_markdown(), report.to_html()):
        flat = " ".join(text.split())
        assert "2 outputs were measured" in flat and "Pooled over 64 samples" in flat and "worst tenth" in flat


def test_a_classifier_is_told_how_many_labels_stay() -> None:
    torch.manual_seed(0)
    report = compress(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)))
    assert 0.0 < report.totals["top1_unchanged"] <= 1.0 and "(top-1) is unchanged in" in report.to_text().replace(
        "\n", " "
    )
    assert "top1_unchanged" not in compress(Detector()).totals


def test_an_output_that_is_mostly_constant_is_said_loudly_and_can_be_promised() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        model[2].bias += 1000.0
    report = compress(model, 0.01)
    assert any("mostly constant" in line for line in report.summary())
    assert report.totals["error_of_variation"] > 10 * report.totals["error_measured"]
    result = lowrank.compress_model(model, error_budget=0.05, metric="variation", calibration=batches(), progress=False)
    x = torch.randn(2048, 32)
    with torch.no_grad():
        theirs, mine = model(x), result.model(x)
    assert float((mine - theirs).norm() / (theirs - theirs.mean(dim=0)).norm()) < 0.06
    assert "error of what varies in the output" in result.report.summary()[0]


class Mine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flip(-1), self.weight, self.bias)


def test_a_reason_stands_in_full_wherever_the_report_is_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    for index in range(3):
        model.add_module(f"encoder_block_number_{index}_attention_output_projection", Mine(32, 32))
    model.add_module("head", nn.Linear(32, 32))
    report = compress(model, 0.1)
    left = [row for row in report.rows if not row.compressed and row.reason]
    for row in left:
        assert row.reason is not None
        for text in (report.to_text(), report.to_markdown()):
            assert row.reason in " ".join(text.split())


def layer(*candidates: Candidate) -> LayerChoices:
    return LayerChoices("a", "linear", (8, 8), (Candidate(DENSE, 256, 0.0), *candidates))


INT8 = LayerSpec("int8", bits=8, activations="int8")


@pytest.mark.parametrize(
    ("choices", "options", "said"),
    [
        (layer(Candidate(INT8, 80, 0.16**2)), {"error_budget": 0.1}, "int8 costs 16 %, the budget is 10 %"),
        (layer(Candidate(INT8, 80, 0.1004**2)), {"error_budget": 0.1}, "int8 costs 10.04 %, the budget is 10 %"),
        (layer(Candidate(INT8, 80, 0.02**2)), {"error_budget": 0.0125}, "int8 costs 2.0 %, the budget is 1.25 %"),
        (layer(Candidate(INT8, 80, 1e300)), {"error_budget": 0.1}, "int8 costs more than 1000 %, the budget is 10 %"),
        (layer(), {"error_budget": 0.1}, "no format makes it smaller"),
        (
            layer(Candidate(INT8, 80, 0.02**2)), {"error_budget": 0.1},
            "int8 alone costs 2.0 % of the budget of 10 %, which saves more in other layers",
        ),
        (
            layer(Candidate(INT8, 80, 0.02**2, 300.0)), {"error_budget": 0.1, "objective": "latency"},
            "no format makes it faster",
        ),
        (
            layer(Candidate(INT8, 80, 0.02**2)), {"size_budget": 0.5},
            "int8 would cost an error of 2.0 %; the size budget is met without it",
        ),
    ],
)  # fmt: skip
def test_a_reason_is_one(choices: LayerChoices, options: dict[str, Any], said: str) -> None:
    assert reasons_for_dense([choices], None, 1.0, Options(metric="output", **options)) == {"a": said}


def test_a_refusal_tells_what_was_measured_of_each_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(lowrank.BudgetError, match=r"0: int8 costs .* %, the budget is 0\.050 %") as caught:
        compress(model, 0.0005)
    # Together the layers cost what the plan was measured to cost, not what nothing that fits was guessed to.
    told = [float(part.split(" %")[0]) / 100 for part in str(caught.value).split("int8 costs ")[1:]]
    assert 0.5 * caught.value.error < sum(cost**2 for cost in told) ** 0.5 < 1.5 * caught.value.error


def test_a_refusal_names_the_output_that_fails() -> None:
    with pytest.raises(lowrank.BudgetError, match=r"in output (box|score), the worst of 2"):
        compress(Detector(), 0.0005)


def test_plans_that_were_chosen_and_failed_are_marked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    report = compress(model, 0.3)
    outcomes = [item["outcome"] for item in report.totals["finalists"]]
    assert outcomes.count("chosen") == 1
    for item in report.totals["finalists"]:
        over = item["error_upper"] is not None and item["error_upper"] > 0.3
        assert (item["outcome"] == "failed") == over
    assert "chosen" in report.to_text() and "chosen" in report.to_html()


def test_numbers_near_a_limit_tell_their_side() -> None:
    assert OUTPUT.show_beside(0.1004, 0.1) == "10.04 %" and OUTPUT.show_beside(0.1, 0.1) == "10 %"
    assert OUTPUT.show_beside(0.09999, 0.1) == "9.999 %" and OUTPUT.show_beside(0.03, 0.1) == "3.0 %"
    assert OUTPUT.show_limit(0.0125) == "1.25 %" and OUTPUT.show_limit(0.1) == "10 %"
    assert KL.show_beside(0.10004, 0.1) != KL.show(0.1) and float(KL.show_limit(0.0125).split()[0]) == 0.0125
    assert beside(0.1000004, 0.1) == "0.1000004" and beside(0.0321712, 0.1) == "0.03217"
    for value in (0.10004, 0.1, 0.0061961, 0.2999999, 1.0, 12.345):
        assert value <= float(rounded_up(value)) <= 1.02 * value


def test_one_module_is_one_module() -> None:
    torch.manual_seed(0)
    report = compress(nn.Sequential(nn.Linear(32, 32)))
    assert "1 module " in report.to_text() and "1 modules" not in report.to_text() + report.to_markdown()
