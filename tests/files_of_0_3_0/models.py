"""The models whose compressed files are kept here: how each was made, and with which formats."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ADAPTERS", "CASES", "FOLDER", "Case", "adapter_base", "machine", "plain_adapter_input"]

FOLDER = Path(__file__).resolve().parent
INT8, WEIGHT_ONLY = {"format": "int8", "activations": "int8"}, {"format": "int8", "activations": "float"}
WORDS, WIDTH, LENGTH, STEP = 40, 16, 8, 12


class Words(nn.Module):
    """Three embeddings, one of them tied to the head, and a linear layer in every format; one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.types = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 32)
        self.mid = nn.Linear(32, 32)
        self.again = self.mid
        self.down = nn.Linear(32, WIDTH)
        self.side = nn.Linear(WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 32)
        self.back = nn.Linear(32, WIDTH)
        self.keep = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((WIDTH,), 0.25))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.types((tokens * 7) % WORDS) + self.places((tokens * 3) % WORDS) + self.shift
        hidden = hidden + self.down(torch.relu(self.again(torch.relu(self.mid(self.up(hidden))))))
        hidden = hidden + self.narrow(torch.relu(self.side(hidden)))
        hidden = hidden + self.keep(self.back(torch.relu(self.last(hidden))))
        return self.head(self.norm(hidden))


class Images(nn.Module):
    """Convolutions in every format and scheme, along two dimensions and one, with groups; a BatchNorm that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.spatial = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.channel = nn.Conv2d(12, 12, 3, padding="same")
        self.grouped = nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2)
        self.both = nn.Conv2d(16, 16, 3, padding=1)
        self.line = nn.Conv1d(16, 16, 3, padding=2, dilation=2)
        self.thin = nn.Conv1d(16, 16, 3)
        self.tight = nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.channel(torch.relu(self.spatial(x))))
        x = torch.relu(self.both(torch.relu(self.grouped(x)))).flatten(2)
        return self.tight(self.thin(torch.relu(self.line(x)))).mean(dim=2)


class Steps(nn.Module):
    """Every recurrent layer and cell, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(STEP, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, STEP, batch_first=True)
        self.rnn = nn.RNN(STEP, STEP, nonlinearity="relu", batch_first=True)
        self.attention = nn.MultiheadAttention(STEP, 2, batch_first=True)
        self.lstm_cell = nn.LSTMCell(STEP, STEP)
        self.gru_cell = nn.GRUCell(STEP, STEP)
        self.rnn_cell = nn.RNNCell(STEP, STEP)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        states = states + self.attention(states, states, states, need_weights=False)[0]
        hidden = self.lstm_cell(states[:, 0])[0]
        hidden = self.gru_cell(states[:, 1], hidden)
        return self.rnn_cell(states[:, 2], hidden)


