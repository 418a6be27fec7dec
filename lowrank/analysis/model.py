"""Where a model is compressible: one row a layer, from a module or from safetensors files, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.analysis.outlook import Outlook, WeightPlanner, compressed_formats, kept_batches, outlook_of_module
from lowrank.analysis.report import AnalysisReport, count_of_noun, verdict_of
from lowrank.analysis.rows import SIZES, AnalysisRow, size_error_curve
from lowrank.analysis.sources import (
    ITEM_BYTES,
    Item,
    Layer,
    count_of,
    layers_of_files,
    layers_of_module,
    names_of,
    not_floating,
    prefix_ends,
    refusal_of,
    short_dtype,
)
from lowrank.calibration.batches import ForwardFn
from lowrank.calibration.inputs import collect_statistics
from lowrank.errors import UsageError
from lowrank.io.version import versions
from lowrank.layers import compressed_layers
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.spectrum import Spectrum, analyze_weight
from lowrank.reporting.text import one_line
from lowrank.targets import kind_of
from lowrank.targets.model import matching

__all__ = ["AnalysisReport", "AnalysisRow", "analyze_model"]

PLOT_STEPS = 32
BUDGETS = (0.02, 0.05, 0.1)
# What the survey says where it has no better reason.
NO_TARGET = "not a target"


def analyze_model(
    model_or_path: nn.Module | str | os.PathLike[str],
    calibration: Iterable[Any] | None = None,
    energy: Sequence[float] = (0.9, 0.95, 0.99),
    ignore: Sequence[str] = (),
    *,
    budgets: Sequence[float] = BUDGETS,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> AnalysisReport:
    """Singular values of every matrix of a model and what they say about compressing it.

    A path (a ``.safetensors`` file, or a directory with ``model.safetensors`` or its shards) is read tensor by tensor,
    one in memory at a time; no model code is needed. Convolutions are flattened to (out, in · kernel); a tied weight is
    analysed once.

    Args:
        model_or_path: a module, or where its safetensors are.
        calibration: batches as for :func:`lowrank.compress_model`; adds the spectrum of W Σ^½ of linear layers
            and of convolutions (but grouped ones), whose inputs are the patches under the kernel. Needs a module.
        energy: fractions of Σσ² to state ranks for, each in (0, 1].
        ignore: globs over layer names; one that covers a container covers what is inside.
        budgets: errors for which to say what compressing would choose, without its search and verification: of the weights
            where there is no calibration, of the output by probes of the model where there is. Empty: no verdicts.
        forward_fn: ``forward_fn(model, batch) -> output`` calls a model that takes objects.
        progress: a bar on standard error when it takes more than two seconds.

    Raises:
        UsageError: an energy outside (0, 1], a budget that is no number above 0, a pattern that matches nothing, calibration for a path.
        CheckpointError: a file that is damaged or not safetensors.
        NumericsError: a weight with NaN or Inf; names layer and index.

    Example:
        >>> report = analyze_model(nn.Sequential(nn.Linear(8, 4)))
        >>> report.rows[0].name, report.rows[0].shape, report.rows[0].full_rank
        ('0', (4, 8), 4)
    """
    levels, wanted = _checked_levels(energy), _checked_budgets(budgets)
    aliases: dict[int, list[str]] = {}
    if isinstance(model_or_path, nn.Module):
        layers, source = layers_of_module(model_or_path), type(model_or_path).__name__
        aliases = names_of(model_or_path)
        known = [name for names in aliases.values() for name in names if name]
    elif isinstance(model_or_path, (str, os.PathLike)):
        if calibration is not None:
            raise UsageError(
                "calibration: running a model needs the model itself; load it and pass the module, not its path"
            )
        layers = layers_of_files(model_or_path)
        source = os.path.basename(os.path.normpath(os.fspath(model_or_path)))
        known = sorted({layer.name[:end] for layer in layers for end in prefix_ends(layer.name)})
    else:
        raise UsageError(f"model: must be a torch.nn.Module or a path, got {type(model_or_path).__name__}")
    ignored: set[str] = set().union(*matching(ignore, known, "ignore").values())
    ignored |= {names[0] for names in aliases.values() if not ignored.isdisjoint(names)}
    statistics: dict[str, InputStatistics] = {}
    compressed = compressed_layers(model_or_path) if isinstance(model_or_path, nn.Module) else {}
    # Read twice: for the spectra, and by the plan.
    batches = None if calibration is None else kept_batches(calibration)
    if batches is not None:
        assert isinstance(model_or_path, nn.Module)
        targets = {
            layer.name: layer.module
            for layer in layers
            if layer.module is not None and layer.name not in ignored and _takes_statistics(layer.module)
        }
        found = collect_statistics(model_or_path, batches, targets, forward_fn=forward_fn, progress=progress)
        statistics = {name: value for name, value in found.items() if isinstance(value, InputStatistics)}
    rows: list[AnalysisRow] = []
    owners: list[str] = []
    sigma: dict[str, Tensor] = {}
    planner = WeightPlanner() if not isinstance(model_or_path, nn.Module) and wanted else None
    spectra: list[tuple[Tensor, int, int, int]] = []
    for layer in tqdm(layers, desc="analyze", unit="layer", delay=2, disable=not progress):
        outer = next((each for each in compressed if layer.name == each or layer.name.startswith(f"{each}.")), None)
        if outer is not None:
            reason = f"already compressed: {compressed[outer].format}"
            rows.append(_skipped_row(layer, layer.name, layer.items, reason))
            owners.append(layer.name)
            continue
        for row, spectrum in _analyse_layer(layer, levels, layer.name in ignored, statistics.get(layer.name), planner):
            rows.append(row)
            owners.append(layer.name)
            if spectrum is not None:
                if row.name == layer.name:
                    sigma[layer.name] = spectrum.singular_values
                height, width = row.shape[0], math.prod(row.shape[1:])
                spectra.append((spectrum.singular_values, height, width, ITEM_BYTES[row.dtype]))
    outlook = Outlook()
    if planner is not None:
        outlook = planner.outlook(wanted, from_file=True)
    elif isinstance(model_or_path, nn.Module) and wanted:
        outlook = outlook_of_module(
            model_or_path,
            wanted,
            calibration=batches,
            ignore=ignore,
            forward_fn=forward_fn,
            sigma=sigma,
            progress=progress,
        )
    if wanted:
        rows = [_with_outlook(row, owner, outlook) for row, owner in zip(rows, owners, strict=True)]
    totals = _totals(rows, spectra, levels, source)
    totals["buffers"] = sum(math.prod(item.shape) for layer in layers for item in layer.items if item.buffer)
    totals["compressed"] = compressed_formats(model_or_path)
    totals |= outlook.totals(totals["bytes"])
    return AnalysisReport(rows, totals, [*_notes(rows, statistics), *outlook.notes()])


def _checked_levels(energy: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(energy) if isinstance(energy, (list, tuple)) else ()
    good = all(isinstance(level, (int, float)) and not isinstance(level, bool) and 0 < level <= 1 for level in levels)
    if not levels or not good:
        raise UsageError(f"energy: must be a list of fractions in (0, 1], such as (0.9, 0.95, 0.99), got {energy!r}")
    return tuple(float(level) for level in levels)


def _checked_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(budgets) if isinstance(budgets, (list, tuple)) else (math.nan,)
    good = all(
        isinstance(level, (int, float)) and not isinstance(level, bool) and 0 < level < math.inf for level in levels
    )
    if not good:
        raise UsageError(f"budgets: must be a list of errors above 0, such as {BUDGETS}, got {budgets!r}")
    return tuple(sorted({float(level) for level in levels}))


def _takes_statistics(module: nn.Module) -> bool:
    # The groups of a grouped convolution never meet, so there is no one matrix whose inputs the moments would describe.
    if getattr(module, "groups", 1) != 1:
        return False
    kind = kind_of(module)
    if kind is None:
        return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    return kind.multiplies and kind.observer(module) is not None


def _analyse_layer(
    layer: Layer,
    levels: Sequence[float],
    ignored: bool,
    statistics: InputStatistics | None,
    planner: WeightPlanner | None,
) -> Iterator[tuple[AnalysisRow, Spectrum | None]]:
    """The rows of one layer: one per matrix, the vectors counted in the first; one row where there is no matrix."""
    matrices = [item for item in layer.items if refusal_of(item) is None]
    vectors = [item for item in layer.items if refusal_of(item) == ""]
    if ignored:
        yield _skipped_row(layer, layer.name, layer.items, "ignored"), None
        return
    # By name, so that a file, whose order is its own, gives what the module gives.
    first = min((item.name for item in matrices), default="")
    for item in matrices:
        counted = [item, *(vectors if item.name == first else [])]
        yield _analyse_item(_full_name(layer, item), layer, item, counted, levels, statistics, planner)
    if vectors and not matrices:
        floating = [item for item in vectors if short_dtype(item.dtype) in ITEM_BYTES]
        reason = "no matrix" if floating else not_floating(vectors[0])
        yield _skipped_row(layer, layer.name or vectors[0].name, vectors, reason), None
    for item in layer.items:
        refusal = refusal_of(item)
        if refusal:
            yield _skipped_row(layer, _full_name(layer, item), [item], refusal), None


def _skipped_row(layer: Layer, name: str, items: Sequence[Item], reason: str) -> AnalysisRow:
    main = max(items, key=lambda item: math.prod(item.shape))
    return AnalysisRow(
        name=name,
        kind=layer.kind or "tensor",
        shape=main.shape,
        parameters=sum(map(count_of, items)),
        bytes=sum(item.nbytes for item in items),
        dtype=short_dtype(main.dtype),
        reason=reason,
    )


def _full_name(layer: Layer, item: Item) -> str:
    parts = (layer.name,) if item.name == "weight" and layer.name else (layer.name, item.name)
    return ".".join(part for part in parts if part)


def _analyse_item(
    name: str,
    layer: Layer,
    item: Item,
    counted: Sequence[Item],
    levels: Sequence[float],
    statistics: InputStatistics | None,
    planner: WeightPlanner | None,
) -> tuple[AnalysisRow, Spectrum]:
    stored = item.read()
    matrix = stored.flatten(1)
    told = f"layer {one_line(name)}"
    spectrum = analyze_weight(matrix, name=told)
    data = None
    if statistics is not None and statistics.count and item.name == "weight":
        data = analyze_weight(matrix, statistics, name=told)
    sigma = spectrum.singular_values
    if planner is not None and layer.name and item.name == "weight" and len(item.shape) <= 4:
        planner.add(layer.name, stored, sigma)
    rows, columns = matrix.shape
    full = min(rows, columns)
    spots = [round(step * (full - 1) / PLOT_STEPS) for step in range(PLOT_STEPS + 1)]
    largest = float(sigma[0])
    squares = torch.cumsum((sigma / largest).square(), 0) if largest > 0 else sigma
    share = squares / squares[-1] if largest > 0 else sigma
    return (
        AnalysisRow(
            name=name,
            kind=layer.kind or _kind_of(item.shape),
            shape=item.shape,
            parameters=sum(map(count_of, counted)),
            bytes=sum(part.nbytes for part in counted),
            dtype=short_dtype(item.dtype),
            ranks=_ranks(spectrum, levels),
            effective_rank=float(spectrum.effective_rank),
            stable_rank=float(spectrum.stable_rank),
            numerical_rank=int(spectrum.numerical_rank),
            noise_rank=int(spectrum.noise_rank),
            full_rank=full,
            break_even_rank=float(spectrum.break_even_rank),
            errors=_errors(spectrum, rows, columns),
            data_ranks=None if data is None else _ranks(data, levels),
            data_effective_rank=None if data is None else float(data.effective_rank),
            data_errors=None if data is None else _errors(data, rows, columns),
            tokens=None if data is None or statistics is None else statistics.count,
            spectrum=tuple((float(sigma[i]) / largest if largest > 0 else 0.0) for i in spots),
            energy=tuple(float(share[i]) for i in spots),
        ),
        spectrum,
    )


def _ranks(spectrum: Spectrum, levels: Sequence[float]) -> dict[str, int]:
    return {str(level): int(spectrum.energy_rank(level)) for level in levels}


def _errors(spectrum: Spectrum, rows: int, columns: int) -> dict[str, float]:
    return {str(size): float(spectrum.tail_error(int(size * rows * columns / (rows + columns)))) for size in SIZES}


def _with_outlook(row: AnalysisRow, owner: str, outlook: Outlook) -> AnalysisRow:
    """The row with what compressing would make of it.

    Args:
        owner: name of the module that holds the weight.
    """
    if not row.analysed:
        return row
    entries = outlook.entries(owner)
    if not entries:
        return replace(row, verdict=_unplanned(owner, outlook))
    plans = {
        str(budget): {"format": entry.format, "rank": entry.rank, "bytes": entry.bytes} for budget, entry in entries
    }
    return replace(row, verdict=verdict_of(entries), plans=plans)


def _unplanned(owner: str, outlook: Outlook) -> str:
    if outlook.from_file:
        return "not known from a file: load the model"
    # What keeps a weight in a part of a layer, such as a parametrization, is said of the layer around it.
    around = [owner[:end] for end in prefix_ends(owner)]
    reasons = [reason for name in reversed(around) if (reason := outlook.left.get(name, NO_TARGET)) != NO_TARGET]
    return f"cannot be replaced: {one_line(reasons[0]) if reasons else 'no layer of a kind that is known'}"


def _kind_of(shape: Sequence[int]) -> str:
    return {2: "matrix", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(len(shape), "tensor")


def _totals(
    rows: Sequence[AnalysisRow], spectra: Sequence[tuple[Tensor, int, int, int]], levels: Sequence[float], source: str
) -> dict[str, Any]:
    analysed = [row for row in rows if row.analysed]
    totals: dict[str, Any] = {
        "layers": len(rows),
        "analysed": len(analysed),
        "parameters": sum(row.parameters for row in rows),
        "parameters_analysed": sum(math.prod(row.shape) for row in analysed),
        "bytes": sum(row.bytes for row in rows),
        "energy": [float(level) for level in levels],
        "source": one_line(source),
        "versions": versions(),
        "size_ratio_at_energy": {},
        "error_at_size": {},
        "curve": size_error_curve(spectra),
    }
    whole = sum(height * width * size for _, height, width, size in spectra)
    for level in levels:
        kept = sum(
            min((row.ranks or {})[str(level)] * (height + width), height * width) * size
            for row, (_, height, width, size) in zip(analysed, spectra, strict=True)
        )
        totals["size_ratio_at_energy"][str(level)] = kept / whole if whole else None
    for size in SIZES:
        errors = [error for ratio, error in totals["curve"] if ratio <= size]
        if errors:
            totals["error_at_size"][str(size)] = min(errors)
    return totals


def _notes(rows: Sequence[AnalysisRow], statistics: dict[str, InputStatistics]) -> list[str]:
    thin = [row for row in rows if row.name in statistics and statistics[row.name].is_thin(row.shape[0])]
    if not thin:
        return []
    fewest = min(row.tokens or 0 for row in thin)
    return [
        f"{count_of_noun(len(thin), 'layer')} saw fewer tokens than input channels (the fewest {fewest}); "
        "their ranks in the metric of the data are too low."
    ]
