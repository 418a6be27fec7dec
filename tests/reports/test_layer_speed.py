"""The speed study: its table is the one that its JSON gives, and the script runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "layer_speed"


def load_study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layer_speed_study", FOLDER / "study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_rendered_from_the_results() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    assert load_study().render(results) == (FOLDER / "table.md").read_text()
    study = load_study()
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