class Integers(nn.Module):
    """Layers whose products are of integers, each on the model's own input: their outputs are equal on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(24, 20)
        self.plain = nn.Linear(24, 20, bias=False)
        self.thin = nn.Linear(24, 32)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.grouped = nn.Conv1d(24, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        picture, column = x.reshape(-1, 6, 2, 2), x[:, :, None]
        images, lines = self.conv(picture).flatten(1), self.grouped(column).flatten(1)
        return torch.cat([self.line(x), self.plain(x), self.thin(x), images, lines], dim=1)


@dataclass(frozen=True)
class Case:
    """One compressed directory.

    Attributes:
        build: makes the model, with any weights.
        data: a generator to ((inputs,) of one call, batches to calibrate with).
        overrides, options: of ``compress_model``.
        exact: whether the outputs must be equal to the last bit on every machine.
        rounded: whether an activation is rounded to int8 after floating-point arithmetic that may differ between machines.
    """

    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], tuple[tuple[Any, ...], list[Any]]]
    overrides: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    rounded: bool = True


def _tokens(generator: torch.Generator) -> tuple[tuple[Any, ...], list[Any]]:
    drawn = torch.randint(WORDS, (36, LENGTH), generator=generator)
    return (drawn[:4],), list(drawn[4:].split(8))


def _normal(*shape: int) -> Callable[[torch.Generator], tuple[tuple[Any, ...], list[Any]]]:
    def draw(generator: torch.Generator) -> tuple[tuple[Any, ...], list[Any]]:
        drawn = torch.randn(28, *shape, generator=generator)
        return (drawn[:4],), list(drawn[4:].split(8))

    return draw


def causal_model() -> nn.Module:
    """A llama of two layers with tied embeddings, by transformers."""
    from tiny_models import make_causal_model

    return make_causal_model(width=16, tied=True)


def _causal_data(generator: torch.Generator) -> tuple[tuple[Any, ...], list[Any]]:
    drawn = torch.randint(4, 28, (36, LENGTH), generator=generator)
    return (drawn[:4],), list(drawn[4:].split(8))


CASES = {
    "words": Case(
        Words,
        _tokens,
        {
            "embed": "int8",
            "types": {"format": "lowrank", "rank": 5},
            "places": {"format": "lowrank-int8", "rank": 6},
            "up": WEIGHT_ONLY,
            "mid": {"format": "lowrank-int8", "rank": 7, "activations": "int8"},
            "down": {"format": "lowrank", "rank": 6},
            "side": INT8,
            "narrow": {"format": "int8", "bits": 5, "activations": "float"},
            "last": {"format": "lowrank-int8", "rank": 7, "activations": "float"},
            "back": INT8,
            "keep": "dense",
        },
    ),
    "weight_only": Case(
        Words,
        _tokens,
        {
            "embed": "int8",
            "types": "int8",
            "places": "dense",
            "[udmnslb][pioaie]*": {"format": "int8", "activations": "float"},
            "keep": {"format": "lowrank-int8", "rank": 5, "activations": "float"},
        },
        {"loss_aware": False},
        rounded=False,
    ),
    "images": Case(
        Images,
        _normal(3, 6, 6),
        {
            "first": INT8,
            "spatial": {"format": "lowrank", "rank": 6, "scheme": "spatial"},
            "channel": {"format": "lowrank", "rank": 5, "scheme": "channel"},
            "grouped": WEIGHT_ONLY,
            "both": {"format": "lowrank-int8", "rank": 6, "scheme": "spatial", "activations": "float"},
            "line": INT8,
            "thin": {"format": "lowrank", "rank": 6},
            "tight": {"format": "lowrank-int8", "rank": 7, "activations": "int8"},
        },
        {"fold_batchnorm": True},
    ),
    "steps": Case(
        Steps,
        _normal(5, STEP),
        dict.fromkeys(["lstm", "gru", "rnn", "attention", "lstm_cell", "gru_cell", "rnn_cell"], WEIGHT_ONLY),
        rounded=False,
    ),
    "integers": Case(
        Integers,
        _normal(24),
        {"line": INT8, "plain": INT8, "thin": {"format": "lowrank-int8", "rank": 8, "activations": "int8"}}
        | dict.fromkeys(["conv", "grouped"], INT8),
        exact=True,
    ),
    "llama": Case(
        causal_model,
        _causal_data,
        {
            "model.embed_tokens": "int8",
            "*.q_proj": WEIGHT_ONLY,
            "*.o_proj": {"format": "lowrank", "rank": 5},
            "*.gate_proj": INT8,
            "*.up_proj": {"format": "lowrank-int8", "rank": 6, "activations": "int8"},
        },
        {"metric": "kl"},
    ),
}


class Adapted(nn.Module):
    """One layer of each kind that takes an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.Linear(8, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.up(hidden)))


# The options of each adapter's LoRAConfig; "over_int8" stands on the compressed model "words".
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["up", "head"]},
    "scaled": {"target_modules": ["up", "head"], "use_rslora": True, "rank_pattern": {"head": 3}},
    "dora": {"target_modules": ["up", "head"], "use_dora": True},
    "embedding": {"target_modules": ["embed"]},
    "convolution": {"target_modules": ["conv"]},
    "saved_module": {"target_modules": ["up"], "modules_to_save": ["head"]},
    "over_int8": {"target_modules": ["side", "up", "mid"]},
}


def plain_adapter_input() -> Tensor:
    """Tokens for :class:`Adapted` and :class:`Words`."""
    return torch.arange(24).reshape(3, 8) % 12


def adapter_base(name: str) -> nn.Module:
    """What an adapter stands on; of the dense ones the weights are still to be read from ``adapters/base.safetensors``."""
    import lowrank

    if name == "over_int8":
        return lowrank.load_model(FOLDER / "words", Words)
    return Adapted().eval()


def machine() -> dict[str, str]:
    """What factorisations and floating-point sums may depend on to the last bit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
