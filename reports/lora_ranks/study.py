"""What does the rank of an adapter buy, next to full fine-tuning? See README.md.

Run: ``python reports/lora_ranks/study.py`` (resumes where it stopped; ``--smoke`` is for CI). Times and peak memory are
taken at the end, with nothing else running; ``--again timing`` takes them anew.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data as shared
from _shared import harness
from _shared.characters import LETTERS, gpt, ids_of, perplexity, pretrained, stretches, texts
from _shared.host import host

import lowrank

HERE = Path(__file__).resolve().parent
# A rank, "8 by score" (ranks of 8 on average, given by lowrank.allocate_ranks), or None for the whole model.
Rank = int | str | None
BY_SCORE = "8 by score"
RANKS: tuple[Rank, ...] = (4, 8, BY_SCORE, 16, 32, None)
TARGETS = ["c_attn", "c_proj", "c_fc"]
ADAPTATION = 100
LORA_RATE, FULL_RATE = 2e-3, 5e-4


@torch.no_grad()
def samples(model: nn.Module, prompt: str, count: int = 16, length: int = 112) -> list[str]:
    """Texts drawn at temperature 0.8 from the same random numbers for every model."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = ids_of(prompt).repeat(count, 1)
    while ids.shape[1] < length:
        logits = model(input_ids=ids).logits[:, -1] / 0.8
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ["".join(LETTERS[index] for index in row) for row in ids.tolist()]


def distinct(texts: list[str], n: int) -> float:
    """Share of the word n-grams that are different ones."""
    grams = [tuple(words[i : i + n]) for text in texts if (words := text.split()) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def adapt(base: nn.Module, rank: Rank, targets: list[str], batches: list[dict[str, Tensor]] | None = None) -> nn.Module:
    """A copy with an adapter of this rank, or the whole model trainable.

    Args:
        batches: to score layers on, for ranks "by score".
    """
    torch.manual_seed(0)
    if rank is None:
        return copy.deepcopy(base).requires_grad_(True)
    if isinstance(rank, str):
        average = int(rank.split()[0])
        config = lowrank.LoRAConfig(r=average, lora_alpha=2 * average, target_modules=targets)
        pattern = lowrank.allocate_ranks(base, config, batches or [], seed=0)
        torch.manual_seed(0)
        # The same scaling as everywhere: alpha = 2 r, layer by layer.
        alphas = {name: 2 * each for name, each in pattern.items()}
        return lowrank.add_lora(base, config.replace(rank_pattern=pattern, alpha_pattern=alphas))
    # The last layer of the classifier has ten outputs: no adapter of its is of a higher rank.
    narrow = {"rank_pattern": {"4": min(rank, 10)}, "alpha_pattern": {"4": 2 * min(rank, 10)}} if "4" in targets else {}
    return lowrank.add_lora(base, lowrank.LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **narrow))


