"""Every study's table is what its results say, and so are figures that stand elsewhere."""

from __future__ import annotations

import pytest
from studies import REPORTS, STUDIES, load_study, results_of

# Study, and what stands before the dot of its files: one pair for each file of results.
TABLES = [
    (name, path.stem.removeprefix("results"))
    for name in STUDIES
    for path in sorted((REPORTS / name).glob("results*.json"))
]


def test_every_study_has_results() -> None:
    assert {name for name, _ in TABLES} == set(STUDIES)
    assert len(STUDIES) >= 12


@pytest.mark.parametrize(("name", "ending"), TABLES)
def test_the_table_is_rendered_from_the_results(name: str, ending: str) -> None:
    table = (REPORTS / name / f"table{ending}.md").read_text(encoding="utf-8")
    assert table == load_study(name).render(results_of(name, ending))


def test_what_the_readme_says_of_peft() -> None:
    results = results_of("lora_vs_peft")
    assert results["largest_relative_difference"] < 1e-4
    assert results["trainable"]["peft"] == results["trainable"]["lowrank"]
    assert round(results["time_ratio"][1], 2) == 0.98


def test_two_tasks_on_one_base_are_what_the_readme_says() -> None:
    results = results_of("multi_task")
    assert results["codes_unchanged"] and results["off_equals_base"]
    for row in results["rows"]:
        assert row["largest_difference"] == 0.0 and row["switched"] == row["single"]


def test_every_case_of_resnet56_was_run_once() -> None:
    results, cases = results_of("resnet56"), load_study("resnet56").CASES
    assert [row["name"] for row in results["rows"]] == list(cases)
    for row in results["rows"]:
        assert row["bytes"] <= cases[row["name"]][0] * results["int8_bytes"]
