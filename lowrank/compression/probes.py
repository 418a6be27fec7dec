"""What each layer's formats cost the whole model, found by putting one layer at a time in place and measuring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from lowrank.calibration.evaluation import Evaluator
from lowrank.compression.candidates import Candidate, LayerChoices
from lowrank.compression.formats import (
    DENSE,
    FORMATS,
    REFERENCE,
    Measured,
    Measurements,
    Request,
    format_of,
)
from lowrank.compression.layer_data import LayerData
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import CalibrationError
from lowrank.layers.base import FLOAT_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.rounding import MOST_BITS

__all__ = ["computed_costs", "layer_choices", "probe_layers", "smaller_specs"]

# What a weight-only layer is charged above its bytes: integer products are faster, so a layer gives them up only where that buys
# more than this share of its size. A heuristic.
WEIGHT_ONLY_CHARGE = 1.05
# A contribution that no budget allows, where an output of size 0 becomes something: finite, so that it can be added up.
NOTHING_LEFT = 1e300
# What a model may raise that finds something else than the layer it knows.
BREAKING = (AttributeError, TypeError, RuntimeError, ValueError, LookupError, AssertionError, CalibrationError)


def computed_costs(layers: Sequence[LayerData]) -> dict[str, Measured]:
    """Compute what each layer's formats cost the "weight" metric: ‖ΔW‖² of each layer over Σ‖W‖², by arithmetic alone."""
    whole = sum(data.square_sum for data in layers) or 1.0
    found = {}
    for data in layers:
        share = data.square_sum / whole
        error = REFERENCE.local_error(data, REFERENCE.reference_spec(data))
        found[data.name] = Measured(rounding=error * share, rounding_error=error, truncation=share, integer_factors=0.0)
    return found


def probe_layers(
    copy: WorkingCopy,
    evaluator: Evaluator,
    formats: Sequence[str],
    measurements: Request,
    *,
    allowed: float,
    progress: bool,
) -> dict[str, Measured]:
    """Measure a few single-layer replacements of each target, all others as they were.

    Args:
        formats: names of those that are asked for; the reference is always measured.
        measurements: which activations.
        allowed: the sum of contributions that the budget allows; truncation is probed about where a plan would put it.
    """
    share = allowed / max(len(copy.layers), 1)
    found: dict[str, Measured] = {}
    for data in tqdm(copy.layers.values(), desc="probing layers", delay=2, disable=not progress):

        def measure(spec: LayerSpec, data: LayerData = data) -> float:
            copy.install(data.name, spec)
            return min(evaluator.measure(copy.model).ratio, NOTHING_LEFT)

        try:
            found[data.name] = _probe(data, Measurements(measure, measurements.activations, share), formats)
        except BREAKING as error:
            # A model may write to .weight or call the layer in ways only a dense one takes: the layer is left alone, and named.
            refused = f"replacing it breaks the model ({type(error).__name__}: {error})"
            found[data.name] = Measured(refused=refused)
        finally:
            copy.install(data.name, DENSE)
    return found


def _probe(data: LayerData, measurements: Measurements, formats: Iterable[str]) -> Measured:
    found = Measured()
    REFERENCE.probe(data, measurements, found)
    found.silent = found.rounding == 0.0
    found.careful = found.silent or not data.reached or data.unseen_rows > 0
    for format in FORMATS.values():
        if format is not REFERENCE and format.name in formats and format.fits(data) and not found.careful:
            format.probe(data, measurements, found)
    return found


def smaller_specs(data: LayerData, formats: Iterable[str], request: Request) -> list[LayerSpec]:
    """List every candidate of these formats that is smaller than the layer as it is."""
    limit = stored_bytes(data, DENSE)
    found = []
    for format in FORMATS.values():
        if (
            format.name in formats
            and not format.dense
            and format.fits(data)
            and (format.careful or not request.careful)
        ):
            found += format.specs(data, request)
    fine = [spec for spec in found if not request.silent or spec.bits is None or spec.bits >= MOST_BITS]
    return [spec for spec in fine if stored_bytes(data, spec) < limit]


def stored_bytes(data: LayerData, spec: LayerSpec) -> int:
    """Count the bytes of the tensors that the file will hold for a target in this spec."""
    return format_of(spec).stored_bytes(data, spec)


def layer_choices(
    data: LayerData,
    found: Measured,
    formats: Sequence[str],
    activations: str,
    *,
    forced: Sequence[LayerSpec] | None = None,
) -> LayerChoices:
    """Give the planner's view of one target: every choice with its true bytes and predicted contribution.

    Args:
        forced: the only choices allowed, from ``overrides``.
    """
    if forced is not None:
        specs = list(forced)
    elif found.refused is not None:
        specs = [DENSE]
    else:
        specs = [DENSE, *smaller_specs(data, formats, Request(activations, found.careful, found.silent))]
    candidates = []
    for spec in specs:
        stored = stored_bytes(data, spec)
        charged = spec.activations == FLOAT_ACTIVATIONS and activations == "auto"
        candidates.append(
            Candidate(
                spec,
                bytes=stored,
                error=format_of(spec).predict(found, data, spec),
                cost=stored * WEIGHT_ONLY_CHARGE if charged else float(stored),
            )
        )
    return LayerChoices(data.name, data.kind.name, tuple(data.target.shape), tuple(candidates))


def uniform_specs(layers: Iterable[LayerData], activations: str) -> dict[str, LayerSpec]:
    """Give every target the reference format where that is smaller than the layer as it is."""
    found = {}
    for data in layers:
        spec = REFERENCE.spec(data.modes(activations)[0])
        found[data.name] = spec if stored_bytes(data, spec) < stored_bytes(data, DENSE) else DENSE
    return found
