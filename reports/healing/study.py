"""How much of what low rank costs comes back without a label?

Each case keeps a share of the parameters of the layers named, in factors of one rank a layer, and heals the result on unlabelled
calibration data at equal bytes. Measured on data that neither saw.

    python reports/healing/study.py                       # every case that is not yet in results.json
    python reports/healing/study.py --only minilm-60      # cases whose name begins so
    python reports/healing/study.py --smoke               # one small case into a temporary folder, for CI

Needs the data folder beside the repository (``../shared``) and the extra ``demo``, but for ``--smoke``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data, harness, resnet
from _shared.host import host

import lowrank
from lowrank.calibration.gradients import output_gradients
from lowrank.calibration.inputs import collect_statistics
from lowrank.calibration.preparing import prepare_batches
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedConv2d, SVDCompressedLinear
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.targets.model import replace_module

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from layer_costs import LossAwareCurve, pooled, ranks_for_budget  # noqa: E402

RIDGE = 1e-3
MAX_TOKENS = 128
# What was asked for (issue 4): mean drift and distance of Spearman from the dense model's.
TARGETS = {"minilm-60-lowrank": 0.11, "minilm-40-lowrank": 0.16}


@dataclass
class Subject:
    """A model, unlabelled data to heal on, and how to measure a model on other data.

    Attributes:
        layers: names of the layers that are compressed.
        measure: model to named figures.
    """

    model: nn.Module
    layers: list[str]
    calibration: list[Any]
    measure: Callable[[nn.Module], dict[str, float]]


def minilm() -> Subject:
    """all-MiniLM-L6-v2, the 36 linear layers of its encoder; drift (1 − cos) and Spearman on sts/eval.tsv."""
    from lowrank.integrations.transformers import load_pretrained, tokenize

    model, tokenizer = load_pretrained(data.minilm_path())
    model.eval()
    rows = data.sentence_pairs()
    scores = [float(row[0]) for row in rows]
    texts = sorted({text for row in rows for text in row[1:3]}, key=lambda text: (len(text), text))
    place = {text: index for index, text in enumerate(texts)}
    left, right = ([place[row[side]] for row in rows] for side in (1, 2))

    def embed(network: nn.Module) -> Tensor:
        parts = []
        for start in range(0, len(texts), 64):
            # Sorted by characters, not by tokens; encoded here so that the order stays that of ``texts``.
            batch = tokenizer(
                texts[start : start + 64], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
            )
            with torch.no_grad():
                hidden = network(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            parts.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
        return torch.cat(parts)

    reference = embed(model)

    def measure(network: nn.Module) -> dict[str, float]:
        found = embed(network)
        cosines = (found[left] * found[right]).sum(dim=1)
        drift = float((1.0 - (found * reference).sum(dim=1)).mean())
        return {"drift": drift, "spearman": float(stats.spearmanr(cosines.numpy(), scores).statistic)}

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.")]
    kept = [line for line in data.sentences() if line.strip()]
    return Subject(model, names, list(tokenize(tokenizer, kept, MAX_TOKENS, 32)), measure)


def cifar(depth: int) -> Subject:
    """ResNet for CIFAR-10, its 3×3 convolutions but the first; accuracy on the lossless and the JPEG test images."""
    model = resnet.pretrained(depth)
    images, _ = resnet.images("calibration")
    generator = torch.Generator().manual_seed(0)
    # The training images as the networks were trained on them: mirrored and shifted by up to four pixels.
    views = [images, images.flip(3)]
    for _ in range(6):
        padded = F.pad(images, (4, 4, 4, 4))
        down, along = (int(torch.randint(9, (), generator=generator)) for _ in range(2))
        views.append(padded[:, :, down : down + 32, along : along + 32])
    tests = {"accuracy": resnet.images("eval"), "accuracy_jpeg": resnet.images("eval_jpeg")}

    def measure(network: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {
                name: float((torch.cat([network(part) for part in x.split(250)]).argmax(dim=1) == y).float().mean())
                for name, (x, y) in tests.items()
            }

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"]
    return Subject(model, names, list(torch.cat(views).split(64)), measure)


def digits() -> Subject:
    """An MLP on scikit-learn's digits, trained here; its first two layers. For ``--smoke``."""
    pixels, labels = data.digits(shuffled=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    pairs = list(zip(pixels[:1200].split(64), labels[:1200].split(64), strict=True))
    lowrank.finetune(model, pairs, epochs=15, lr=3e-3, progress=False)
    model.eval()

    def measure(network: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            right = network(pixels[1400:]).argmax(dim=1) == labels[1400:]
        return {"accuracy": float(right.float().mean())}

    return Subject(model, ["0", "2"], list(pixels[:1200].split(64)), measure)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "minilm": minilm,
    "resnet20": lambda: cifar(20),
    "resnet56": lambda: cifar(56),
    "digits": digits,
}
# What heal is given for images: a rate, and samples that are other ones each time, since there are few of them.
IMAGES: dict[str, Any] = {"batch_size": 64, "lr": 2e-3, "vary": True}
# Name: subject, share of the layers' parameters that is kept, format, and what heal is given beside its defaults.
CASES: dict[str, tuple[str, float, str, dict[str, Any]]] = {
    "minilm-60-lowrank": ("minilm", 0.6, "lowrank", {}),
    "minilm-60-lowrank-int8": ("minilm", 0.6, "lowrank-int8", {}),
    "minilm-60-alike-lowrank": ("minilm", 0.6, "lowrank", {"ranks": "alike"}),
    "minilm-40-lowrank": ("minilm", 0.4, "lowrank", {}),
    "minilm-40-lowrank-int8": ("minilm", 0.4, "lowrank-int8", {}),
    "resnet20-50-lowrank": ("resnet20", 0.5, "lowrank", IMAGES | {"steps": 800}),
    "resnet56-50-lowrank": ("resnet56", 0.5, "lowrank", IMAGES | {"steps": 400}),
}
SMOKE = {"digits-10-lowrank": ("digits", 0.1, "lowrank", {"steps": 60, "lr": 2e-3})}


def compressed(subject: Subject, share: float, format: str, ranks: str = "by cost") -> nn.Module:
    """A copy whose layers hold this share of their parameters in factors.

    Factors by what an error costs the model, of the ranks that cost it least in all ("by cost"; a layer whose factors
    would hold more than its matrix stays as it is, in int8 where the format is), or of the same share in every layer
    ("alike"). Convolutions in the channel form, as matrices on patches.
    """
    model = copy.deepcopy(subject.model)
    layers = {name: model.get_submodule(name) for name in subject.layers}
    batches = prepare_batches(model, subject.calibration)
    found = collect_statistics(model, batches, layers)
    gradients = output_gradients(model, batches, layers, directions=pooled)
    shapes = {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()}
    chosen: dict[str, int | None] = {
        name: max(int(share * rows * columns / (rows + columns)), 1) for name, (rows, columns) in shapes.items()
    }
    curves = {
        name: LossAwareCurve(
            layer.weight.flatten(1),
            found[name],
            gradients[name],
            ridge=RIDGE,
            shift_bias=layer.bias is not None,
            name=name,
        )
        for name, layer in layers.items()
    }
    if ranks == "by cost":
        budget = int(share * sum(math.prod(shapes[name]) for name in curves))
        chosen |= ranks_for_budget({name: curve.costs for name, curve in curves.items()}, shapes, budget)
    for name, layer in layers.items():
        rank = chosen[name]
        factored: nn.Module = layer
        if rank is None:
            factored = QuantizedLinear.from_linear(layer) if format == "lowrank-int8" else layer
        elif isinstance(layer, nn.Conv2d):
            best = curves[name].factors(rank)
            first = best.right.reshape(rank, *layer.weight.shape[1:])
            kernels = ConvFactors(first, best.left[:, :, None, None], best.bias_shift)
            factored = SVDCompressedConv2d.from_factors(kernels, layer)
        else:
            factored = SVDCompressedLinear.from_factors(curves[name].factors(rank), layer)
            if format == "lowrank-int8":
                factored = QuantizedLowRankLayer.from_factors(factored)
        replace_module(model, [name], factored)
    return model


def compressed_convolutions(subject: Subject, share: float) -> nn.Module:
    """A copy whose convolutions hold this share of their parameters in float factors: what ``compress_model`` makes of that size.

    It chooses the ranks and, for each convolution, the channel or the spatial form.
    """
    model = subject.model
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    chosen = sum(model.get_submodule(name).weight.nbytes for name in subject.layers)
    others = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in subject.layers]
    result = lowrank.compress_model(
        model,
        size_budget=(whole - chosen * (1.0 - share)) / whole,
        formats=("lowrank",),
        ignore=others,
        calibration=subject.calibration,
        progress=False,
    )
    return result.model


