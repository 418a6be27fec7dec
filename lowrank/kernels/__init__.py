"""Integer products behind one front door, and activations to integers and back."""

from __future__ import annotations

from lowrank.kernels.activations import quantize_tokens, split_tokens, wide_matmul
from lowrank.kernels.conv import IntegerConv
from lowrank.kernels.integer import int_matmul, routes_in_use
from lowrank.kernels.linear import IntegerWeight, reset_routes, route
from lowrank.kernels.native import torch_route

__all__ = [
    # layers
    "IntegerConv",
    "IntegerWeight",
    # products
    "int_matmul",
    "wide_matmul",
    # activations
    "quantize_tokens",
    "split_tokens",
    # which way the products take here
    "reset_routes",
    "route",
    "routes_in_use",
    "torch_route",
]
