"""What each layer's formats cost the whole model, found by putting one layer at a time in place and measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from lowrank.calibration.evaluation import Evaluator
from lowrank.compression.candidates import Candidate, LayerChoices
from lowrank.compression.working_copy import Bench
from lowrank.compression.workshop import Choice, Workshop

__all__ = ["Sensitivity", "exact_sensitivities", "layer_choices", "probe_layers"]

# What a weight-only layer is charged above its bytes: integer products are faster, so a layer gives them up only where that buys
# more than this share of its size. A heuristic.
WEIGHT_ONLY_CHARGE = 1.05
# Of an even share of the budget: a probe that costs less is too far from where plans end to be extrapolated from. A heuristic: on
# ResNet-20 the cost over the layer's own error at one such probe, a millionth of its share, was a ten-thousandth of that at others.
NEGLIGIBLE = 0.03


@dataclass(frozen=True)
class Sensitivity:
    """Additive contributions of one layer to the model's error (squared for "output" and "weight", nats for "kl").

    Attributes:
        rounding: dense int8 codes, activations in float.
        integer: what rounding the activations adds to that.
        truncation: of a low-rank layer, per squared relative error of the layer itself.
        integer_factors: what rounding the activations (also those between the factors) adds to int8 factors.
        refused: why the layer cannot be replaced, where replacing it broke the model.
        silent: the metric does not depend on this layer.
        careful: the measured cost says nothing about inputs that the data does not hold (a silent layer, one that no input reached,
            embedding rows that were never looked up), so the layer is not taken below int8.
    """

    rounding: float
    integer: float
    truncation: float
    integer_factors: float
    refused: str | None = None
    silent: bool = False
    careful: bool = False


def exact_sensitivities(workshops: Sequence[Workshop]) -> dict[str, Sensitivity]:
    """For the "weight" metric: ‖ΔW‖² of each layer over Σ‖W‖², by arithmetic alone."""
    whole = sum(shop.square_sum for shop in workshops) or 1.0
    found = {}
    for shop in workshops:
        share = shop.square_sum / whole
        found[shop.name] = Sensitivity(shop.rounding * share, 0.0, share, 0.0)
    return found


def probe_layers(
    bench: Bench,
    workshops: Sequence[Workshop],
    evaluator: Evaluator,
    formats: Sequence[str],
    activations: str,
    *,
    allowed: float,
    progress: bool,
) -> dict[str, Sensitivity]:
    """Measure up to five single-layer replacements for each target, all others dense.

    Args:
        allowed: the sum of contributions that the budget allows; truncation is probed about where a plan would put it.
    """
    share = allowed / max(len(workshops), 1)
    found: dict[str, Sensitivity] = {}
    for shop in tqdm(workshops, desc="probing layers", delay=2, disable=not progress):
        try:
            found[shop.name] = _probe(bench, shop, evaluator, formats, activations, share)
        except (AttributeError, TypeError, RuntimeError) as error:
            # A model may read .weight itself or call the layer in ways only a dense one takes: the layer is left alone, and named.
            found[shop.name] = Sensitivity(
                0.0, 0.0, 0.0, 0.0, refused=f"replacing it breaks the model ({type(error).__name__}: {error})"
            )
        finally:
            bench.install(shop.name, Choice("dense"))
    return found


def _probe(
    bench: Bench, shop: Workshop, evaluator: Evaluator, formats: Sequence[str], activations: str, share: float
) -> Sensitivity:
    def measure(choice: Choice) -> float:
        bench.install(shop.name, choice)
        measured = evaluator.measure(bench.model)
        return max(float(measured.numerators.sum()), 0.0) / max(float(measured.denominators.sum()), 1e-300)

    def truncation_at(choice: Choice) -> tuple[float, float]:
        lost = shop.truncation(choice)
        measured = measure(choice)
        return measured, measured / lost if lost > 0.0 else 0.0

    multiplies = "int8" in shop.modes("auto")
    rounding = measure(Choice("int8", None, 8, shop.modes("float")[0]))
    integer = 0.0
    if multiplies and activations != "float":
        integer = max(measure(Choice("int8", None, 8, "int8")) - rounding, 0.0)
    careful = rounding == 0.0 or not shop.reached or shop.unseen_rows > 0
    factored: list[Choice] = []
    if not careful and {"lowrank", "lowrank-int8"} & set(formats):
        factored = shop.by_size("lowrank-int8") or shop.by_size("lowrank")
    if not factored:
        return Sensitivity(rounding, integer, 0.0, integer, silent=rounding == 0.0, careful=careful)
    factored = [replace(choice, format="lowrank") for choice in factored]
    choice = factored[len(factored) // 2]
    truncated, truncation = truncation_at(choice)
    # The cost of truncation is not quite proportional to the layer's own error, so it is measured again at the rank that would take
    # an even share of the budget.
    fitting = [each for each in factored if truncation * shop.truncation(each) <= share]
    if fitting and fitting[0] != choice:
        choice = fitting[0]
        truncated, finer = truncation_at(choice)
        # A rank that leaves out only what the data never uses costs next to nothing, and says nothing about smaller ranks.
        truncation = finer if truncated > NEGLIGIBLE * share else max(finer, truncation)
    integer_factors = integer
    if multiplies and activations != "float" and "lowrank-int8" in formats:
        both = measure(replace(choice, format="lowrank-int8", bits=8, activations="int8"))
        expected = truncated + _factor_rounding(shop, rounding, truncation, choice)
        integer_factors = max(both - expected, integer)
    return Sensitivity(rounding, integer, truncation, integer_factors)


def _factor_rounding(shop: Workshop, rounding: float, truncation: float, choice: Choice) -> float:
    """What 8-bit rounding of the factors costs the model: the dense rounding's measured cost, scaled by the local errors."""
    own = shop.rounding_of_factors(choice)
    dense = shop.rounding
    return rounding * own / dense if dense > 0.0 else truncation * own


