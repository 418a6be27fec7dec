"""The command line: parse, call, print. Results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lowrank.analysis.model import analyze_model
from lowrank.calibration.evaluation import compare_models
from lowrank.calibration.preparing import prepare_batches, told
from lowrank.checkpoint import describe
from lowrank.cli import data as cli_data
from lowrank.cli import demo
from lowrank.cli.benchmark import benchmark_command
from lowrank.cli.frontier import frontier_command
from lowrank.cli.groups import check_files, read_files
from lowrank.cli.models import model_batches, open_model
from lowrank.cli.options import Fraction, calibration_options, choice_options, common_options, data_options
from lowrank.cli.paths import DATA, INPUT, OUTPUT_DIRECTORY, OUTPUT_FILE, Command, DataFile
from lowrank.cli.shell import STANDARD_OUTPUT, check_file, emit, emit_report, note, run, write_file
from lowrank.cli.text import comparison_text, info_text, plan_text
from lowrank.cli.training import finetune_command, merge_command
from lowrank.compression.compress import CompressionResult, compress_model, plan_model
from lowrank.compression.options import check_budgets, metric_choices, metric_of
from lowrank.compression.plan import Plan
from lowrank.errors import CheckpointError, UsageError
from lowrank.integrations.matplotlib import FORMATS as PLOT_FORMATS
from lowrank.integrations.matplotlib import draw_spectra
from lowrank.io import check_destination, lock_destination, open_tensors, printable, read_bounded
from lowrank.io.version import PACKAGE, __version__

__all__ = ["main"]

# A plan of 10,000 layers takes 3 MB.
_MAX_PLAN_BYTES = 64 << 20
_SIDE_BYTES = 16 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lowrank`` with these arguments (those of the process when None) and return the exit code.

    Example:
        >>> main(["--version"])
        lowrank 0.4.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        # Not app.main: it prints three lines for a usage error and a blank one for an interrupt.
        with app.make_context(PACKAGE, arguments) as context:
            app.invoke(context)

    return run(body, debug="--debug" in arguments)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="lowrank %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of a failure.")
def app() -> None:
    """Make a trained model smaller within an error budget that is measured, not hoped for.

    \b
    Exit codes: 0 done, 1 a bug in lowrank, 2 usage, 3 bad input,
    4 numerics or a budget that cannot be met, 5 reading or writing failed,
    6 over a resource limit, 130 interrupted, 143 terminated.

    \b
    Example: lowrank compress my-model -o smaller --error-budget 5% --calibration texts.txt
    """


@app.command(cls=Command, short_help="How compressible is a model? Spectra and ranks, layer by layer.")
@click.argument("source", type=INPUT)
@click.option("--calibration", type=INPUT, help="Text or arrays: errors in the norm of real inputs.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave out modules (glob over names; repeatable).")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write the rows as JSON to a file, - for standard output.")
@click.option("--html", "html_file", type=OUTPUT_FILE, help="Write one self-contained page.")
@click.option("--plot", "plot_file", type=OUTPUT_FILE, help="Write the spectra as a picture (extra: plot).")
@data_options
@common_options
def analyze(
    source: Path,
    calibration: Path | None,
    ignore: tuple[str, ...],
    json_file: Path | None,
    html_file: Path | None,
    plot_file: Path | None,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> None:
    """How compressible is SOURCE: a Hugging Face directory, a .safetensors file or a directory of shards.

    \b
    Example: lowrank analyze my-model --html spectra.html
    """
    for path in (json_file, html_file, plot_file):
        if path is not None and path != STANDARD_OUTPUT:
            check_file(path)
    if plot_file is not None and plot_file.suffix[1:].lower() not in PLOT_FORMATS:
        raise UsageError(f"--plot {printable(plot_file)}: a plot is a .png, .svg or .pdf file")
    subject: Any = source
    batches = None
    if calibration is not None:
        data = cli_data.read_data(calibration)
        subject = open_model(source, device, quiet)
        batches = model_batches(data, calibration, subject, source, max_tokens, batch_size)
    report = analyze_model(subject, calibration=batches, ignore=ignore, progress=not quiet)
    report.totals["source"] = printable(source.resolve().name)
    if plot_file is not None:
        write_file(plot_file, draw_spectra(report.rows, plot_file.suffix[1:].lower()))
    emit_report(report, json_file, html_file)


@app.command(cls=Command, short_help="Make a model as small as an error budget allows.")
@click.argument("source", type=INPUT)
@click.option("-o", "--output", type=OUTPUT_DIRECTORY, help="Directory to write; required unless --dry-run.")
@click.option("--error-budget", type=Fraction(), help="Error allowed, in the metric's unit: 0.05 or 5%.")
@click.option("--size-budget", type=Fraction(), help="Stored bytes after / before: 0.3 or 30%.")
@click.option(
    "--metric",
    type=click.Choice(metric_choices()),
    default="auto",
    help="auto: output error with --calibration, else weight error.",
)
@calibration_options
@choice_options
@click.option(
    "--objective",
    type=click.Choice(["size", "latency"]),
    default="size",
    show_default=True,
    help="latency: the fastest model within --error-budget, for calls of --batch-size samples.",
)
@click.option("--plan", "plan_file", type=INPUT, help="Apply a saved plan.json instead of searching.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the predicted sizes; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT, in one step and only when all is done.")
@click.option("--strict", is_flag=True, help="Fail where a decomposition needs a fallback.")
@click.option(
    "--on-nonfinite",
    type=click.Choice(["raise", "copy"]),
    default="raise",
    show_default=True,
    help="What to do with a layer that holds NaN or Inf.",
)
@click.option(
    "--heal", is_flag=True, help="Train smaller plans until they keep the budget; no labels needed, takes minutes."
)
@click.option("--heal-steps", type=click.IntRange(min=1), help="Of each plan that is healed; 100 to 400 by default.")
@click.option(
    "--smallest",
    is_flag=True,
    help="Take the last bytes too, where a tenth of the budget saves less than 0.5 % of them.",
)
@click.option("--fold-batchnorm", is_flag=True, help="Take BatchNorm into the convolution before it first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sample split.")
@click.option("--json", "as_json", is_flag=True, help="Print the report (with --dry-run: the plan) as JSON.")
@data_options
@common_options
def compress(
    source: Path,
    output: Path | None,
    calibration: tuple[DataFile, ...],
    validation: tuple[DataFile, ...],
    formats: str,
    plan_file: Path | None,
    dry_run: bool,
    overwrite: bool,
    heal: bool,
    heal_steps: int | None,
    as_json: bool,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Compress SOURCE (a Hugging Face directory) to OUTPUT.

    The error is measured on data that the search never saw, and the budget is kept there with 95 % confidence, or
    nothing is written and the exit code is 4. With --validation news=a.txt --validation captions=b.txt it is kept in
    each of these groups.

    \b
    Example: lowrank compress my-model -o smaller --error-budget 5% --calibration texts.txt
    """
    options["formats"] = [name.strip() for name in formats.split(",") if name.strip()]
    options["heal"] = {"steps": heal_steps} if heal_steps is not None else heal
    _check_compress_options(output, calibration, validation, plan_file, dry_run, options)
    plan = None if plan_file is None else _read_plan(plan_file)
    inputs = [source, *(file.path for file in (*calibration, *validation)), *([] if plan_file is None else [plan_file])]
    with _destination(None if dry_run else output, overwrite, inputs, source):
        data, checks = read_files(calibration), read_files(validation)
        model = open_model(source, device, quiet, compressed=False)
        options["calibration"] = data.batches(model, source, max_tokens, batch_size)
        options["validation"] = checks.batches(model, source, max_tokens, batch_size)
        options["progress"] = not quiet
        if dry_run:
            found = plan if plan is not None else plan_model(model, **options)
            emit(found.to_json() if as_json else plan_text(found, model))
            return
        result: CompressionResult = compress_model(model, plan=plan, **options)
        result.source = source
        result.report.totals.setdefault("source", printable(source.resolve().name))
        assert output is not None
        result.save(output, overwrite=overwrite)
    if not quiet:
        note(f"written to {printable(output)}")
    emit(result.report.to_json() if as_json else result.report.to_text())


