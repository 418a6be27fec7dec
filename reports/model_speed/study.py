"""Are whole models faster, next to what people use today? See README.md.

Run: ``python reports/model_speed/study.py`` (makes an environment of its own for torchao under ``.cache``; ``--smoke`` is for CI).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data, harness, resnet
from _shared.host import host

import lowrank

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".cache" / "environment"
TORCHAO = "torchao==0.18.0"
OURS = "lowrank"
BUDGET = 0.1
ORDER = ("float32", "float32, channels last", "bfloat16", "torch dynamic int8", "torchao int8")


def enter_environment() -> None:
    """Go on in an environment that has torchao too; everything else comes from the one this was started in."""
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # A .pth of a folder is read for modules only, so the finder of an editable install has to be named as well.
        folders = [sysconfig.get_path("purelib"), str(HERE.parents[1])]
        Path(packages, "base.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", TORCHAO], check=True)
    os.execv(python, [str(python), *sys.argv])


def minilm(smoke: bool) -> tuple[nn.Module, dict[str, dict[str, Tensor]], list[Any]]:
    """all-MiniLM-L6-v2, a sentence and 32 × 64 tokens of real text, and calibration batches."""
    if smoke:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        ).eval()
        ids = torch.randint(0, 100, (64, 8))
        return model, {"1 sentence": {"input_ids": ids[:1]}}, list(ids.split(16))
    model, tokenizer = data.minilm()
    texts = data.sentences()

    def encode(chosen: list[str], **options: Any) -> dict[str, Tensor]:
        return dict(tokenizer(chosen, return_tensors="pt", **options))

    ordered = sorted(texts, key=len)
    calibration = [encode(ordered[start : start + 32], padding=True) for start in range(0, len(ordered), 32)]
    middle = ordered[len(ordered) // 2]
    # Sixteen sentences in a row are over 64 tokens each: no padding.
    rows = [" ".join(texts[16 * index : 16 * index + 16]) for index in range(32)]
    inputs = {"1 sentence": encode([middle]), "32 x 64 tokens": encode(rows, truncation=True, max_length=64)}
    return model, inputs, calibration


def language_contenders(model: nn.Module, smoke: bool) -> dict[str, nn.Module]:
    """The same model in float32, bfloat16, torch's dynamic int8 and torchao's."""
    with warnings.catch_warnings():
        # torch.ao.quantization announces its own removal; it is what people use today.
        warnings.simplefilter("ignore")
        found = {
            "float32": model,
            "bfloat16": copy.deepcopy(model).to(torch.bfloat16),
            "torch dynamic int8": torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
        }
        if not smoke:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            found["torchao int8"] = copy.deepcopy(model)
            quantize_(found["torchao int8"], Int8DynamicActivationInt8WeightConfig())
    return found


def resnet20(smoke: bool) -> tuple[nn.Module, dict[str, Tensor], list[Any], list[Any]]:
    """ResNet-20, one image and 64, calibration images, and test images to verify on."""
    if smoke:
        torch.manual_seed(0)
        images = torch.randn(64, 3, 32, 32)
        return resnet.ResNet(8).eval(), {"1 image": images[:1]}, [images], [torch.randn(64, 3, 32, 32)]
    seen, (held, _) = resnet.images("calibration")[0], resnet.images("eval")
    verify = resnet.halves()[0]
    return (
        resnet.pretrained(20),
        {"1 image": seen[:1], "64 images": seen[:64]},
        list(seen.split(64)),
        list(held[verify].split(125)),
    )


def run_of(model: nn.Module, given: Any) -> Callable[[], Any]:
    """A call of the model on inputs of its dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(given, Tensor):
        images = given.to(dtype)
        return lambda: model(images)
    return lambda: model(**given)