def run_language(base: nn.Module, task: str, rank: Rank, data: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Adapt to a task and look at perplexity and what it writes."""
    train = stretches(data["train"], 32, steps, seed=1)
    model = adapt(base, rank, TARGETS, train[:8])
    trainable, total = lowrank.trainable_parameters(model)
    layers = [module for module in model.modules() if isinstance(module, lowrank.LoRALinear)]
    result = lowrank.finetune(
        model,
        train,
        validation=stretches(data["valid"], 32)[:8],
        steps=steps,
        lr=FULL_RATE if rank is None else LORA_RATE,
        warmup=20,
        evaluate_every=50,
        seed=0,
        progress=False,
    )
    written = samples(model, "\n")
    return {
        "task": task,
        "rank": rank,
        "trainable": trainable,
        "total": total,
        "ranks": [layer.rank_of("default") for layer in layers],
        "best_step": result.best_step,
        "valid": perplexity(model, data["valid"]),
        "test": perplexity(model, data["test"]),
        "sample": written[0],
        "samples": written,
    }


def peak_memory(rank: Rank, steps: int = 3) -> dict[str, int]:
    """Resident bytes of this process before training, and at the peak of a few steps. Run in a process of its own."""
    base, data = pretrained(torch.empty(0, dtype=torch.long)), texts()["wikitext2"]["train"]
    train = stretches(data, 32, steps, seed=1)
    model = adapt(base, rank, TARGETS, train)
    del base
    with open("/proc/self/statm", encoding="ascii") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    lowrank.finetune(model, train, steps=steps, lr=1e-4, seed=0, progress=False)
    return {"before": before, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def timing(base: nn.Module, data: Tensor, ranks: tuple[Rank, ...], rounds: int = 7, steps: int = 2) -> dict[str, Any]:
    """Seconds a step in turns, one after the other in every round, so that all see the same machine; and peak memory."""
    train = stretches(data, 32, steps, seed=1)
    models = {str(rank): adapt(base, rank, TARGETS, train) for rank in ranks}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            lowrank.finetune(model, train, steps=steps, lr=1e-5, seed=0, progress=False)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / steps)
    return {"seconds": seconds, "load": os.getloadavg()[0]}


def memory(ranks: tuple[Rank, ...]) -> dict[str, dict[str, int]]:
    """Peak memory of training, each case in a process of its own."""
    found = {}
    for rank in ranks:
        command = [sys.executable, str(Path(__file__).resolve()), "--memory", json.dumps(rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(rank)] = json.loads(done.stdout.splitlines()[-1])
    return found


def digits() -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """scikit-learn's digits enlarged to 28 × 28, upright and turned by 90 degrees: three fifths, a fifth, a fifth."""
    small, classes = shared.digits(shuffled=True)
    large = F.interpolate(small.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear", align_corners=False)
    fifth = len(large) // 5
    parts = {"train": slice(0, 3 * fifth), "valid": slice(3 * fifth, 4 * fifth), "test": slice(4 * fifth, None)}

    def cut(pictures: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (pictures.flatten(1)[part], classes[part]) for name, part in parts.items()}

    return cut(large), cut(torch.rot90(large, 1, (2, 3)))


def batches(pair: tuple[Tensor, Tensor], size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """(inputs, labels) by the batch."""
    return list(zip(pair[0].split(size), pair[1].split(size), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    """Share of the images that are classified rightly."""
    return float(model.eval()(pair[0]).argmax(1).eq(pair[1]).float().mean())


def run_digits(epochs: int, ranks: tuple[Rank, ...]) -> list[dict[str, Any]]:
    """An MLP 784-128-256-10 trained on upright digits, adapted to turned ones."""
    upright, turned = digits()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    lowrank.finetune(base, batches(upright["train"]), epochs=epochs, lr=1e-3, seed=0, progress=False)
    rows = [
        {
            "rank": "none",
            "trainable": 0,
            "upright": accuracy(base, upright["test"]),
            "turned": accuracy(base, turned["test"]),
        }
    ]
    for rank in ranks:
        model = adapt(base, rank, ["0", "2", "4"])
        trainable, _ = lowrank.trainable_parameters(model)
        train = batches(turned["train"])
        lowrank.finetune(model, train, epochs=epochs, lr=1e-3 if rank is None else 3e-3, seed=0, progress=False)
        rows.append(
            {
                "rank": rank,
                "trainable": trainable,
                "upright": accuracy(model, upright["test"]),
                "turned": accuracy(model, turned["test"]),
            }
        )
    return rows


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""

    def label(rank: Any) -> str:
        return {None: "full", "none": "not adapted"}.get(rank, str(rank))

    def spread(rank: Any) -> list[str]:
        taken = results["timing"]["seconds"][str(rank)]
        milliseconds = [1e3 * value for value in harness.quartiles(taken, inside=False)]
        grown = results["memory"][str(rank)]
        # Scoring the layers trains too, and leaves memory behind that the rise then does not show.
        rise = "" if isinstance(rank, str) else f"{(grown['peak'] - grown['before']) / 1e6:.0f}"
        return [harness.middle_and_quartiles(milliseconds, 0, " to "), rise]

    lines: list[str] = []
    for task in ("shakespeare", "wikitext2"):
        before = [f"{results['base'][task][part]:.3f}" for part in ("valid", "test")]
        body = [["not adapted", "0", "", "", *before, "", ""]]
        body += [
            [
                label(row["rank"]),
                f"{row['trainable']:,}",
                *spread(row["rank"]),
                f"{row['valid']:.3f}",
                f"{row['test']:.3f}",
                " / ".join(f"{distinct(row['samples'], n):.2f}" for n in (1, 2, 3)),
                f"{row['judged']:.2f}",
            ]
            for row in results["language"]
            if row["task"] == task
        ]
        header = [
            "rank",
            "trainable",
            "ms a step (quartiles)",
            "training adds, MB",
            "perplexity, valid",
            "perplexity, test",
            "distinct words / 2-grams / 3-grams",
            "its samples under the full model",
        ]
        lines += [f"**{task}** (perplexity a character)", "", harness.table(body, header), ""]
    body = [
        [label(row["rank"]), f"{row['trainable']:,}", f"{row['turned']:.1%}", f"{row['upright']:.1%}"]
        for row in results["digits"]
    ]
    header = ["rank", "trainable", "accuracy on turned digits", "on upright ones"]
    lines += [
        "**MLP 784-128-256-10, digits turned by 90°**",
        "",
        harness.table(body, header),
        "",
        "Samples (the first of sixteen):",
        "",
    ]
    for row in results["language"]:
        if row["rank"] in (4, 32, None):
            text = row["sample"].strip().replace("\n", " / ").replace("`", "'")
            lines.append(f"* {row['task']}, {label(row['rank'])}: `{text}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table anew."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--memory", help="print the peak memory of training at this rank (JSON); what the study calls")
    parser.add_argument("--again", choices=["timing"], help="take times and memory anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        base = gpt(len(LETTERS), 1, 32)
        data = {part: torch.arange(2000) % len(LETTERS) for part in ("train", "valid", "test")}
        for rank in (4, BY_SCORE):
            print(run_language(base, "shakespeare", rank, data, 4))
        print(timing(base, data["train"], (4, None), rounds=1))
        print(run_digits(1, (4, None)))
        return
    if options.memory is not None:
        print(json.dumps(peak_memory(json.loads(options.memory))))
        return
    results = harness.read_results(HERE, {})
    results["host"] = host("machine", "torch", "threads")
    data = texts()
    base = pretrained(data["pretraining"]["train"])

    def keep() -> None:
        harness.write_results(HERE, results, None)

    if "base" not in results:
        results["base"] = {
            task: {part: perplexity(base, data[task][part]) for part in ("valid", "test")}
            for task in ("shakespeare", "wikitext2")
        }
        keep()
    if "digits" not in results:
        digit_ranks = tuple(rank for rank in RANKS if not isinstance(rank, str))
        results["digits"] = run_digits(30, digit_ranks)
        keep()
    rows = results.setdefault("language", [])
    for task in ("shakespeare", "wikitext2"):
        for rank in RANKS:
            if not any((row["task"], row["rank"]) == (task, rank) for row in rows):
                rows.append(run_language(base, task, rank, data[task], ADAPTATION))
                print({key: value for key, value in rows[-1].items() if not key.startswith("sample")}, flush=True)
                keep()
        if any("judged" not in row for row in rows if row["task"] == task):
            judge = adapt(base, None, [])
            train = stretches(data[task]["train"], 32, ADAPTATION, seed=1)
            lowrank.finetune(judge, train, steps=ADAPTATION, lr=FULL_RATE, warmup=20, seed=0, progress=False)
            for row in rows:
                if row["task"] == task:
                    row["judged"] = judged(judge, row["samples"])
            keep()
    if "timing" not in results or options.again == "timing":
        results["timing"] = timing(base, data["wikitext2"]["train"], RANKS)
        results["memory"] = memory(RANKS)
        keep()
    harness.write_results(HERE, results, render)
    print(render(results))


@torch.no_grad()
def judged(model: nn.Module, written: list[str]) -> float:
    """Perplexity of sampled texts under the fully fine-tuned model."""
    rows = torch.stack([ids_of(text) for text in written])
    return math.exp(float(model.eval()(input_ids=rows, labels=rows).loss))


if __name__ == "__main__":
    main()