@app.command(cls=Command, short_help="Compare two models on data: error, KL, perplexity, agreement.")
@click.argument("compressed", type=INPUT)
@click.option("--against", "source", type=INPUT, required=True, help="The original model's directory.")
@click.option(
    "--data",
    "data_files",
    type=DATA,
    metavar="[NAME=]FILE",
    multiple=True,
    required=True,
    help="A .txt, .npz or .safetensors file of inputs; with names, of each group (repeatable).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@data_options
@common_options
def evaluate(
    compressed: Path,
    source: Path,
    data_files: tuple[DataFile, ...],
    as_json: bool,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Measure how far COMPRESSED is from the original on a data file, with 95 % confidence intervals.

    \b
    Example: lowrank evaluate smaller --against my-model --data held-out.txt
    """
    check_files("--data", data_files)
    data = read_files(data_files)
    original = open_model(source, device, quiet)
    smaller = open_model(compressed, device, quiet)
    groups = data.by_group(original, source, max_tokens, batch_size)
    read = {
        group: told(prepare_batches(original, batches, f"--data {group}".strip())) for group, batches in groups.items()
    }
    each = {group: compare_models(original, smaller, batches, progress=not quiet) for group, batches in read.items()}
    found = {"groups": each} if data.grouped else each[""]
    if as_json:
        emit(json.dumps(found, indent=2, sort_keys=True))
        return
    texts = [
        f"{group}:\n{comparison_text(figures)}" if group else comparison_text(figures)
        for group, figures in each.items()
    ]
    emit("\n\n".join(texts))


@app.command(cls=Command, short_help="What is in a compressed directory?")
@click.argument("directory", type=INPUT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
def info(directory: Path, as_json: bool, quiet: bool) -> None:
    """What is in DIRECTORY, a compressed model: formats, ranks, sizes, measured error. Nothing is loaded but headers.

    \b
    Example: lowrank info smaller
    """
    found = describe(directory)
    emit(json.dumps(found, indent=2, sort_keys=True) if as_json else info_text(found))


app.add_command(benchmark_command)
app.add_command(frontier_command)
app.add_command(finetune_command)
app.add_command(merge_command)


@app.command("demo", cls=Command, short_help="Compress a real sentence-embedding model within a 10 % budget.")
@click.option("-o", "--output", type=OUTPUT_DIRECTORY, help="Directory to write; ./lowrank-demo by default.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT where it is not empty.")
@common_options
def demo_command(output: Path | None, overwrite: bool, quiet: bool) -> None:
    """Compress all-MiniLM-L6-v2 within a 10 % output error, measured on Python's documentation and on everyday sentences.

    Needs the extra "demo", which brings the model; nothing is fetched.

    \b
    Example: lowrank demo -o /tmp/minilm
    """
    demo.run_demo(output, overwrite=overwrite, progress=not quiet)


def _check_compress_options(
    output: Path | None,
    calibration: tuple[DataFile, ...],
    validation: tuple[DataFile, ...],
    plan_file: Path | None,
    dry_run: bool,
    options: dict[str, Any],
) -> None:
    """What can be known to be wrong before anything is read."""
    budgets = options["error_budget"], options["size_budget"]
    if plan_file is None or budgets != (None, None):
        try:
            check_budgets(*budgets, options["metric"])
        except UsageError as error:
            message = str(error).replace("error_budget", "--error-budget").replace("size_budget", "--size-budget")
            raise UsageError(message) from error
    if output is None and not dry_run:
        raise UsageError("-o/--output: needed, unless --dry-run is given")
    check_files("--calibration", calibration)
    check_files("--validation", validation)
    metric = metric_of(options["metric"], calibrated=bool(calibration))
    if metric.needs_data and not calibration:
        raise UsageError(
            f"--metric {options['metric']}: needs --calibration; without data only weight errors are known"
        )
    if options["heal"] and (not calibration or metric.weights_only):
        raise UsageError("--heal: needs --calibration and a --metric that the model's outputs decide")
    if validation and not calibration:
        raise UsageError("--validation: needs --calibration too; the search must not see the data it is verified on")


def _read_plan(path: Path) -> Plan:
    return Plan.from_json(read_bounded(path, _MAX_PLAN_BYTES), source=printable(path))


@contextmanager
def _destination(output: Path | None, overwrite: bool, inputs: Sequence[Path], source: Path) -> Iterator[None]:
    """Hold the output for this run, after finding out whether it can be written at all."""
    if output is None:
        yield
        return
    check_destination(output, overwrite, inputs)
    if not source.exists():
        raise CheckpointError(f"{printable(source)}: no such directory; models are read from local directories only")
    check_destination(output, overwrite, inputs, open_tensors(source).tensor_bytes + _SIDE_BYTES)
    with lock_destination(output):
        yield
