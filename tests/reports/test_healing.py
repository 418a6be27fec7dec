"""The healing study runs, and its results say what the README says."""

from __future__ import annotations

import pytest
from studies import load_study, results_of


def test_every_case_was_run_and_healed() -> None:
    results = results_of("healing")
    assert [row["case"] for row in results["rows"]] == list(load_study("healing").CASES)
    for row in results["rows"]:
        assert row["error_after"] <= row["error_before"]


def test_what_the_readme_says_of_the_targets() -> None:
    rows = {row["case"]: row for row in results_of("healing")["rows"]}
    for case, drift in load_study("healing").TARGETS.items():
        assert rows[case]["after"]["drift"] <= drift
        assert rows[case]["after"]["spearman"] >= rows[case]["dense"]["spearman"] - 0.005
    images = {
        data: [rows["resnet56-50-lowrank"][when][data] for when in ("dense", "after")]
        for data in ("accuracy", "accuracy_jpeg")
    }
    assert all(dense - after < 0.01 for dense, after in images.values())


def test_the_smallest_case_heals() -> None:
    pytest.importorskip("sklearn")
    study = load_study("healing")
    row = study.run_case("digits-10-lowrank", study.SMOKE, 40)
    assert row["error_after"] < row["error_before"]
    assert row["samples"] + row["samples_held_out"] == 1200
    table = study.render({"rows": [row]})
    assert f"{row['after']['accuracy']:.1%}" in table
    assert "digits-10-lowrank" in table
