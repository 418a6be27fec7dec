"""The speed study measured every case, and the script runs."""

from __future__ import annotations

import os
import subprocess
import sys

from studies import REPORTS, load_study, results_of

FOLDER = REPORTS / "layer_speed"


def test_every_case_was_measured() -> None:
    study, results = load_study("layer_speed"), results_of("layer_speed")
    assert len(results["cases"]) == len(study.SHAPES) * len(study.TOKENS)
    assert len(results["convolutions"]) == len(study.CONVOLUTIONS) * len(study.IMAGES)


def test_smoke_run_leaves_the_results_alone() -> None:
    before = (FOLDER / "results.json").read_bytes()
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), *sys.path])}
    command = [sys.executable, str(FOLDER / "study.py"), "--smoke", "--threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    assert (FOLDER / "results.json").read_bytes() == before
