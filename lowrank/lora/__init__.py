"""LoRA: adapters on dense and on compressed layers, in PEFT's names and files; merging without leaving a format."""

from __future__ import annotations

from lowrank.lora.config import LoRAConfig
from lowrank.lora.layer import LoRALayer
from lowrank.lora.layers import LoRAConv1d, LoRAConv2d, LoRAEmbedding, LoRALinear

__all__ = [
    # Configuration
    "LoRAConfig",
    # Layers
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
]
