"""What do factors by their cost to the output, and healing, buy at the same promise?

Each case is compressed three times with the same budget, data and seed: factors fitted to the layers' inputs alone, factors fitted to
what their error costs the output, and the latter with healing. Each is measured on data that nothing of it saw.

    python reports/loss_aware/study.py                  # every case that is not yet in results.json
    python reports/loss_aware/study.py --only resnet20  # one model
    python reports/loss_aware/study.py --smoke          # one small case into a temporary folder, for CI

Models and data are those of ``reports/budget``; needs the data folder beside the repository (``../shared``) but for ``digits``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness
from _shared.cases import MODELS
from _shared.host import host

import lowrank
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches

HERE = Path(__file__).resolve().parent
# Model, budget, and what heal is given beside its defaults.
CASES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("digits", 0.05, {"lr": 2e-3}),
    ("digits", 0.2, {"lr": 2e-3}),
    ("resnet20", 0.2, {"lr": 2e-3, "batch_size": 64, "vary": True, "steps": 200}),
)
VARIANTS = ("inputs alone", "cost to the output", "and healed")


def run_case(name: str, budget: float, variant: str, heal: dict[str, Any]) -> dict[str, Any]:
    """One row of results.json."""
    case = MODELS[name]()
    started = time.perf_counter()
    result = lowrank.compress_model(
        case.model,
        error_budget=budget,
        calibration=case.calibration,
        validation=case.validation,
        loss_aware=variant != VARIANTS[0],
        heal=heal if variant == VARIANTS[2] else False,
        progress=False,
        seed=0,
    )
    seconds = time.perf_counter() - started
    unseen = Evaluator(case.model, prepare_batches(case.model, case.unseen), "output").measure(result.model)
    accuracy = {}
    if case.labelled:
        with torch.no_grad():
            for data, (images, labels) in case.labelled.items():
                found = torch.cat([result.model.eval()(part) for part in images.split(250)]).argmax(dim=1)
                accuracy[data] = float((found == labels).float().mean())
    totals = result.report.totals
    return {
        "model": name,
        "budget": budget,
        "variant": variant,
        "size_ratio": totals["size_ratio"],
        "error_upper": totals["error_upper"],
        "unseen": unseen.value,
        "formats": dict(sorted(Counter(row.format for row in result.report.rows).items())),
        "healed": totals.get("heal"),
        "accuracy": accuracy,
        "seconds": round(seconds, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    body = [
        [
            f"{row['model']}, {row['budget']:.0%}",
            row["variant"] + ("" if row["variant"] != VARIANTS[2] or row["healed"] else " (no gain)"),
            f"{row['size_ratio']:.2%}",
            f"{row['error_upper']:.2%}",
            f"{row['unseen']:.2%}",
            ", ".join(f"{name} {value:.1%}" for name, value in row["accuracy"].items()),
            f"{row['seconds']:.0f}",
        ]
        for row in results["rows"]
    ]
    header = ["model, budget", "factors", "size", "promised", "on unseen data", "top-1", "seconds"]
    return harness.table(body, header) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet."""
    options = harness.options_of(__doc__, only="one model").parse_args(arguments)
    torch.set_num_threads(1)
    folder = harness.folder_for(HERE, options.smoke)
    cases = (("digits", 0.2, {"steps": 20}),) if options.smoke else CASES
    results = harness.read_results(folder, {"rows": []})
    results["host"] = host("machine", "torch", "lowrank")
    order = [(name, budget, variant) for name, budget, _ in cases for variant in VARIANTS]
    for name, budget, heal in cases:
        for variant in VARIANTS:
            done = {(row["model"], row["budget"], row["variant"]) for row in results["rows"]}
            if (name, budget, variant) in done or (options.only and options.only != name):
                continue
            results["rows"].append(run_case(name, budget, variant, heal))
            print(json.dumps(results["rows"][-1]), flush=True)
            results["rows"].sort(key=lambda row: order.index((row["model"], row["budget"], row["variant"])))
            harness.write_results(folder, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
