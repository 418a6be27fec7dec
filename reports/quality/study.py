"""How much error for how many bytes: this package, recipes of others from their mathematics, and real packages.

    python reports/quality/study.py --only minilm                         # every case of one model that is not yet in results.json
    python reports/quality/study.py --methods "uniform,GPTQ" --seeds 0    # some of them
    python reports/quality/study.py --packages PYTHON                     # real packages, by a Python that has them (README)
    python reports/quality/study.py --retake planner                      # forget and measure these anew
    python reports/quality/study.py --smoke                               # a random model of one layer, into a temporary folder

Same model, same data, same count of bytes; every error is of data that nothing was fitted to. Needs the data folder beside the repository
(``../shared``) and, for MiniLM, the package that carries it (extra ``demo``).
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes
from _shared import harness
from _shared.host import host
from compared_models import SUBJECTS, Subject
from rendering import render

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
BITS = (8, 6, 5, 4, 3, 2)
BUDGETS = (0.02, 0.05, 0.1, 0.2)
# What the file may take, where the reference figures of README.md are.
SIZES = (0.251, 0.135, 0.102)
SHARES = (0.4, 0.25, 0.18, 0.125, 0.09)
# Of the table beside factors, which are for matrices that multiply.
TABLE_BITS, GROUP = 4, 64
OURS = ("uniform", "uniform, two-sided")
PLANNER = "planner"


@dataclass(frozen=True)
class Case:
    """One point: what is made of which scope of which model.

    Attributes:
        model, scope: see compared_models.py; scope ``"file"`` is everything.
        method: see recipes.py, ``OURS``, ``PLANNER``, or a package.
        bits, group, rank: of codes, and of what is added to them.
        share: of bytes, that factors may take.
        budget: of error, for the planner.
        option: of a package.
        seed: that drew the calibration data; 0 where none is used.
    """

    model: str
    scope: str
    method: str
    bits: int | None = None
    group: int | None = None
    rank: int | None = None
    share: float | None = None
    budget: float | None = None
    option: str | None = None
    seed: int = 0


def recipe_cases(model: str, scope: str, seed: int) -> Iterator[Case]:
    """The recipes of others and our uniform plans, the cheap ones first."""
    methods = [*recipes.CODERS, *OURS]
    for bits in BITS:
        for method in methods:
            if not seed or method not in recipes.DATA_FREE:
                yield Case(model, scope, method, bits, GROUP, seed=seed)
    for method in ("nearest", "GPTQ", *OURS):
        if not seed or method not in recipes.DATA_FREE:
            yield Case(model, scope, method, 2, 32, seed=seed)
            yield Case(model, scope, method, 8, None, seed=seed)
    for share in SHARES:
        for method in recipes.LOW_RANK:
            if not seed or method not in recipes.DATA_FREE:
                yield Case(model, scope, method, share=share, seed=seed)
    for method in recipes.CORRECTED:
        for bits, rank in ((4, 8), (3, 8), (2, 8), (2, 32)):
            yield Case(model, scope, method, bits, GROUP, rank, seed=seed)


def package_cases(model: str) -> Iterator[Case]:
    """What real packages can make of it; one seed."""
    scopes = ("file", "encoder") if model == "minilm" else ("file",)
    for scope in scopes:
        for option in ("int8_asym", "int4_asym", "int4_asym, GPTQ", "int4_asym, scale estimation", "int4_asym, AWQ"):
            if scope == "file":
                group = None if option == "int8_asym" else GROUP
                yield Case(model, scope, "NNCF", int(option[3]), group, option=option)
        for bits in (8, 4, 3, 2):
            yield Case(model, scope, "torchao", bits, GROUP)
    last = scopes[-1]
    if model != "resnet20":
        for bits in (8, 4, 3, 2):
            yield Case(model, last, "hqq", bits, GROUP)
        for bits in (4, 3, 2):
            yield Case(model, last, "auto-round", bits, GROUP)
    for bits in (8, 4, 2):
        yield Case(model, last, "optimum-quanto", bits, None if bits == 8 else 128)


def planner_cases(model: str, seed: int) -> Iterator[Case]:
    """Budgets of error and of bytes."""
    for budget in BUDGETS[::-1]:
        yield Case(model, "file", PLANNER, budget=budget, seed=seed)
    for share in SIZES if model == "minilm" else ():
        yield Case(model, "file", PLANNER, share=share, seed=seed)


def all_cases(model: str, seeds: Sequence[int] = SEEDS) -> list[Case]:
    """Every case of a model, the ones that matter most first."""
    found: list[Case] = []
    scopes = ("encoder", "file") if model == "minilm" else ("file",)
    for seed in seeds:
        # Scopes in turn: what is made of a matrix is the same in both.
        found += [
            case for pair in zip(*(recipe_cases(model, scope, seed) for scope in scopes), strict=True) for case in pair
        ]
        if not seed:
            found += package_cases(model)
    for seed in seeds:
        found += planner_cases(model, seed)
    return found


# One at a time, since what is known of it is large.
@lru_cache(maxsize=1)
def subject_of(model: str, seed: int) -> Subject:
    """The model, with calibration data that the seed drew."""
    return SUBJECTS[model](seed)


def ranks_of(subject: Subject, names: Sequence[str], case: Case) -> dict[str, int]:
    """How a method shares out its bytes."""
    assert case.share is not None
    shapes = {name: tuple(subject.weight(name).shape) for name in names}
    if case.method != "FLAR-SVD":
        return recipes.uniform_ranks(shapes, case.share)
    spectra = {
        name: torch.linalg.svdvals(subject.weight(name) @ recipes.whitening(subject.grams[name])[0]) for name in names
    }
    return recipes.threshold_ranks(spectra, shapes, case.share)


def from_recipe(subject: Subject, case: Case) -> tuple[torch.nn.Module, int]:
    """Apply a recipe to the scope: the model, and the bytes of the scope's matrices."""
    model = copy.deepcopy(subject.model)
    names = subject.scopes[case.scope]
    multiplying = [name for name in names if not subject.is_table(name)]
    ranks = ranks_of(subject, multiplying, case) if case.method in recipes.LOW_RANK else {}
    total = 0
    for name in names:
        made = _made(subject, replace(case, scope=""), name, ranks.get(name))
        weight: Tensor = model.get_submodule(name).weight.data  # type: ignore[assignment, union-attr]
        weight.copy_(made.weight.view(weight.shape))
        total += made.bytes
    return model, total


