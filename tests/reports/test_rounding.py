"""The study of rounding methods: what its results say, and a run on a random model."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import load_study, results_of


def test_the_study_runs_on_a_random_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    study = load_study("rounding")
    monkeypatch.setattr(study.harness, "folder_for", lambda home, smoke: tmp_path)
    study.main(["--smoke"])
    rows = study.harness.read_results(tmp_path, {})["rows"]
    assert [row["method"] for row in rows] == list(study.METHODS)
    errors = {row["method"]: row["output_error"] for row in rows}
    assert errors["gptq"] < 0.8 * errors["nearest"] and errors["two-sided"] < errors["nearest"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n") == len(rows) + 2


def test_what_the_default_rests_on() -> None:
    """Feedback over both sides drifts least at 4 bits and fewer, for every calibration seed."""
    drifts: dict[tuple[object, ...], dict[str, float]] = {}
    for row in results_of("rounding")["rows"]:
        key = (row["bits"], row["group"], row["zero_point"], row["seed"])
        drifts.setdefault(key, {})[row["method"]] = row["drift"]
    compared = [
        found for key, found in drifts.items() if {"gptq", "two-sided"} <= found.keys() and int(str(key[0])) <= 4
    ]
    assert len(compared) >= 3
    assert all(found["two-sided"] < found["gptq"] for found in compared)
