#!/usr/bin/env bash
# hqq 0.2.8.post1 (torch 2.13.0, CPU, Python 3.11): a layer whose number of groups does not fill the packed bytes is quantised without a word, with
# codes missing; only its first use raises.
#
# Guess beforehand: 33 rows at 4 bits are refused when the layer is made, or padded (three bits, packed ten to a word, are padded: 7 groups
# come back whole).
# Seen: HQQLinear is made, and its packed codes hold 16 bytes for 17 rows of pairs: the last row's codes are nowhere. dequantize() and forward
# then raise a RuntimeError about sizes that do not match, which does not name the layer or the reason. The same at 2 bits.
#
# Output seen:
#   4 bits, 33 rows: made, 32 of 33 groups in the packed codes, dequantize: RuntimeError
#   2 bits, 65 rows: made, 64 of 65 groups in the packed codes, dequantize: RuntimeError
#   3 bits, 7 rows: made, 10 of 7 groups in the packed codes, dequantize: (7, 64)
#   8 bits, 33 rows: made, 33 of 33 groups in the packed codes, dequantize: (33, 64)
# Exits non-zero if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 hqq==0.2.8.post1 >&2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

torch.manual_seed(0)
held = {8: 1, 4: 2, 3: 10, 2: 4}
seen = []
for bits, rows in ((4, 33), (2, 65), (3, 7), (8, 33)):
    linear = torch.nn.Linear(64, rows, bias=False)
    layer = HQQLinear(linear, BaseQuantizeConfig(nbits=bits, group_size=64, axis=1), compute_dtype=torch.float32, device="cpu")
    groups = layer.W_q.shape[0] * held[bits]
    try:
        told = str(tuple(layer.dequantize().shape))
    except RuntimeError as error:
        told = type(error).__name__
    seen.append((groups, told))
    print(f"{bits} bits, {rows} rows: made, {groups} of {rows} groups in the packed codes, dequantize: {told}")
wanted = [(32, "RuntimeError"), (64, "RuntimeError"), (10, "(7, 64)"), (33, "(33, 64)")]
raise SystemExit(0 if seen == wanted else 1)
PYTHON
