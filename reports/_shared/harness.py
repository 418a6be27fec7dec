"""How a study is run and what it writes: its options, ``results.json``, and ``table.md`` made from it."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

Results = dict[str, Any]


def options_of(doc: str | None, *, only: Sequence[str] | str | None = None) -> argparse.ArgumentParser:
    """Make the parser of a study, with ``--smoke``; it adds what only it has.

    Args:
        doc: of the module.
        only: what ``--only`` may name, or a word of help on it; ``None`` for a study that has one case.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="something tiny, for CI; writes nothing beside the study")
    if only is not None:
        given: dict[str, Any] = {"help": only} if isinstance(only, str) else {"choices": list(only)}
        parser.add_argument("--only", **given)
    return parser


def folder_for(home: Path, smoke: bool) -> Path:
    """Return where results go: beside the study, or into a temporary folder."""
    return Path(tempfile.mkdtemp(prefix=f"{home.name}_")) if smoke else home


def read_results(folder: Path, otherwise: Results) -> Results:
    """Read ``results.json``, where there is one."""
    path = folder / "results.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else otherwise


def write_results(
    folder: Path,
    results: Results,
    render: Callable[[Results], str] | None,
    *,
    ending: str = "",
    indent: int | None = 1,
) -> None:
    """Write ``results.json`` and, by ``render``, ``table.md``; ``ending`` goes before the dot of both names."""
    text = json.dumps(results, indent=indent, sort_keys=True) + "\n"
    (folder / f"results{ending}.json").write_text(text, encoding="utf-8")
    if render is not None:
        (folder / f"table{ending}.md").write_text(render(results), encoding="utf-8")


def quartiles(values: Sequence[float], digits: int | None = None, *, inside: bool = True) -> list[float]:
    """Return lower quartile, median and upper quartile.

    Args:
        values: two or more.
        digits: to round to; ``None`` keeps all.
        inside: the values are all there are, and not drawn from more (the two methods of ``statistics.quantiles``).
    """
    found = statistics.quantiles(values, n=4, method="inclusive" if inside else "exclusive")
    return found if digits is None else [round(value, digits) for value in found]


def middle_and_quartiles(three: Sequence[float], digits: int, between: str = "–") -> str:
    """Write quartiles as ``median (lower–upper)``."""
    low, middle, high = (f"{value:.{digits}f}" for value in three)
    return f"{middle} ({low}{between}{high})"


def table(body: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Write rows as a Markdown table, without a line end; numbers stand as they are given."""
    return tabulate(body, headers=header, tablefmt="github", disable_numparse=True)
