"""The study of error against bytes: what its table singles out, its recipes, and a run on a random model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from studies import load_study, results_of


@pytest.fixture
def study() -> ModuleType:
    return load_study("quality")


def _row(method: str, share: float, error: float, bits: int) -> dict[str, object]:
    case = {"model": "m", "scope": "file", "method": method, "bits": bits, "group": 64, "seed": 0}
    return {
        "case": case | dict.fromkeys(("rank", "share", "budget", "option")),
        "share": share,
        "error": error,
        "drift": 0.1,
        "seconds": 1.0,
    }


def test_every_point_at_which_a_peer_is_better_is_listed(study: ModuleType) -> None:
    rendering = sys.modules["rendering"]
    rows = [_row("uniform", 0.1, 0.2, 3), _row("uniform", 0.2, 0.05, 5)]
    # Dominated; between ours and below the curve (0.1 at 0.15); between and above it.
    rows += [_row("GPTQ", 0.21, 0.06, 5), _row("HQQ", 0.15, 0.09, 4), _row("nearest", 0.15, 0.11, 4)]
    found = rendering.better(rendering.points_of({"rows": rows}))
    assert {point.method: point.error < own for point, own in found} == {"HQQ": True, "nearest": False}
    assert all(own == pytest.approx(0.1) for _, own in found)


def test_seeds_are_taken_together(study: ModuleType) -> None:
    rows = [_row("GPTQ", 0.1, 0.1, 3), _row("GPTQ", 0.1, 0.3, 3)]
    rows[1]["case"] = {**rows[1]["case"], "seed": 1}  # type: ignore[dict-item]
    (point,) = sys.modules["rendering"].points_of({"rows": rows})
    assert point.errors == (0.1, 0.3) and point.error == pytest.approx(0.2)


def _problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(96, 96, generator=generator, dtype=torch.float64)
    return torch.randn(48, 96, generator=generator, dtype=torch.float64), mixed @ mixed.T / 96


def _lost(weight: torch.Tensor, made: torch.Tensor, gram: torch.Tensor) -> float:
    return float(torch.einsum("ij,jk,ik->", weight - made, gram, weight - made))


def test_recipes_do_what_their_papers_are_for(study: ModuleType) -> None:
    """Feedback beats nearest in the metric of the inputs, a rest in it beats none, whitening beats plain, and bytes add up."""
    recipes = study.recipes
    weight, gram = _problem()
    lost = {name: _lost(weight, coder(weight, gram, 3, 32).weight, gram) for name, coder in recipes.CODERS.items()}
    assert max(lost["GPTQ"], lost["GPTQ, act-order"]) < 0.7 * lost["nearest"]
    assert _lost(weight, recipes.qera(weight, gram, 3, 32, 8).weight, gram) < 0.9 * lost["nearest"]
    assert _lost(weight, recipes.caldera(weight, gram, 3, 32, 8).weight, gram) < lost["GPTQ, act-order"]
    whitened, plain = recipes.svd_llm(weight, gram, 12), recipes.svd(weight, 12)
    assert _lost(weight, whitened.weight, gram) < 0.95 * _lost(weight, plain.weight, gram)
    assert plain.bytes == 2 * 12 * (48 + 96)
    assert recipes.nearest(weight, 3, 32).bytes == 48 * (96 * 3 + 3 * (16 + 3)) // 8


def test_the_best_rank_of_a_whitened_layer_is_its_closed_form(study: ModuleType) -> None:
    """Against the tail of the spectrum of W Σ^½, which no rank can beat."""
    weight, gram = _problem()
    values = torch.linalg.svdvals(weight @ study.recipes.root_of(gram)[0])
    lost = _lost(weight, study.recipes.svd_llm(weight, gram, 12).weight, gram)
    # Factors are kept in float16.
    assert lost == pytest.approx(float(values[12:].square().sum()), rel=1e-3)


def test_the_study_runs_on_a_random_model(study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(study.harness, "folder_for", lambda home, smoke: tmp_path)
    cases = [case for case in study.smoke_cases() if case.method != study.PLANNER]
    monkeypatch.setattr(study, "smoke_cases", lambda: cases)
    study.main(["--smoke"])
    rows = study.harness.read_results(tmp_path, {})["rows"]
    assert len(rows) == len(cases)
    assert all(0 < row["share"] < 0.3 and 0 < row["error"] < 0.5 for row in rows)


def test_what_the_readme_says() -> None:
    """MiniLM's encoder: at each width this package errs less than GPTQ as published, which errs less than nearest."""
    errors = {
        (row["case"]["method"], row["case"]["bits"]): row["error"]
        for row in results_of("quality")["rows"]
        if row["case"]["model"] == "minilm" and row["case"]["scope"] == "encoder" and row["case"]["group"] == 64
    }
    for bits in (6, 5, 4, 3, 2):
        assert errors["uniform", bits] < errors["GPTQ", bits] < errors["nearest", bits]
