"""The budget study's table is what its results say, and its summary counts what it shows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "budget"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("budget_study", FOLDER / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up the names in their annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_rendered_from_the_results(study: ModuleType) -> None:
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == study.render(results)
    assert results["summary"] == study.summary(results["rows"])


def test_every_case_of_the_grid_was_run_once(study: ModuleType) -> None:
    rows = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["rows"]
    found = [(row["model"], row["budget"], row["seed"]) for row in rows]
    grid = [(m, b, s) for m in study.MODELS for b in study.BUDGETS for s in study.SEEDS_OF.get(m, study.SEEDS)]
    assert sorted(found) == sorted(grid)


def test_a_refusal_and_a_broken_promise_are_counted_as_such(study: ModuleType) -> None:
    case = {
        "model": "digits",
        "seed": 0,
        "seconds": 1.0,
        "upper": 0.1,
        "size_ratio": 0.2,
        "formats": {"int8": 1},
        "version": "0",
    }
    rows = [
        case | {"budget": 0.1, "unseen": 0.09, "at_floor": False},
        case | {"budget": 0.2, "unseen": 0.21, "at_floor": False},
        {"model": "digits", "seed": 0, "budget": 0.02, "refused": "no", "seconds": 1.0, "version": "0"},
    ]
    facts = study.summary(rows)
    assert (facts["cases"], facts["refused"], facts["kept"], facts["kept_share"]) == (3, 1, 1, 0.5)
    assert "**no**" in study.render({"rows": rows}) and "refused" in study.render({"rows": rows})
