"""Do two versions of the package make the same bytes of the same models?

    python reports/_shared/same_bytes.py write FOLDER       # compress four models and keep every byte, with the lowrank that is imported
    python reports/_shared/same_bytes.py compare OLD NEW    # name every file, field and tensor that differs; exit code 1 where one does

MiniLM, ResNet-20 and stories260K within 10 % and a small recurrent model within 10 %, seed 0, one thread; of each ``plan.json``,
``report.json`` and every tensor of ``model.safetensors``, and what the model answers. Run ``write`` once with each version
(``PYTHONPATH=path/to/the/other/checkout``). Version numbers are left out of the comparison, and so are the names in ``RENAMED``,
fields that a version has renamed on purpose.

Needs ``../shared`` beside the repository (or ``LOWRANK_SHARED``, a folder like it), and of ``lowrank`` only what it says in public.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared.cases import MODELS

BUDGET = 0.1
# Fields of plan.json and report.json that have another name since: old -> new.
RENAMED: dict[str, str] = {}
# Values that name the version itself.
VERSIONS = {"versions", "lowrank_version"}

Subject = tuple[nn.Module, list[Any], list[Any] | None]


def case(name: str) -> Subject:
    """One of the models that all studies share."""
    found = MODELS[name]()
    return found.model, found.calibration, found.validation


class Recurrent(nn.Module):
    """An embedding, a two-layer LSTM and a GRU, attention and a head: every kind that holds several matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 48)
        self.lstm = nn.LSTM(48, 64, num_layers=2, batch_first=True)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 40)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 40)."""
        x = self.gru(self.lstm(self.embed(ids))[0])[0]
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def recurrent() -> Subject:
    """A random recurrent model on random ids."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (256, 12), generator=torch.Generator().manual_seed(1))
    return Recurrent().eval(), list(ids.split(32)), None


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "recurrent": recurrent,
    "resnet20": lambda: case("resnet20"),
    "minilm": lambda: case("minilm"),
    "stories260K": lambda: case("stories260K"),
}


def write(folder: Path, only: str | None) -> None:
    """Compress every subject and keep the directory and the answers of the model that is loaded from it."""
    import lowrank

    torch.set_num_threads(1)
    print(f"lowrank {lowrank.__version__} from {Path(lowrank.__file__).parent}", flush=True)
    for name, subject in SUBJECTS.items():
        if only not in (None, name):
            continue
        model, calibration, validation = subject()
        start = time.perf_counter()
        result = lowrank.compress_model(
            model, error_budget=BUDGET, calibration=calibration, validation=validation, seed=0, progress=False
        )
        result.save(folder / name, overwrite=True)
        loaded = lowrank.load_model(folder / name, model=model)
        save_file({"answer": _answer(loaded, calibration[0])}, folder / f"{name}.safetensors")
        print(f"{name}: {result.report.totals['size_ratio']:.4%}, {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def _answer(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, Tensor) else output[0].contiguous()


def differences(old: Path, new: Path, only: str | None = None) -> Iterator[str]:
    """Every difference between two folders that :func:`write` made."""
    for name in SUBJECTS if only is None else (only,):
        missing = [folder for folder in (old, new) if not (folder / name).is_dir()]
        if missing:
            yield f"{name}: not in {missing[0]}"
            continue
        for leaf in ("plan.json", "report.json"):
            texts = [json.loads((folder / name / leaf).read_text(encoding="utf-8")) for folder in (old, new)]
            yield from _compared(f"{name}/{leaf}", _renamed(texts[0]), texts[1])
        for path in (f"{name}/model.safetensors", f"{name}.safetensors"):
            yield from _tensors(path, old / path, new / path)


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def _compared(where: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key in VERSIONS:
                continue
            if key not in old or key not in new:
                yield f"{where}.{key}: only in the {'new' if key in new else 'old'} one"
            else:
                yield from _compared(f"{where}.{key}", old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _compared(f"{where}[{index}]", one, other)
    elif old != new or type(old) is not type(new):
        yield f"{where}: {old!r} became {new!r}"


def _tensors(where: str, old: Path, new: Path) -> Iterator[str]:
    one, other = load_file(old), load_file(new)
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        if before.metadata() != after.metadata():
            yield f"{where}: metadata {before.metadata()} became {after.metadata()}"
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            yield f"{where}: tensor {name} only in the {'new' if name in other else 'old'} one"
        elif (
            one[name].dtype != other[name].dtype
            or one[name].shape != other[name].shape
            or not _same(one[name], other[name])
        ):
            yield f"{where}: tensor {name} differs"


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: −0 is not 0, and one NaN is another."""
    return np.array_equal(
        one.contiguous().flatten().view(torch.uint8).numpy(), other.contiguous().flatten().view(torch.uint8).numpy()
    )


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--only", choices=list(SUBJECTS))
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--only", choices=list(SUBJECTS))
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.folder, arguments.only)
        return
    found = list(differences(arguments.old, arguments.new, arguments.only))
    print("\n".join(found) or "the same bytes")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
