"""Is the promise kept on data that nothing in the choice ever saw?

Six real models, four budgets, three seeds. Each case calibrates and verifies on one set and measures the finished model on another.

    python reports/budget/study.py                # everything that is not yet in results.json
    python reports/budget/study.py --only digits  # one model
    python reports/budget/study.py --smoke        # one small case into a temporary folder, for CI

Needs the data folder beside the repository (``../shared``) but for ``digits`` and ``--smoke``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness, resnet
from _shared.cases import MODELS, Case, digits
from _shared.host import host

import lowrank
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches

HERE = Path(__file__).resolve().parent
BUDGETS = (0.02, 0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
# One seed where a case takes minutes.
SEEDS_OF = {"resnet56": (0,)}


def run_case(name: str, case: Case, budget: float, seed: int) -> dict[str, Any]:
    """Compress under one budget with one seed, then measure on the unseen data."""
    model = case.model
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "budget": budget, "seed": seed, "version": lowrank.__version__}
    try:
        result = lowrank.compress_model(
            model,
            error_budget=budget,
            calibration=case.calibration,
            validation=case.validation,
            seed=seed,
            progress=False,
        )
    except lowrank.BudgetError as error:
        return row | {"refused": str(error), "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    measured = Evaluator(model, prepare_batches(model, case.unseen), "output").measure(result.model)
    low, high = measured.interval()
    totals = result.report.totals
    formats: dict[str, int] = {}
    for entry in result.plan.entries:
        key = entry.format + ("" if entry.activations != "float" else " (weight-only)")
        formats[key] = formats.get(key, 0) + 1
    if case.shifted is not None:
        row["shifted"] = Evaluator(model, prepare_batches(model, case.shifted), "output").measure(result.model).value
    if case.labelled is not None:
        row["top1"] = {
            name: [resnet.accuracy(kind, *data) for kind in (model, result.model)]
            for name, data in case.labelled.items()
        }
    return row | {
        "upper": totals["error_upper"],
        "verified": totals["error_measured"],
        "predicted": totals["error_predicted"],
        "unseen": measured.value,
        "unseen_low": low,
        "unseen_high": high,
        "size_ratio": totals["size_ratio"],
        "formats": formats,
        "at_floor": bool(totals.get("finalists"))
        and totals["size_ratio"] <= min(f["size_ratio"] for f in totals["finalists"]),
        "seconds": seconds,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the claims in the README rest on."""
    done = [row for row in rows if "unseen" in row]
    kept = [row for row in done if row["unseen"] <= row["budget"]]
    used = sorted(row["unseen"] / row["budget"] for row in done if not row["at_floor"])
    return {
        "cases": len(rows),
        "refused": len(rows) - len(done),
        "kept": len(kept),
        "kept_share": len(kept) / len(done) if done else None,
        "median_use": used[len(used) // 2] if used else None,
        "cases_with_something_smaller": len(used),
    }


def render(results: dict[str, Any]) -> str:
    """The table of results.json as Markdown."""
    body = []
    for row in sorted(
        results["rows"],
        key=lambda row: (list(MODELS).index(row["model"]) if row["model"] in MODELS else 9, row["budget"], row["seed"]),
    ):
        start = [row["model"], f"{row['budget']:.0%}", row["seed"]]
        if "refused" in row:
            body.append([*start, "refused", "", "", "", "", "", f"{row['seconds']:.0f}", row["version"]])
            continue
        formats = ", ".join(f"{count} {name}" for name, count in sorted(row["formats"].items()))
        kept = "yes" if row["unseen"] <= row["budget"] else "**no**"
        body.append(
            [
                *start,
                f"{row['upper']:.2%}",
                f"{row['unseen']:.2%}",
                kept,
                f"{row['unseen'] / row['budget']:.2f}",
                f"{row['size_ratio']:.2%}",
                formats,
                f"{row['seconds']:.0f}",
                row["version"],
            ]
        )
    header = [
        "model",
        "budget",
        "seed",
        "promised (upper)",
        "measured on unseen data",
        "kept",
        "of budget",
        "size",
        "layers",
        "seconds",
        "version",
    ]
    facts = summary(results["rows"])
    lines = [
        harness.table(body, header),
        "",
        f"{facts['kept']} of {facts['cases'] - facts['refused']} budgets kept on unseen data; {facts['refused']} refused. "
        f"Median use of the budget where something smaller existed ({facts['cases_with_something_smaller']} cases): "
        + (f"{facts['median_use']:.2f}." if facts["median_use"] is not None else "none."),
    ]
    return "\n".join([*lines, *_images(results["rows"])]) + "\n"


def _images(rows: list[dict[str, Any]]) -> list[str]:
    """What the classifiers make of images like those they were verified on, and of JPEG copies, for which nothing was promised."""
    body = [
        [
            row["model"],
            f"{row['budget']:.0%}",
            row["seed"],
            f"{row['unseen']:.2%}",
            f"{row['shifted']:.2%}",
            *(f"{before:.1%} → {after:.1%}" for before, after in (row["top1"]["eval"], row["top1"]["eval_jpeg"])),
            f"{row['size_ratio']:.2%}",
        ]
        for row in sorted(rows, key=lambda row: (row["model"], row["budget"], row["seed"]))
        if "top1" in row
    ]
    if not body:
        return []
    header = ["model", "budget", "seed", "logits error, other half", "JPEG", "top-1, other half", "top-1, JPEG", "size"]
    return ["", harness.table(body, header)]


def smoke() -> None:
    """One quick case end to end, written nowhere that lasts."""
    row = run_case("digits", digits(), 0.1, 0)
    with tempfile.TemporaryDirectory() as folder:
        harness.write_results(Path(folder), {"rows": [row]}, render)
        print((Path(folder) / "table.md").read_text(encoding="utf-8"))
    if not row["upper"] <= 0.1:
        raise SystemExit("smoke: the promise was not kept")


def main() -> None:
    """Run what is missing and write the table anew."""
    arguments = harness.options_of(__doc__, only=list(MODELS)).parse_args()
    if arguments.smoke:
        smoke()
        return
    results = harness.read_results(HERE, {"rows": []})
    results["host"] = host("machine", "torch", "threads", "lowrank")
    for name, make in MODELS.items():
        if arguments.only not in (None, name):
            continue
        done = {(row["model"], row["budget"], row["seed"]) for row in results["rows"]}
        seeds = SEEDS_OF.get(name, SEEDS)
        missing = [(budget, seed) for budget in BUDGETS for seed in seeds if (name, budget, seed) not in done]
        case = make() if missing else None
        for budget, seed in missing:
            assert case is not None
            results["rows"].append(run_case(name, case, budget, seed))
            print({key: value for key, value in results["rows"][-1].items() if key != "formats"}, flush=True)
            results["summary"] = summary(results["rows"])
            harness.write_results(HERE, results, render)


if __name__ == "__main__":
    main()
