"""The healing study runs, and its table is what its results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "healing"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healing_study", FOLDER / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_rendered_from_the_results(study: ModuleType) -> None:
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == study.render(results)
    assert [row["case"] for row in results["rows"]] == list(study.CASES)
    for row in results["rows"]:
        assert row["error_after"] <= row["error_before"]


def test_what_the_readme_says_of_the_targets(study: ModuleType) -> None:
    rows = {row["case"]: row for row in json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["rows"]}
    for case, drift in study.TARGETS.items():
        assert rows[case]["after"]["drift"] <= drift
        assert rows[case]["after"]["spearman"] >= rows[case]["dense"]["spearman"] - 0.005
    images = {
        data: [rows["resnet56-50-lowrank"][when][data] for when in ("dense", "after")]
        for data in ("accuracy", "accuracy_jpeg")
    }
    assert all(dense - after < 0.01 for dense, after in images.values())


def test_the_smallest_case_heals(study: ModuleType) -> None:
    pytest.importorskip("sklearn")
    row = study.run_case("digits-10-lowrank", study.SMOKE, 40)
    assert row["error_after"] < row["error_before"]
    assert row["samples"] + row["samples_held_out"] == 1200
    table = study.render({"rows": [row]})
    assert f"{row['after']['accuracy']:.1%}" in table
    assert "digits-10-lowrank" in table
