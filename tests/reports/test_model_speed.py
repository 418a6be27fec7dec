"""The table of the model speed study is what its results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "model_speed"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_speed_study", FOLDER / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_rendered_from_the_results(study: ModuleType) -> None:
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == study.render(results)
    found = [(case["model"], case["input"]) for case in results["cases"]]
    assert found == [
        ("MiniLM", "1 sentence"),
        ("MiniLM", "32 x 64 tokens"),
        ("ResNet-20", "1 image"),
        ("ResNet-20", "64 images"),
    ]


def test_what_is_slower_is_named(study: ModuleType) -> None:
    case = {
        "model": "M",
        "input": "1 x",
        "shape": [1, 4],
        "sizes": {"lowrank": [0.25, 0.1]},
        "milliseconds": {"float32": [1.0, 1.0, 1.0], "lowrank": [2.0, 2.0, 2.0]},
        "speedup": {"lowrank": {"float32": [0.5, 0.5, 0.5]}},
    }
    about = {"cpu": "c", "threads": 2, "capability": "x", "torch": "t", "torchao": "a", "route": "native"}
    assert "* lowrank is slower than float32 on M, 1 x: 0.50×." in study.render({"host": about, "cases": [case]})
    case["speedup"] = {"lowrank": {"float32": [2.0, 2.0, 2.0]}}
    assert "No compressed model is slower" in study.render({"host": about, "cases": [case]})
