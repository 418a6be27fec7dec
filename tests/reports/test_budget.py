"""The budget study ran every case, and its summary counts what it shows."""

from __future__ import annotations

from studies import load_study, results_of


def test_the_summary_is_of_the_rows() -> None:
    results = results_of("budget")
    assert results["summary"] == load_study("budget").summary(results["rows"])


def test_every_case_of_the_grid_was_run_once() -> None:
    study, rows = load_study("budget"), results_of("budget")["rows"]
    found = [(row["model"], row["budget"], row["seed"]) for row in rows]
    grid = [(m, b, s) for m in study.MODELS for b in study.BUDGETS for s in study.SEEDS_OF.get(m, study.SEEDS)]
    assert sorted(found) == sorted(grid)


def test_a_refusal_and_a_broken_promise_are_counted_as_such() -> None:
    study = load_study("budget")
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
