#!/usr/bin/env bash
# hqq 0.2.8.post1 (torch 2.13.0, CPU, Python 3.11): of a pruned weight no zero stays zero, at 8, 4 and 2 bits.
#
# Guess beforehand: a quantiser with a zero point gives exact zeros back (as affine quantisers do that round the zero point, so that zero is a
# level), or at 8 bits at least most of them.
# Seen: the zero point is a float fitted by its solver, so zero is no level. Of weights that were exactly 0, none is 0 afterwards; what they
# become is up to 0.009, 0.049 and 0.78 at 8, 4 and 2 bits, where the other weights are drawn from N(0, 1). A pruned matrix is dense after it.
#
# Output seen:
#   8 bits: 0.0% of the zeros are zero, the largest became 0.0087
#   4 bits: 0.0% of the zeros are zero, the largest became 0.0485
#   2 bits: 0.0% of the zeros are zero, the largest became 0.7811
# Exits non-zero where a hundredth of the zeros or more stay zero.
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
weight = torch.randn(64, 128)
weight[:, ::7] = 0.0
pruned = weight == 0
kept = []
for bits in (8, 4, 2):
    linear = torch.nn.Linear(128, 64, bias=False)
    linear.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu").dequantize()
    share = (made[pruned] == 0).float().mean().item()
    kept.append(share)
    print(f"{bits} bits: {share:.1%} of the zeros are zero, the largest became {made[pruned].abs().max().item():.4f}")
raise SystemExit(0 if max(kept) < 0.01 else 1)
PYTHON
