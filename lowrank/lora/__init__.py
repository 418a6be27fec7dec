"""LoRA: adapters on dense and on compressed layers, in PEFT's names and files; merging without leaving a format."""

from __future__ import annotations

from lowrank.lora.adapter_kinds import LoRAConv1d, LoRAConv2d, LoRAEmbedding, LoRALinear
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.config import LoRAConfig
from lowrank.lora.files import load_adapter, save_adapter
from lowrank.lora.merge import MergeReport, merge_lora, merge_report, unload_lora, unmerge_lora
from lowrank.lora.model import add_lora, add_weighted_adapter, delete_adapter, disable_adapter, set_adapter, set_form
from lowrank.lora.summary import AdapterSummary, adapter_summary, trainable_parameters

__all__ = [
    # Configuration
    "LoRAConfig",
    # Layers
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    # Models
    "AdapterSummary",
    "adapter_summary",
    "add_lora",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "set_adapter",
    "set_form",
    "trainable_parameters",
    # Merging
    "MergeReport",
    "merge_lora",
    "merge_report",
    "unload_lora",
    "unmerge_lora",
    # Files
    "load_adapter",
    "save_adapter",
]
