"""lowrank: make a trained PyTorch model smaller and faster within an error you agreed to beforehand, and prove it.

Start at :func:`compress_model`; the rooms below it are described in the README under "Design".
"""

from lowrank.analysis import AnalysisReport, analyze_model
from lowrank.batchnorm import fold_batchnorm
from lowrank.benchmark import BenchmarkReport, benchmark
from lowrank.calibration import collect_statistics
from lowrank.checkpoint import load_model
from lowrank.compress import CompressionResult, apply_plan, compress_model
from lowrank.errors import (
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
from lowrank.evaluation import compare_models
from lowrank.factors import Factors, RankCurve, factorize
from lowrank.layers import (
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedMultiheadAttention,
    QuantizedRNN,
    QuantizedRNNCell,
    SVDCompressedLinear,
)
from lowrank.planner import Candidate, LayerChoices, Plan, PlanEntry, plan_formats
from lowrank.report import CompressionReport, LayerRow
from lowrank.spectrum import Spectrum, analyze_weight
from lowrank.statistics import InputStatistics
from lowrank.training import TrainingResult, finetune
from lowrank.version import __version__

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
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedLowRankEmbedding",
    "QuantizedLowRankLayer",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "SVDCompressedLinear",
    # Planning and compression
    "Candidate",
    "CompressionReport",
    "CompressionResult",
    "LayerChoices",
    "LayerRow",
    "Plan",
    "PlanEntry",
    "apply_plan",
    "compare_models",
    "compress_model",
    "fold_batchnorm",
    "load_model",
    "plan_formats",
    # Speed
    "BenchmarkReport",
    "benchmark",
    # Training
    "TrainingResult",
    "finetune",
    # Errors
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
