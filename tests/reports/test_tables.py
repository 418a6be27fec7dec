"""Tables of studies that have no test file of their own are what their results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_study", REPORTS / name / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["avx2", "loss_aware", "lora_ranks", "lora_vs_peft", "multi_task", "resnet56"])
def test_the_table_is_rendered_from_the_results(name: str) -> None:
    results = json.loads((REPORTS / name / "results.json").read_text(encoding="utf-8"))
    assert (REPORTS / name / "table.md").read_text(encoding="utf-8") == load(name).render(results)


def test_what_the_readme_says_of_peft() -> None:
    results = json.loads((REPORTS / "lora_vs_peft" / "results.json").read_text(encoding="utf-8"))
    assert results["largest_relative_difference"] < 1e-4
    assert results["trainable"]["peft"] == results["trainable"]["lowrank"]
    assert round(results["time_ratio"][1], 2) == 0.98


def test_two_tasks_on_one_base_are_what_the_readme_says() -> None:
    results = json.loads((REPORTS / "multi_task" / "results.json").read_text(encoding="utf-8"))
    assert results["codes_unchanged"] and results["off_equals_base"]
    for row in results["rows"]:
        assert row["largest_difference"] == 0.0 and row["switched"] == row["single"]


def test_every_case_of_resnet56_was_run_once() -> None:
    results = json.loads((REPORTS / "resnet56" / "results.json").read_text(encoding="utf-8"))
    study = load("resnet56")
    assert [row["name"] for row in results["rows"]] == list(study.CASES)
    for row in results["rows"]:
        assert row["bytes"] <= study.CASES[row["name"]][0] * results["int8_bytes"]
