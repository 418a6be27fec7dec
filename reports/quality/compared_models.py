"""The models of the study, their data and measures. Nothing here knows lowrank: packages run it where it is not installed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data, resnet

# Each seed draws so much of the calibration data.
SHARE = 0.8
UNSEEN_SENTENCES = 400
# Smaller tables (two token types, say) stay as they are.
SMALLEST_TABLE = 4096

Run = Callable[[Any], Tensor]


@dataclass(eq=False)
class Subject:
    """One model and its data.

    Attributes:
        name: of the model.
        model: in eval mode.
        calibration: batches drawn by the seed.
        unseen: batches that nothing is fitted to.
        run: a model and a batch to the output that errors are measured on.
        mask: a batch to the positions that count, ``None``: all.
        judged: what else is measured: its name and a function of outputs, those of the dense model, and this subject.
        scopes: names of the matrices of each scope; ``"file"`` is all of them.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    unseen: list[Any]
    run: Callable[[Any, Any], Tensor]
    mask: Callable[[Any], Tensor | None]
    judged: tuple[str, Callable[[list[Tensor], list[Tensor], Subject], float]]
    scopes: dict[str, list[str]]
    labels: Tensor | None = None
    _grams: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def reference(self) -> list[Tensor]:
        """What the dense model answers."""
        return self.outputs(lambda batch: self.run(self.model, batch))

    @torch.no_grad()
    def outputs(self, run: Run) -> list[Tensor]:
        """Run every unseen batch."""
        return [run(batch) for batch in self.unseen]

    def measured(self, run: Run) -> dict[str, float]:
        """Give ‖f(x) − f'(x)‖ / ‖f(x)‖ over the positions that count, and the subject's own measure."""
        found = self.outputs(run)
        wrong = whole = 0.0
        for ours, dense, batch in zip(found, self.reference, self.unseen, strict=True):
            mask = self.mask(batch)
            a, b = (each.double() if mask is None else each[mask].double() for each in (ours, dense))
            wrong += float((a - b).square().sum())
            whole += float(b.square().sum())
        label, judge = self.judged
        return {"error": (wrong / whole) ** 0.5, label: judge(found, self.reference, self)}

    def dense_measure(self) -> float:
        """What the subject's own measure is of the dense model."""
        return self.judged[1](self.reference, self.reference, self)

    def weight(self, name: str) -> Tensor:
        """One matrix, (out, in) float64, a kernel flattened."""
        return self.model.get_submodule(name).weight.detach().double().flatten(1)  # type: ignore[operator, union-attr]

    def is_table(self, name: str) -> bool:
        """Whether rows are looked up, so that there are no inputs to speak of."""
        return isinstance(self.model.get_submodule(name), nn.Embedding)

    @property
    def grams(self) -> dict[str, Tensor]:
        """XᵀX / tokens of every matrix that multiplies, (in, in) float64, over the calibration data."""
        if not self._grams:
            self._grams.update(self._collected())
        return self._grams

    @torch.no_grad()
    def _collected(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        mask: Tensor | None = None

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                rows = rows_of(module, inputs[0], mask).double()
                sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows
                counts[name] = counts.get(name, 0) + len(rows)

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(watch(name))
            for name in self.scopes["file"]
            if not self.is_table(name)
        ]
        try:
            for batch in self.calibration:
                mask = self.mask(batch)
                self.run(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {name: total / counts[name] for name, total in sums.items()}

    def dense_bytes(self, scope: str) -> int:
        """What the scope takes as it is: its matrices, or every tensor of the file."""
        if scope == "file":
            return stored(self.model)
        return sum(4 * self.weight(name).numel() for name in self.scopes[scope])

    def others(self, scope: str) -> int:
        """Bytes of the scope that are no matrix of it: norms, biases, small tables."""
        return self.dense_bytes(scope) - sum(4 * self.weight(name).numel() for name in self.scopes[scope])


def rows_of(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer multiplies, one row a token or patch: (B, T, n) or (B, C, H, W) to (rows, in)."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2).flatten(0, 1)
    return x[mask] if mask is not None and x.dim() == 3 else x.flatten(0, -2)


def stored(model: nn.Module) -> int:
    """Bytes of a model's tensors, shared ones once."""
    found = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.nbytes}
    return sum(found.values())


def matrices(model: nn.Module) -> list[str]:
    """Names of all that can be compressed, those that share a weight once."""
    names, seen = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) or id(module.weight) in seen:
            continue
        if isinstance(module, nn.Embedding) and module.weight.numel() < SMALLEST_TABLE:
            continue
        seen.add(id(module.weight))
        names.append(name)
    return names


