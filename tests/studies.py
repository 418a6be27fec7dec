"""The studies under ``reports/`` as modules, and what they have written."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

REPORTS = Path(__file__).resolve().parents[1] / "reports"
STUDIES = sorted(path.parent.name for path in REPORTS.glob("*/study.py"))


@cache
def load_study(name: str) -> ModuleType:
    """Import ``reports/<name>/study.py``."""
    spec = importlib.util.spec_from_file_location(f"{name}_study", REPORTS / name / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up the names in their annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def results_of(name: str, ending: str = "") -> dict[str, Any]:
    """Read what a study has measured."""
    found: dict[str, Any] = json.loads((REPORTS / name / f"results{ending}.json").read_text(encoding="utf-8"))
    return found
