"""``lowrank finetune`` and ``lowrank merge``: adapters from the shell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from torch import nn

from lowrank import lora, training
from lowrank.checkpoint import save_compressed, stored_tensors
from lowrank.checkpoint.saving import hugging_face_config
from lowrank.cli import data as cli_data
from lowrank.cli.labels import labelled, unlabelled
from lowrank.cli.models import open_model
from lowrank.cli.options import Fraction, common_options, data_options
from lowrank.cli.paths import INPUT, OUTPUT_DIRECTORY, OUTPUT_FILE, Command
from lowrank.cli.shell import check_file, emit, note, write_file
from lowrank.errors import CheckpointError, UsageError
from lowrank.integrations.matplotlib import FORMATS, draw_history
from lowrank.io import (
    WEIGHTS_NAME,
    atomic_directory,
    check_destination,
    copy_side_files,
    printable,
    write_safetensors,
    write_text,
)
from lowrank.io.ownership import MARKER_NAME, marker_text
from lowrank.layers import CompressedLayer
from lowrank.reporting.text import human_bytes

__all__ = ["finetune_command", "merge_command"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
DEFAULT_EPOCHS = 3


def _adapter_options(command: _Command) -> _Command:
    """What the adapter is to be; names and defaults as in PEFT."""
    for option in (
        click.option("--target-modules", help="all-linear, a list with commas, or a regular expression of full names."),
        click.option("--modules-to-save", help="Modules to train whole (a new classifier head), a list with commas."),
        click.option("--dropout", type=float, default=0.0, show_default=True, help="Of the adapters' inputs."),
        click.option("--alpha", type=float, help="The adapter counts alpha / rank times; the rank by default."),
        click.option("--rank", type=int, default=8, show_default=True, help="Rank of the adapters."),
    ):
        command = option(command)
    return command


def _training_options(command: _Command) -> _Command:
    """How long and how fast."""
    for option in (
        click.option(
            "--plot", "plot_file", type=OUTPUT_FILE, help="Draw the losses (.png, .svg or .pdf; extra: plot)."
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the start, order and dropout."
        ),
        click.option("--patience", type=click.IntRange(min=1), help="Stop after this many evaluations without a gain."),
        click.option(
            "--metric", type=click.Choice(["loss", "accuracy", "perplexity"]), default="loss", help="To keep by."
        ),
        click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
        click.option("--lora-plus-ratio", type=float, help="Learning rate of lora_B over that of lora_A."),
        click.option("--mixed-precision", type=click.Choice(["bf16", "fp16"]), help="Autocast."),
        click.option("--gradient-accumulation", type=int, default=1, show_default=True, help="Batches a step."),
        click.option("--warmup", type=float, default=0.0, show_default=True, help="Share of the steps."),
        click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), default="cosine"),
        click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Of matrices."),
        click.option("--lr", type=float, help="Peak learning rate; 2e-4, with --heal-from 1e-3."),
        click.option("--steps", type=int, help="Updates; instead of --epochs."),
        click.option("--epochs", type=int, help=f"Passes over the data; {DEFAULT_EPOCHS} by default."),
    ):
        command = option(command)
    return command


@click.command("finetune", cls=Command, short_help="Train a LoRA adapter on a (compressed) model.")
@click.argument("source", metavar="OUT", type=INPUT)
@click.option("--data", "data_file", type=INPUT, required=True, help="Texts (.txt), or arrays with labels (.npz).")
@click.option("-o", "--output", type=OUTPUT_DIRECTORY, required=True, help="Directory of the adapter to write.")
@click.option("--validation", type=INPUT, help="Data to choose the best step by; without it the last one is kept.")
@click.option(
    "--heal-from", type=INPUT, metavar="ORIGINAL", help="Learn to do what ORIGINAL does instead; no labels needed."
)
@_adapter_options
@_training_options
@click.option("--resume", is_flag=True, help="Go on where a run into OUTPUT was stopped.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the history as JSON.")
@data_options
@common_options
def finetune_command(
    source: Path,
    data_file: Path,
    output: Path,
    validation: Path | None,
    heal_from: Path | None,
    rank: int,
    alpha: float | None,
    dropout: float,
    target_modules: str | None,
    modules_to_save: str | None,
    plot_file: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train an adapter on OUT, a compressed model or a Hugging Face directory, and write it as PEFT does.

    Texts train a causal language model on its own tokens. Arrays of a .npz file are named like the model's inputs; one more,
    labels, holds classes, or floating numbers shaped like the output. With --heal-from no labels are needed: OUT learns to do
    what ORIGINAL does.

    \b
    Example: lowrank finetune smaller --data my-texts.txt -o adapter --epochs 3
    """
    if options["epochs"] is not None and options["steps"] is not None:
        raise UsageError("--epochs or --steps: give one of them")
    if heal_from is not None:
        _refuse_for_healing({**options, "dropout": dropout, "modules_to_save": modules_to_save, "resume": resume})
    inputs = [path for path in (source, data_file, validation, heal_from) if path is not None]
    check_destination(output, overwrite or resume, inputs)
    kind = "" if plot_file is None else _plot_kind(plot_file)
    config = lora.LoRAConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_targets(target_modules),
        modules_to_save=None if modules_to_save is None else _names(modules_to_save),
        init_lora_weights="residual" if heal_from is not None else True,
    )
    data = cli_data.read_data(data_file)
    checks = None if validation is None else cli_data.read_data(validation)
    model = open_model(source, device, quiet)
    options["progress"] = not quiet
    sizes = max_tokens, batch_size
    if heal_from is not None:
        original = open_model(heal_from, device, quiet)
        adapted = lora.add_lora(model, config, inplace=True, original=original, seed=options["seed"])
        train = unlabelled(data, data_file, original, source, *sizes)
        held = None if checks is None else unlabelled(checks, validation, original, source, *sizes)
        settings = {key: options[key] for key in ("epochs", "steps", "seed", "progress")}
        healed = training.heal(
            adapted, original, train, what="adapters", validation=held, batch_size=batch_size,
            lr=1e-3 if options["lr"] is None else options["lr"], **settings,
        )  # fmt: skip
        lora.save_adapter(healed.model, output, overwrite=overwrite)
        report = healed.report
        if plot_file is not None:
            rows = [{"step": step, "loss": loss} for step, loss in enumerate(report.losses, start=1)]
            errors = [{"step": 0, "value": report.error_before}, {"step": report.steps, "value": report.error_after}]
            write_file(plot_file, draw_history(rows, errors, f"{report.metric} error", kind))
        text = (
            f"{report.metric} error on {report.samples_held_out} samples not trained on: "
            f"{report.error_before:.4g} before, {report.error_after:.4g} after {report.steps} steps"
        )
        _finished(output, quiet, report.to_json() if as_json else text)
        return
    adapted = lora.add_lora(model, config, inplace=True, seed=options["seed"])
    train = labelled(data, data_file, adapted, source, *sizes, quiet)
    held = None if checks is None else labelled(checks, validation, adapted, source, *sizes, quiet)
    if options["epochs"] is None and options["steps"] is None:
        options["epochs"] = DEFAULT_EPOCHS
    options["lr"] = 2e-4 if options["lr"] is None else options["lr"]
    result = training.finetune(adapted, train, held, output_dir=output, resume=resume, overwrite=overwrite, **options)
    if plot_file is not None:
        write_file(plot_file, result.plot(kind))
    _finished(output, quiet, result.to_json() if as_json else _outcome_text(result))


