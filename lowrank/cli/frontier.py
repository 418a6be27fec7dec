"""``lowrank frontier``: size against error, measured for several budgets in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lowrank.analysis.frontier import POINTS, STATE_NAME, measure_frontier
from lowrank.cli.groups import check_files, read_files
from lowrank.cli.models import open_model
from lowrank.cli.options import Fraction, calibration_options, choice_options, common_options, data_options
from lowrank.cli.paths import INPUT, OUTPUT_DIRECTORY, OUTPUT_FILE, Command, DataFile
from lowrank.cli.shell import STANDARD_OUTPUT, check_file, emit_report, note
from lowrank.compression.options import metric_choices, metric_of
from lowrank.errors import UsageError
from lowrank.io import check_destination, printable

__all__ = ["frontier_command"]


@click.command("frontier", cls=Command, short_help="Size against error: what several budgets give, each measured.")
@click.argument("source", type=INPUT)
@calibration_options
@click.option(
    "-o",
    "--output",
    type=OUTPUT_DIRECTORY,
    help="Directory for the points and their plans; a run that was stopped goes on.",
)
@click.option(
    "--points", type=click.IntRange(min=2), help=f"Budgets to spread over the usual range; {POINTS} by default."
)
@click.option("--budgets", help="Errors to aim at instead, as in 2%,5%,10%.")
@click.option(
    "--metric",
    type=click.Choice(metric_choices()),
    default="auto",
    help="auto: output error with --calibration, else weight error.",
)
@choice_options
@click.option("--overwrite", is_flag=True, help="Start anew in OUTPUT, whatever is there.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sample split.")
@click.option(
    "--json", "json_file", type=OUTPUT_FILE, help="Write the points as JSON to a file, - for standard output."
)
@click.option("--html", "html_file", type=OUTPUT_FILE, help="Write one self-contained page.")
@data_options
@common_options
def frontier_command(
    source: Path,
    calibration: tuple[DataFile, ...],
    validation: tuple[DataFile, ...],
    output: Path | None,
    budgets: str | None,
    formats: str,
    overwrite: bool,
    json_file: Path | None,
    html_file: Path | None,
    max_tokens: int,
    batch_size: int,
    device: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure size against error for SOURCE (a Hugging Face directory), with one calibration for all budgets.

    The error of each point is measured on samples that no plan was made from. A budget says where to look; the promise for
    one budget comes from lowrank compress. Each point's plan in OUTPUT can be given to lowrank compress --plan.

    \b
    Example: lowrank frontier my-model --calibration texts.txt -o frontier
    """
    for path in (json_file, html_file):
        if path is not None and path != STANDARD_OUTPUT:
            check_file(path)
    check_files("--calibration", calibration)
    check_files("--validation", validation)
    if not calibration and metric_of(options["metric"], calibrated=False).needs_data:
        raise UsageError(
            f"--metric {options['metric']}: needs --calibration; without data only weight errors are known"
        )
    if validation and not calibration:
        raise UsageError("--validation: needs --calibration too; plans must not see the data that they are measured on")
    if budgets is not None and options["points"] is not None:
        raise UsageError("--budgets or --points: give one of them; --points spreads budgets of its own")
    wanted = None if budgets is None else _numbers(budgets)
    if output is not None:
        inputs = [source, *(file.path for file in (*calibration, *validation))]
        check_destination(output, overwrite or (output / STATE_NAME).is_file(), inputs)
    data, checks = read_files(calibration), read_files(validation)
    model = open_model(source, device, quiet, compressed=False)
    report = measure_frontier(
        model,
        calibration=data.batches(model, source, max_tokens, batch_size),
        validation=checks.batches(model, source, max_tokens, batch_size),
        budgets=wanted,
        directory=output,
        overwrite=overwrite,
        source=printable(source.resolve().name),
        formats=[name.strip() for name in formats.split(",") if name.strip()],
        progress=not quiet,
        **options,
    )
    if output is not None and not quiet:
        note(f"written to {printable(output)}")
    emit_report(report, json_file, html_file)


def _numbers(text: str) -> list[float]:
    """Budgets from a list with commas.

    Example:
        >>> _numbers("2%, 0.05")
        [0.02, 0.05]
    """
    read = Fraction()
    try:
        return [read.convert(part, None, None) for part in text.split(",") if part.strip()]
    except click.BadParameter as error:
        raise UsageError(f"--budgets: {error.format_message()}") from error