# As many as a model has matrices, so that the second scope finds what the first one made.
@lru_cache(maxsize=64)
def _made(subject: Subject, case: Case, name: str, rank: int | None) -> recipes.Made:
    weight = subject.weight(name)
    if subject.is_table(name):
        bits = case.bits or TABLE_BITS
        # What needs inputs cannot be had for a table.
        coder = recipes.hqq if case.method == "HQQ" else recipes.nearest
        return coder(weight, bits, case.group or (GROUP if case.bits is None else None))
    if case.method == "SVD":
        assert rank is not None
        return recipes.svd(weight, rank)
    gram = subject.grams[name] if case.method not in recipes.DATA_FREE else torch.zeros(0)
    if rank is not None:
        return recipes.svd_llm(weight, gram, rank)
    assert case.bits is not None
    if case.rank is not None:
        return recipes.CORRECTED[case.method](weight, gram, case.bits, case.group, case.rank)
    return recipes.CODERS[case.method](weight, gram, case.bits, case.group)


def run_case(case: Case, packages: str | None) -> dict[str, Any] | None:
    """Make and measure one point; ``None`` for a package where no Python that has it was given."""
    known = {*recipes.CODERS, *recipes.CORRECTED, *recipes.LOW_RANK, *OURS, PLANNER}
    if case.method not in known:
        return None if packages is None else _by_package(case, packages)
    subject = subject_of(case.model, case.seed)
    dense = subject.dense_bytes(case.scope)
    # What all share is not in the seconds.
    _ = subject.reference, subject.grams
    told: dict[str, Any] = {}
    start = time.perf_counter()
    if case.method in OURS or case.method == PLANNER:
        import ours

        if case.method == PLANNER:
            budget = {"error_budget": case.budget} if case.share is None else {"size_budget": case.share}
            model, told = ours.planned(subject, case.scope, case.seed, **{k: v for k, v in budget.items() if v})
        else:
            rounding = "two-sided" if "two-sided" in case.method else "gptq"
            assert case.bits is not None
            model = ours.uniform(subject, case.scope, case.bits, case.group, rounding)
        share = ours.share(subject, case.scope, model)
    else:
        model, made = from_recipe(subject, case)
        share = (made + subject.others(case.scope)) / dense
    seconds = time.perf_counter() - start
    return told | {
        "case": asdict(case),
        "share": share,
        **subject.measured(lambda batch: subject.run(model, batch)),
        "seconds": round(seconds, 1),
    }


