"""lowrank: make a trained PyTorch model smaller and faster within an error you agreed to beforehand, and prove it.

Start at :func:`compress_model`; the rooms below it are described in the README under "Design".
"""

# First, and light: from here on Ctrl-C ends the command in one line, while everything below takes its second to be read.
from lowrank.cli.startup import watch as _watch

_watch()

# ruff: noqa: E402
from lowrank.analysis.benchmark import BenchmarkReport, benchmark
from lowrank.analysis.frontier import FrontierPoint, FrontierReport, measure_frontier
from lowrank.analysis.model import AnalysisReport, analyze_model
from lowrank.calibration.evaluation import compare_models
from lowrank.calibration.inputs import collect_statistics
from lowrank.checkpoint import load_model
from lowrank.compression.apply import apply_plan
from lowrank.compression.candidates import Candidate, LayerChoices, Plan, PlanEntry, plan_formats
from lowrank.compression.compress import CompressionResult, compress_model
from lowrank.compression.report import CompressionReport, LayerRow
from lowrank.errors import (
    AdapterError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    LowRankError,
    NumericsError,
    RankError,
    ResourceError,
    StorageError,
    UsageError,
)
from lowrank.io.version import __version__
from lowrank.layers import (
    LowRankEmbedding,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLinear,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedMultiheadAttention,
    QuantizedRNN,
    QuantizedRNNCell,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    SVDCompressedLinear,
)
from lowrank.lora import (
    AdapterSummary,
    LoRAConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    MergeReport,
    adapter_summary,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_lora,
    merge_report,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload_lora,
    unmerge_lora,
)
from lowrank.numerics.factors import Factors, RankCurve, factorize
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.spectrum import Spectrum, analyze_weight
from lowrank.targets.batchnorm import fold_batchnorm
from lowrank.training import (
    HealReport,
    HealResult,
    TrainingResult,
    allocate_ranks,
    finetune,
    heal,
    language_model_batches,
)

__all__ = [
    # Analysis
    "AnalysisReport",
    "Spectrum",
    "analyze_model",
    "analyze_weight",
    # Factors and statistics
    "Factors",
    "InputStatistics",
    "RankCurve",
    "collect_statistics",
    "factorize",
    # Layers
    "LowRankEmbedding",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedLowRankConv1d",
    "QuantizedLowRankConv2d",
    "QuantizedLowRankEmbedding",
    "QuantizedLowRankLayer",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "SVDCompressedConv1d",
    "SVDCompressedConv2d",
    "SVDCompressedLinear",
    # Planning and compression
    "Candidate",
    "CompressionReport",
    "CompressionResult",
    "FrontierPoint",
    "FrontierReport",
    "LayerChoices",
    "LayerRow",
    "Plan",
    "PlanEntry",
    "apply_plan",
    "compare_models",
    "compress_model",
    "fold_batchnorm",
    "load_model",
    "measure_frontier",
    "plan_formats",
    # Speed
    "BenchmarkReport",
    "benchmark",
    # Training
    "HealReport",
    "HealResult",
    "TrainingResult",
    "allocate_ranks",
    "finetune",
    "heal",
    "language_model_batches",
    # LoRA
    "AdapterSummary",
    "LoRAConfig",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "adapter_summary",
    "add_lora",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "load_adapter",
    "merge_lora",
    "merge_report",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unload_lora",
    "unmerge_lora",
    # Errors
    "AdapterError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "LowRankError",
    "NumericsError",
    "RankError",
    "ResourceError",
    "StorageError",
    "UsageError",
    # Version
    "__version__",
]
