"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch

from lowrank.cli.paths import DATA
from lowrank.compression.formats import compressing_formats
from lowrank.io.numbers import number_of
from lowrank.layers.base import ACTIVATIONS

__all__ = ["Fraction", "calibration_options", "choice_options", "common_options", "data_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Fraction(click.ParamType):
    """A positive number, also written as a percentage.

    Example:
        >>> Fraction().convert("5%", None, None)
        0.05
    """

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or raise a usage error."""
        try:
            number = number_of(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a number; 5 % is written 0.05 or 5%", param, ctx)
        if not math.isfinite(number) or number <= 0.0:
            self.fail(f"must be a positive number, got {value}", param, ctx)
        return number


def common_options(command: _Command) -> _Command:
    """Options that every command has."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of a failure."),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            callback=_set_threads,
            expose_value=False,
            help="Threads to compute with; all cores by default.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress on standard error."),
    ):
        command = option(command)
    return command


def choice_options(command: _Command) -> _Command:
    """Options of the commands that choose formats: what from, where not, and how activations are taken."""
    for option in (
        click.option(
            "--activations",
            type=click.Choice(["auto", *ACTIVATIONS]),
            default="auto",
            show_default=True,
            help="int8: integer products; float: weight-only.",
        ),
        click.option(
            "--loss-aware/--no-loss-aware",
            default=None,
            callback=_loss_aware,
            help="Fit factors to what their error costs the output, by gradients; where that is possible by default.",
        ),
        click.option(
            "--ignore", multiple=True, metavar="PATTERN", help="Leave modules as they are (glob; repeatable)."
        ),
        click.option(
            "--formats",
            default=",".join(compressing_formats()),
            show_default=True,
            help="Formats to choose from; dense always is one.",
        ),
    ):
        command = option(command)
    return command


def calibration_options(command: _Command) -> _Command:
    """Options of the commands that choose by some samples and measure on others: files, or a file a group."""
    for option in (
        click.option(
            "--validation",
            type=DATA,
            metavar="[NAME=]FILE",
            multiple=True,
            help="Inputs to verify on; else a quarter of the calibration is kept for it. Repeated as NAME=FILE: the budget holds in "
            "each group.",
        ),
        click.option(
            "--calibration",
            type=DATA,
            metavar="[NAME=]FILE",
            multiple=True,
            help="A .txt, .npz or .safetensors file of typical inputs; of each group, as NAME=FILE.",
        ),
    ):
        command = option(command)
    return command


def data_options(command: _Command) -> _Command:
    """Options of the commands that run a model on data."""
    for option in (
        click.option(
            "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Cut longer texts."
        ),
        click.option(
            "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples at a time."
        ),
        click.option("--device", callback=_check_device, help="cpu (the default) or cuda."),
    ):
        command = option(command)
    return command


def _loss_aware(ctx: click.Context, param: click.Parameter, value: bool | None) -> bool | str:
    return "auto" if value is None else value


def _set_threads(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        torch.set_num_threads(value)


def _check_device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        kind = torch.device(value).type
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is not a device; give cpu or cuda") from error
    if kind not in ("cpu", "cuda"):
        raise click.BadParameter(f"{value!r}: only cpu and cuda are supported")
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter(f"{value!r}: torch {torch.__version__} sees no CUDA device here; use cpu")
    return value
