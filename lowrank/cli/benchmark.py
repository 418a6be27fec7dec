"""``lowrank benchmark``: how fast a compressed model is, and what plans made for speed go by on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from lowrank.analysis.benchmark import ROUNDS, benchmark
from lowrank.analysis.tuning import measure_timings
from lowrank.cli import data as cli_data
from lowrank.cli.models import model_batches, open_model
from lowrank.cli.options import common_options
from lowrank.cli.paths import INPUT, OUTPUT_FILE, Command, refuse_overlaps
from lowrank.cli.shell import STANDARD_OUTPUT, check_file, emit, emit_report, note, write_file
from lowrank.compression.timings import user_path
from lowrank.errors import StorageError, UsageError
from lowrank.io import printable

__all__ = ["benchmark_command"]

# More batches of a data file than this would only be measured again and again.
_MAX_BATCHES = 4


@click.command(
    "benchmark", cls=Command, short_help="How fast is a compressed model? Layer by layer, next to the original."
)
@click.argument("compressed", type=INPUT, required=False)
@click.option("--against", "source", type=INPUT, help="The original model's directory.")
@click.option("--data", "data_file", type=INPUT, help="A .txt, .npz or .safetensors file; its first batches are run.")
@click.option(
    "--batch", "batch_size", type=click.IntRange(min=1), default=1, show_default=True, help="Samples of a batch."
)
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of a sample.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True, help="Interleaved rounds.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of generated inputs.")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write JSON to a file, - for standard output.")
@click.option("--tune", is_flag=True, help='Measure this machine for objective="latency", and save that for this user.')
@common_options
def benchmark_command(
    compressed: Path | None,
    source: Path | None,
    data_file: Path | None,
    batch_size: int,
    tokens: int,
    rounds: int,
    seed: int,
    json_file: Path | None,
    tune: bool,
    quiet: bool,
) -> None:
    """Time COMPRESSED, a model's directory, in paired, interleaved runs with the original.

    Without --data the model reads random token ids. With --tune (and no COMPRESSED needed) the machine is measured and
    the table saved to $LOWRANK_TIMINGS or the user's settings; compress --objective latency then plans by it.

    \b
    Example: lowrank benchmark smaller --against my-model --batch 32 --tokens 64
    """
    if json_file is not None and json_file != STANDARD_OUTPUT:
        check_file(json_file)
    if compressed is None and not tune:
        raise UsageError("COMPRESSED: name the directory of a model, or give --tune to measure this machine")
    if tune:
        inputs_of_run = (("COMPRESSED", compressed), ("--against", source), ("--data", data_file))
        given = [(name, path) for name, path in inputs_of_run if path is not None]
        refuse_overlaps(given, [("$LOWRANK_TIMINGS", user_path())])
        _tune(quiet)
    if compressed is None:
        return
    data = None if data_file is None else cli_data.read_data(data_file)
    model = open_model(compressed, None, quiet)
    original = None if source is None else open_model(source, None, quiet)
    if data is None:
        inputs: list[Any] = [_random_tokens(model, batch_size, tokens, seed)]
    else:
        inputs = (model_batches(data, data_file, model, compressed, tokens, batch_size) or [])[:_MAX_BATCHES]
    report = benchmark(model, original, inputs=inputs, rounds=rounds, progress=not quiet)
    emit_report(report, json_file)


def _tune(quiet: bool) -> None:
    path = user_path()
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{printable(path)}: its directory cannot be made ({error.strerror})") from error
    check_file(path)
    if not quiet:
        note(f"measuring this machine with {torch.get_num_threads()} threads; takes minutes, leave it alone meanwhile")
    table = measure_timings(progress=not quiet)
    write_file(path, table.to_json().encode())
    accuracy = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in table.accuracy.items())
    emit(f"timings written to {printable(path)} ({len(table.curves)} kinds of layers; {accuracy})")


def _random_tokens(model: nn.Module, batch_size: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Token ids for a model that reads such; the mask is there so that models that want one work as in use."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UsageError("--data: needed for a model that does not read token ids; give an .npz file of its inputs")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens > longest:
        raise UsageError(f"--tokens: the model reads at most {longest}, got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch_size, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
