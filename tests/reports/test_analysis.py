"""The analysis study: its results say what the README says, and the script runs."""

from __future__ import annotations

import os
import subprocess
import sys

from studies import REPORTS, load_study, results_of

FOLDER = REPORTS / "analysis"
RESULTS = FOLDER / "results.json"


def test_all_matrices_were_analysed() -> None:
    results = results_of("analysis")
    # WeightWatcher leaves out the 2×384 table of token types.
    assert (results["timing"]["layers"], results["timing"]["weightwatcher_layers"]) == (40, 39)
    assert results["accuracy"]["largest_difference_of_numerical_rank"] == 0


def test_smoke_run_leaves_the_results_alone() -> None:
    before = RESULTS.read_bytes()
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), *sys.path])}
    command = [sys.executable, str(FOLDER / "study.py"), "--smoke", "--threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    assert RESULTS.read_bytes() == before


def test_the_table_says_met_or_missed() -> None:
    study = load_study("analysis")
    results = {
        "host": {"cpu": "a CPU", "torch": "2", "capability": "AVX2"},
        "versions": {"weightwatcher": "0.7.7"},
        "timing": {
            "layers": 39,
            "parameters": 10,
            "threads": 2,
            "rounds": 2,
            "lowrank_seconds": [1.0, 2.0],
            "weightwatcher_seconds": [3.0, 8.0],
            "weightwatcher_layers": 39,
        },
        "accuracy": {"largest_difference": 1e-9, "largest_difference_of_numerical_rank": 0},
    }
    text = study.render(results)
    assert "at most 1.5 s: **met**, 1.50 s" in text
    assert "3 times faster: **met**, 3.5 times" in text
    results["timing"]["lowrank_seconds"] = [2.0, 4.0]
    assert study.render(results).count("**missed**") == 2
