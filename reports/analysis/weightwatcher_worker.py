"""WeightWatcher in an environment of its own: analyses the weights of a file once a line on standard input. See study.py."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
import warnings
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from torch import nn


def main() -> None:
    """Answer ``ready`` with versions, then every line with the seconds of one ``analyze()``."""
    torch.set_num_threads(int(sys.argv[2]))
    weights = load_file(sys.argv[1])
    layers = nn.Sequential()
    for index, name in enumerate(sorted(weights)):
        rows, columns = weights[name].shape
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(weights[name], requires_grad=False)
        layers.add_module(str(index), layer)
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    told = {"weightwatcher": version("weightwatcher"), "torch": torch.__version__, "numpy": version("numpy")}
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = weightwatcher.WeightWatcher(model=layers).analyze()
        print(json.dumps({"seconds": time.perf_counter() - start, "layers": len(found)}), flush=True)


if __name__ == "__main__":
    main()