def _by_package(case: Case, python: str) -> dict[str, Any]:
    command = [python, str(HERE / "package_worker.py"), json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"case": asdict(case), "failed": last[:300]}
    return {"case": asdict(case), **json.loads(lines[-1])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet."""
    parser = harness.options_of(__doc__, only=[name for name in SUBJECTS if name != "tiny"])
    parser.add_argument("--methods", help="commas between", default="")
    parser.add_argument("--seeds", help="commas between", default=",".join(map(str, SEEDS)))
    parser.add_argument("--scope", choices=("encoder", "file"))
    parser.add_argument("--retake", help="a method whose rows are forgotten first", default="")
    parser.add_argument("--packages", help="a Python that has the packages of README.md")
    parser.add_argument("--table", action="store_true", help="only write table.md again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = harness.folder_for(HERE, options.smoke)
    results = harness.read_results(folder, {"rows": [], "dense": {}})
    if options.table:
        harness.write_results(folder, results, render)
        return
    results["host"] = host("machine", "torch", "lowrank")
    results["rows"] = [row for row in results["rows"] if row["case"]["method"] != options.retake or not options.retake]
    models = ["tiny"] if options.smoke else [options.only] if options.only else [m for m in SUBJECTS if m != "tiny"]
    wanted = [each.strip() for each in options.methods.split(";" if ";" in options.methods else ",") if each.strip()]
    for model in models:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        for case in smoke_cases() if options.smoke else all_cases(model, seeds):
            skipped = (wanted and case.method not in wanted) or (options.scope and case.scope != options.scope)
            if skipped or any(row["case"] == asdict(case) for row in results["rows"]):
                continue
            row = run_case(case, options.packages)
            if row is None:
                continue
            if model not in results["dense"]:
                results["dense"][model] = _dense(subject_of(case.model, case.seed))
            results["rows"].append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "case"} | short(case)), flush=True)
            harness.write_results(folder, results, render)
    print(render(results))


def _dense(subject: Subject) -> dict[str, float]:
    bytes_of = {scope: subject.dense_bytes(scope) for scope in subject.scopes}
    return {"bytes": bytes_of, subject.judged[0]: subject.dense_measure()}  # type: ignore[dict-item]


def short(case: Case) -> dict[str, Any]:
    """A case without what it does not say."""
    return {key: value for key, value in asdict(case).items() if value is not None}


def smoke_cases() -> list[Case]:
    """One of each kind."""
    coded = [Case("tiny", scope, method, 3, 32) for scope in ("encoder", "file") for method in [*recipes.CODERS, *OURS]]
    low = [Case("tiny", "encoder", method, share=0.25) for method in recipes.LOW_RANK]
    both = [Case("tiny", "encoder", method, 3, 32, 4) for method in recipes.CORRECTED]
    return [*coded, *low, *both, Case("tiny", "file", PLANNER, budget=0.2)]


if __name__ == "__main__":
    main()
