"""What does ResNet-56 keep of its accuracy at half the bytes of int8? See README.md.

Run: ``python reports/resnet56/study.py`` (resumes where it stopped; ``--smoke`` is for CI).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness, resnet

import lowrank

HERE = Path(__file__).resolve().parent
# Published by AIMET (Qualcomm, documentation of its compression features): spatial SVD and channel pruning with fine-tuning.
AIMET = [
    ("ResNet-18, ImageNet, AIMET at 50 % MACs", 69.76, 68.56),
    ("ResNet-50, ImageNet, AIMET at 50 % MACs", 76.05, 75.75),
]
# Name -> share of int8's bytes and options of compress_model.
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "int8": (1.0, {"formats": ("int8",)}),
    "int8, BatchNorm folded": (1.0, {"formats": ("int8",), "fold_batchnorm": True}),
    "three quarters of int8": (0.75, {}),
    "three quarters of int8, KL": (0.75, {"metric": "kl"}),
    "half of int8": (0.5, {}),
    "half of int8, KL": (0.5, {"metric": "kl"}),
    "half of int8, BatchNorm folded": (0.5, {"fold_batchnorm": True}),
    "half of int8, KL, BatchNorm folded": (0.5, {"metric": "kl", "fold_batchnorm": True}),
}
Labelled = dict[str, tuple[Tensor, Tensor]]


def data(smoke: bool) -> tuple[nn.Module, list[Tensor], list[Tensor], Labelled]:
    """The network, calibration images, images to verify on, and labelled images that nothing saw."""
    if smoke:
        torch.manual_seed(0)
        images = torch.randn(96, 3, 32, 32)
        labelled = {name: (images[:32], torch.zeros(32, dtype=torch.long)) for name in ("eval", "eval_jpeg")}
        return resnet.ResNet(8).eval(), [images[32:64]], [images[64:]], labelled
    seen, _ = resnet.images("calibration")
    images, labels = resnet.images("eval")
    verify, measure = resnet.halves()
    return (
        resnet.pretrained(56),
        list(seen.split(64)),
        list(images[verify].split(125)),
        {"eval": (images[measure], labels[measure]), "eval_jpeg": resnet.images("eval_jpeg")},
    )


def run(name: str, given: tuple[nn.Module, list[Tensor], list[Tensor], Labelled], int8_bytes: int) -> dict[str, Any]:
    """One case: compress to its share of the bytes of int8, count what is classified rightly."""
    model, calibration, verification, labelled = given
    share, options = CASES[name]
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    start = time.perf_counter()
    result = lowrank.compress_model(
        model,
        size_budget=share * int8_bytes / before,
        calibration=calibration,
        validation=verification,
        progress=False,
        **options,
    )
    seconds = time.perf_counter() - start
    kinds: dict[str, int] = {}
    for entry in result.plan.entries:
        kind = " ".join(part for part in (entry.format, entry.scheme) if part)
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "name": name,
        "bytes": result.report.totals["bytes_after"],
        "size_ratio": result.report.totals["size_ratio"],
        "error": result.report.totals["error_measured"],
        "metric": result.report.totals["metric"],
        "layers": kinds,
        "top1": {kind: resnet.accuracy(result.model, *pair) for kind, pair in labelled.items()},
        "seconds": round(seconds, 1),
    }


def int8_bytes_of(model: nn.Module) -> int:
    """Bytes of the model with every layer rounded and BatchNorm as it is."""
    rounded = lowrank.compress_model(model, error_budget=1.0, metric="weight", formats=("int8",), progress=False)
    return int(rounded.report.totals["bytes_after"])


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    dense = results["dense"]
    body = [["float32", f"{dense['bytes']:,}", "", *(f"{value:.1%}" for value in dense["top1"].values()), "", ""]]
    for row in results["rows"]:
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(row["layers"].items()))
        body.append(
            [
                row["name"],
                f"{row['bytes']:,}",
                f"{row['bytes'] / results['int8_bytes']:.2f}",
                *(f"{value:.1%}" for value in row["top1"].values()),
                layers,
                f"{row['seconds']:.0f}",
            ]
        )
    header = ["ResNet-56, CIFAR-10", "bytes", "of int8's", "top-1, eval (half)", "top-1, JPEG", "layers", "seconds"]
    published = [[name, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"] for name, before, after in AIMET]
    return "\n".join(
        [
            harness.table(body, header),
            "",
            "Published, for context (other networks, other data, fine-tuned with labels):",
            "",
            harness.table(published, ["", "before", "after", "points"]),
            "",
        ]
    )


def main() -> None:
    """Run what is missing and write the table anew."""
    smoke = harness.options_of(__doc__).parse_args().smoke
    folder = harness.folder_for(HERE, smoke)
    given = data(smoke)
    results = harness.read_results(folder, {})
    if not results:
        before = sum(tensor.nbytes for tensor in given[0].state_dict().values())
        top1 = {kind: resnet.accuracy(given[0], *pair) for kind, pair in given[3].items()}
        results = {"dense": {"bytes": before, "top1": top1}, "int8_bytes": int8_bytes_of(given[0]), "rows": []}
    done = {row["name"] for row in results["rows"]}
    for name in CASES if not smoke else ("int8", "half of int8, BatchNorm folded"):
        if name not in done:
            results["rows"].append(run(name, given, results["int8_bytes"]))
            print(results["rows"][-1], flush=True)
            harness.write_results(folder, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