def run_case(name: str, cases: dict[str, tuple[str, float, str, dict[str, Any]]], steps: int | None) -> dict[str, Any]:
    """One row of results.json."""
    source, share, format, options = cases[name]
    subject = SUBJECTS[source]()
    options = options if steps is None else {**options, "steps": steps}
    ranks = options.get("ranks", "by cost")
    options = {key: value for key, value in options.items() if key != "ranks"}
    started = time.perf_counter()
    if source.startswith("resnet"):
        smaller = compressed_convolutions(subject, share)
    else:
        smaller = compressed(subject, share, format, ranks)
    start_seconds = time.perf_counter() - started
    load = os.getloadavg()[0]
    started = time.perf_counter()
    processor = time.process_time()
    result = lowrank.heal(smaller, subject.model, subject.calibration, **options)
    seconds = time.perf_counter() - started
    processor = time.process_time() - processor
    report = json.loads(result.report.to_json())
    losses = report.pop("losses")
    return {
        "case": name,
        "share": share,
        "format": format,
        "dense": subject.measure(subject.model),
        "before": subject.measure(smaller),
        "after": subject.measure(result.model),
        "left_as_is": sum(
            isinstance(smaller.get_submodule(n), (nn.Linear, nn.Conv2d, QuantizedLinear)) for n in subject.layers
        ),
        "start_seconds": round(start_seconds, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "load_at_start": round(load, 1),
        "threads": torch.get_num_threads(),
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        **report,
    }


def render(results: dict[str, Any]) -> str:
    """The table of results.json as Markdown."""
    body = []
    for row in results["rows"]:
        for figure in row["after"]:
            target = TARGETS.get(row["case"]) if figure == "drift" else None
            show = "{:.1%}".format if figure.startswith("accuracy") else "{:.4f}".format
            body.append(
                [
                    row["case"],
                    figure,
                    show(row["dense"][figure]),
                    show(row["before"][figure]),
                    show(row["after"][figure]),
                    "" if target is None else f"{target} ({'met' if row['after'][figure] <= target else 'missed'})",
                    f"{row['error_before']:.2%} → {row['error_after']:.2%}",
                    row["steps"],
                    f"{row['start_seconds']:.0f} + {row['seconds']:.0f}",
                ]
            )
    headers = [
        "case",
        "figure",
        "dense",
        "before",
        "after",
        "target",
        "output error, held out",
        "steps",
        "seconds, start + heal",
    ]
    return harness.table(body, headers) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet."""
    parser = harness.options_of(__doc__, only="cases whose name begins so")
    parser.add_argument("--steps", type=int, help="of healing, instead of the default")
    options = parser.parse_args(arguments)
    cases = SMOKE if options.smoke else CASES
    folder = harness.folder_for(HERE, options.smoke)
    results = harness.read_results(folder, {"rows": []})
    results["host"] = host("machine", "torch", "lowrank")
    done = {row["case"] for row in results["rows"]}
    for name in cases:
        if name in done or (options.only and not name.startswith(options.only)):
            continue
        results["rows"].append(run_case(name, cases, options.steps))
        results["rows"].sort(key=lambda row: list(cases).index(row["case"]))
        harness.write_results(folder, results, render)
        print(json.dumps(results["rows"][[row["case"] for row in results["rows"]].index(name)]), flush=True)
    print(render(results))


if __name__ == "__main__":
    main()