def drawn(items: Sequence[Any], seed: int) -> list[Any]:
    """Draw a share of them."""
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[: int(SHARE * len(shuffled))]


def _attended(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def drift(found: list[Tensor], dense: list[Tensor], subject: Subject) -> float:
    """Mean of 1 − cos of the sentence embeddings (means over a sentence's tokens)."""
    turned = []
    for ours, other, batch in zip(found, dense, subject.unseen, strict=True):
        mask = batch["attention_mask"][:, :, None]
        a, b = ((each * mask).double().sum(dim=1) for each in (ours, other))
        turned.append(1.0 - F.cosine_similarity(a, b, dim=1))
    return float(torch.cat(turned).mean())


def perplexity(found: list[Tensor], dense: list[Tensor], subject: Subject) -> float:
    """Exp of the mean negative log-likelihood of a token."""
    total, count = 0.0, 0
    for logits, batch in zip(found, subject.unseen, strict=True):
        mask = batch["attention_mask"].bool()[:, 1:]
        total += float(F.cross_entropy(logits[:, :-1][mask], batch["input_ids"][:, 1:][mask], reduction="sum"))
        count += int(mask.sum())
    return float(torch.tensor(total / count).exp())


def top1(found: list[Tensor], dense: list[Tensor], subject: Subject) -> float:
    """Share of images that are classified rightly."""
    assert subject.labels is not None
    return float(torch.cat(found).argmax(dim=1).eq(subject.labels).float().mean())


def minilm(seed: int) -> Subject:
    """all-MiniLM-L6-v2: calibrated on sts/calibration.txt, measured on 400 sentences of sts/eval.tsv."""
    model, tokenizer = data.minilm()
    unseen = sorted({sentence for row in data.sentence_pairs() for sentence in row[1:3]})
    random.Random(0).shuffle(unseen)
    names = matrices(model)
    return Subject(
        "minilm",
        model,
        data.tokenized(tokenizer, drawn(data.sentences(), seed)),
        data.tokenized(tokenizer, unseen[:UNSEEN_SENTENCES]),
        lambda model, batch: model(**batch).last_hidden_state,
        _attended,
        ("drift", drift),
        {"encoder": [name for name in names if name.startswith("encoder.")], "file": names},
    )


def stories(seed: int) -> Subject:
    """stories260K (Llama, tied embeddings): calibrated on tinystories/calibration.txt, measured on tinystories/eval.txt."""
    model, tokenizer = data.stories()
    texts = [each for each in data.text("tinystories/calibration.txt").split("<|endoftext|>") if each.strip()]
    batches = data.tokenized(tokenizer, drawn(texts, seed), 16, 512)
    return Subject(
        "stories260K",
        model,
        [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches],
        data.story_batches(tokenizer, "eval.txt"),
        lambda model, batch: model(**batch).logits,
        _attended,
        ("perplexity", perplexity),
        {"file": matrices(model)},
    )


def resnet20(seed: int) -> Subject:
    """ResNet-20: calibrated on training images, measured on half of cifar10/eval.npz."""
    model = resnet.pretrained(20)
    seen, _ = resnet.images("calibration")
    images, labels = resnet.images("eval")
    _, half = resnet.halves()
    rows = sorted(drawn(range(len(seen)), seed))
    return Subject(
        "resnet20",
        model,
        list(seen[rows].split(64)),
        list(images[half].split(125)),
        lambda model, batch: model(batch),
        lambda batch: None,
        ("top-1", top1),
        {"file": matrices(model)},
        labels[half],
    )


def tiny(seed: int) -> Subject:
    """A random BERT of one layer on random tokens, for the quick form."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=80, max_position_embeddings=32, **sizes)).eval()
    batches = [
        {"input_ids": torch.randint(0, 80, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.int64)}
        for _ in range(20)
    ]
    names = matrices(model)
    return Subject(
        "tiny",
        model,
        drawn(batches[:16], seed),
        batches[16:],
        lambda model, batch: model(**batch).last_hidden_state,
        _attended,
        ("drift", drift),
        {"encoder": [name for name in names if name.startswith("encoder.")], "file": names},
    )


SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "minilm": minilm,
    "resnet20": resnet20,
    "stories260K": stories,
    "tiny": tiny,
}