def compare(models: dict[str, nn.Module], given: Any, rounds: int, at_least: float) -> dict[str, Any]:
    """Every model in turn, round after round; ours against each, within the round."""
    calls = {name: run_of(model, given) for name, model in models.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < at_least or not count:
                call()
                count += 1
            seconds[name].append(spent / count)
    return {
        "milliseconds": {
            name: harness.quartiles([1e3 * value for value in values], 3) for name, values in seconds.items()
        },
        "speedup": {
            ours: {
                name: harness.quartiles(
                    [other / own for other, own in zip(seconds[name], seconds[ours], strict=True)], 3
                )
                for name in calls
                if not name.startswith(OURS)
            }
            for ours in calls
            if ours.startswith(OURS)
        },
    }


def measure(smoke: bool, rounds: int, at_least: float) -> list[dict[str, Any]]:
    """All models at all sizes."""
    cases = []
    model, inputs, calibration = minilm(smoke)
    models = language_contenders(model, smoke)
    sizes = {}
    for name, objective in ((OURS, "size"), (f"{OURS} for latency", "latency")):
        result = lowrank.compress_model(
            model, error_budget=BUDGET, calibration=calibration, objective=objective, progress=False
        )
        models[name] = result.model
        sizes[name] = [result.report.totals["size_ratio"], result.report.totals["error_upper"]]
    for size, given in inputs.items():
        tokens = list(given["input_ids"].shape)
        cases.append({"model": "MiniLM", "input": size, "shape": tokens, "sizes": sizes})
        cases[-1] |= compare(models, given, rounds, at_least)
        print(json.dumps(cases[-1]["milliseconds"]), flush=True)
    network, images, calibration, verification = resnet20(smoke)
    nets: dict[str, nn.Module] = {
        "float32": network,
        "float32, channels last": copy.deepcopy(network).to(memory_format=torch.channels_last),
        "bfloat16": copy.deepcopy(network).to(torch.bfloat16),
    }
    sizes = {}
    for name, options in ((OURS, {}), (f"{OURS}, BatchNorm folded", {"fold_batchnorm": True})):
        result = lowrank.compress_model(
            network,
            error_budget=BUDGET,
            calibration=calibration,
            validation=verification,
            progress=False,
            **options,  # type: ignore[arg-type]
        )
        nets[name] = result.model
        sizes[name] = [result.report.totals["size_ratio"], result.report.totals["error_upper"]]
    for size, given in images.items():
        cases.append({"model": "ResNet-20", "input": size, "shape": list(given.shape), "sizes": sizes})
        cases[-1] |= compare(nets, given, rounds, at_least)
        print(json.dumps(cases[-1]["milliseconds"]), flush=True)
    return cases


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    about = results["host"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['capability']}, torch {about['torch']}, torchao "
        f"{about['torchao']}, integer route `{about['route']}`. Milliseconds: median (quartiles); speed-up of each compressed "
        "model over each other: median (quartiles) of paired rounds.",
    ]
    for case in results["cases"]:
        ours = sorted(case["speedup"])
        lines += [
            "",
            f"**{case['model']}, {case['input']}** (shape {' × '.join(map(str, case['shape']))}). "
            + "; ".join(
                f"{name}: {ratio:.1%} of the bytes, error at most {error:.1%}"
                for name, (ratio, error) in sorted(case["sizes"].items())
            )
            + ".",
            "",
            "| | ms | " + " | ".join(f"speed-up of {name}" for name in ours) + " |",
            "|---|---:|" + "---:|" * len(ours),
        ]
        for name in [*(name for name in ORDER if name in case["milliseconds"]), *ours]:
            cells = [
                "" if name.startswith(OURS) else harness.middle_and_quartiles(case["speedup"][own][name], 2)
                for own in ours
            ]
            taken = harness.middle_and_quartiles(case["milliseconds"][name], 2)
            lines.append(f"| {name} | {taken} | {' | '.join(cells)} |")
    slower = [
        f"* {own} is slower than {name} on {case['model']}, {case['input']}: {ratio[1]:.2f}×."
        for case in results["cases"]
        for own, others in sorted(case["speedup"].items())
        for name, ratio in sorted(others.items())
        if ratio[1] < 1.0
    ]
    return "\n".join([*lines, "", *(slower or ["No compressed model is slower than any of the others."])]) + "\n"


def main() -> None:
    """Measure everything in one run and write it."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.smoke:
        enter_environment()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    folder = harness.folder_for(HERE, arguments.smoke)
    rounds, at_least = (3, 0.001) if arguments.smoke else (25, 0.1)
    about = host("cpu", "threads", "capability", "route", "torch") | {"torchao": TORCHAO.partition("==")[2]}
    results = {"host": about, "cases": measure(arguments.smoke, rounds, at_least)}
    harness.write_results(folder, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