def layer_choices(
    shop: Workshop,
    sensitivity: Sensitivity,
    formats: Sequence[str],
    activations: str,
    *,
    forced: Sequence[Choice] | None = None,
    scale: float = 1.0,
) -> LayerChoices:
    """The planner's view of one target: every choice with its true bytes and predicted contribution.

    Args:
        forced: the only choices allowed, from ``overrides``.
        scale: multiplies every predicted error; the calibration by end-to-end measurements.
    """
    choices: Sequence[Choice]
    if forced is not None:
        choices = forced
    elif sensitivity.refused is not None:
        choices = [Choice("dense")]
    else:
        choices = [Choice("dense"), *shop.choices(formats, activations, never_below_int8=sensitivity.careful)]
    candidates = []
    for choice in choices:
        stored = shop.bytes(choice)
        candidates.append(
            Candidate(
                format=choice.format,
                rank=choice.rank,
                bits=choice.bits,
                activations=choice.activations,
                scheme=choice.scheme,
                bytes=stored,
                error=scale * _predicted(shop, sensitivity, choice),
                cost=stored * WEIGHT_ONLY_CHARGE
                if choice.activations == "float" and activations == "auto"
                else float(stored),
            )
        )
    return LayerChoices(
        name=shop.name, kind=shop.target.kind, shape=tuple(shop.target.shape), candidates=tuple(candidates)
    )


def _predicted(shop: Workshop, sensitivity: Sensitivity, choice: Choice) -> float:
    if choice.format == "dense":
        return 0.0
    # Rounding to b bits moves a weight by half a step of a grid 2^(8−b) times as coarse; errors are squared.
    coarser = 4.0 ** (8 - (choice.bits or 8))
    if choice.format == "int8":
        return sensitivity.rounding * coarser + (sensitivity.integer if choice.activations == "int8" else 0.0)
    error = sensitivity.truncation * shop.truncation(choice)
    if choice.format == "lowrank-int8":
        error += _factor_rounding(shop, sensitivity.rounding, sensitivity.truncation, choice) * coarser
        error += sensitivity.integer_factors if choice.activations == "int8" else 0.0
    return error


def uniform_choices(workshops: Mapping[str, Workshop], activations: str) -> dict[str, Choice]:
    """Every target in int8 where that is smaller than dense."""
    found = {}
    for name, shop in workshops.items():
        choice = Choice("int8", None, 8, shop.modes(activations)[0])
        found[name] = choice if shop.bytes(choice) < shop.bytes(Choice("dense")) else Choice("dense")
    return found
