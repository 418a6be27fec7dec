"""Six models, each with data to calibrate on, to verify on, and to measure on that nothing else saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _shared import characters, data, resnet

TRAINING_STEPS = 500


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
    model, tokenizer = data.minilm()
    unseen = sorted({sentence for row in data.sentence_pairs() for sentence in row[1:3]})
    return Case(model, data.tokenized(tokenizer, data.sentences()), data.tokenized(tokenizer, unseen))


def stories() -> Case:
    """stories260K (Llama): calibrate on tinystories/calibration.txt, measure on tinystories/eval.txt."""
    model, tokenizer = data.stories()
    return Case(model, data.story_batches(tokenizer, "calibration.txt"), data.story_batches(tokenizer, "eval.txt"))


def gpt() -> Case:
    """A GPT-2 of 3.2 million parameters on the characters of shakespeare/train.txt: calibrate on valid.txt, measure on test.txt."""
    texts = {name: data.text(f"shakespeare/{name}.txt") for name in ("train", "valid", "test")}
    letters = {letter: index for index, letter in enumerate(sorted(set(texts["train"])))}

    def ids(name: str) -> Tensor:
        return torch.tensor([letters[letter] for letter in texts[name] if letter in letters])

    stored = data.REPORTS / "budget" / ".cache" / "gpt.safetensors"
    model = data.kept(characters.gpt(len(letters)), stored, lambda untrained: _train(untrained, ids("train")))

    def batches(name: str) -> list[Any]:
        rows = ids(name)
        rows = rows[: len(rows) // characters.CONTEXT * characters.CONTEXT].reshape(-1, characters.CONTEXT)
        return [{"input_ids": rows[start : start + 16]} for start in range(0, len(rows), 16)]

    return Case(model, batches("valid"), batches("test"))


def _train(model: nn.Module, tokens: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=TRAINING_STEPS)
    model.train()
    for step in range(TRAINING_STEPS):
        starts = torch.randint(0, len(tokens) - characters.CONTEXT, (32,), generator=generator)
        batch = torch.stack([tokens[start : start + characters.CONTEXT] for start in starts])
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
    inputs, classes = data.digits(shuffled=True)
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