@click.command("merge", cls=Command, short_help="Put an adapter into the weights of a (compressed) model.")
@click.argument("source", metavar="OUT", type=INPUT)
@click.argument("adapter", type=INPUT)
@click.option("-o", "--output", type=OUTPUT_DIRECTORY, required=True, help="Directory of the merged model to write.")
@click.option("--rank", type=click.IntRange(min=1), help="Truncate factored layers to this rank afterwards.")
@click.option("--max-error", type=Fraction(), help="Truncate factored layers as far as this error of each allows.")
@click.option("--requantize", is_flag=True, help="Let dense int8 layers be rounded anew; others keep their codes.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option("--json", "as_json", is_flag=True, help="Print what it did to each layer as JSON.")
@common_options
def merge_command(
    source: Path,
    adapter: Path,
    output: Path,
    rank: int | None,
    max_error: float | None,
    requantize: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put ADAPTER into OUT, a compressed model or a Hugging Face directory; every layer stays in its format.

    Low-rank layers take the adapter as further rank components, int8 ones without touching a code they had.

    \b
    Example: lowrank merge smaller adapter -o merged
    """
    check_destination(output, overwrite, [source, adapter])
    model = lora.load_adapter(open_model(source, None, quiet), adapter, inplace=True)
    lora.merge_lora(model, rank=rank, max_error=max_error, requantize=requantize)
    report = lora.merge_report(model)
    model = lora.unload_lora(model)
    if any(isinstance(module, CompressedLayer) for module in model.modules()):
        save_compressed(model, output, overwrite=overwrite, source=source)
    else:
        _save_dense(model, output, overwrite, source)
    before, after = human_bytes(report.bytes_before), human_bytes(report.bytes_after)
    text = f"{report}\n\n{len(report.rows)} layers, {before} before and {after} after; error: share of the change that was lost"
    text += _lost_text(report, "--rank" if rank is not None else None if max_error is None else "--max-error")
    _finished(output, quiet, json.dumps([row._asdict() for row in report.rows], indent=1) if as_json else text)


def _lost_text(report: lora.MergeReport, option: str | None) -> str:
    """Which layers keep less than half of the change, and whether the truncation that was asked for is to blame."""
    cut = [row.name for row in report.rows if option and row.name in report.lost and row.note.startswith("truncated")]
    rounded = [name for name in report.lost if name not in cut]
    text = ""
    if cut:
        text += f"\n{option}: truncation took over half of the change from {len(cut)} layers (first {cut[0]}): allow more there"
    if rounded:
        text += (
            f"\nrounding took over half of the change from {len(rounded)} layers (first {rounded[0]}), whose steps are "
            "coarser than it: keep the adapter separate there"
        )
    return text


def _plot_kind(path: Path) -> str:
    """Of the picture, by the name of its file; what would fail after training fails now."""
    check_file(path)
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(f"--plot {printable(path)}: a plot is a .png, .svg or .pdf file")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot: plots need matplotlib, which is not installed; pip install 'lowrank[plot]'")
    return kind


def _targets(text: str | None) -> str | list[str] | None:
    """PEFT's ``target_modules``: a list where there are commas or a plain name, else ``all-linear`` or a pattern.

    Example:
        >>> _targets("q_proj, v_proj"), _targets("all-linear"), _targets("query")
        (['q_proj', 'v_proj'], 'all-linear', ['query'])
    """
    if text is None or text == "all-linear":
        return text
    names = _names(text)
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain else text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{text!r}: names no module; give names with commas between them, or leave the option out")
    return names


def _refuse_for_healing(options: dict[str, Any]) -> None:
    unused = {"metric": "loss", "patience": None, "mixed_precision": None, "lora_plus_ratio": None, "warmup": 0.0}
    unused |= {"schedule": "cosine", "weight_decay": 0.01, "gradient_accumulation": 1, "gradient_checkpointing": False}
    unused |= {"dropout": 0.0, "modules_to_save": None, "resume": False}
    given = [name for name, default in unused.items() if options[name] != default]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')}: not with --heal-from, which has a recipe of its own; leave it out"
        )


def _outcome_text(result: training.TrainingResult) -> str:
    share = 100 * result.trainable / max(result.total, 1)
    lines = [f"trainable params: {result.trainable:,} || all params: {result.total:,} || trainable%: {share:.4f}"]
    losses = [row["loss"] for row in result.history if row["loss"] is not None] or [math.nan]
    stopped = ", stopped early" if result.stopped_early else ""
    skipped = sum("skipped" in row for row in result.history)
    stopped += f", {skipped} of them without an update" if skipped else ""
    lines.append(
        f"{result.steps} steps{stopped}: training loss {losses[0]:.4g} at the first, {losses[-1]:.4g} at the last"
    )
    if result.best_value is not None:
        start = result.evaluations[0]["value"]
        lines.append(
            f"validation {result.metric}: {start:.4g} before, {result.best_value:.4g} at step {result.best_step} (kept)"
        )
    return "\n".join(lines)


def _save_dense(model: nn.Module, output: Path, overwrite: bool, source: Path) -> None:
    """A dense model as a Hugging Face directory."""
    config = hugging_face_config(model)
    if config is None:
        raise CheckpointError(
            f"{printable(source)}: a {type(model).__name__} without a config cannot be saved as a directory"
        )
    with atomic_directory(output, overwrite) as partial:
        write_safetensors(partial / WEIGHTS_NAME, stored_tensors(model))
        write_text(partial / MARKER_NAME, marker_text())
        write_text(partial / "config.json", json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        copy_side_files(source, partial)


def _finished(output: Path, quiet: bool, text: str) -> None:
    if not quiet:
        note(f"written to {printable(output)}")
    emit(text)
