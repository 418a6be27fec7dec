"""Training: fine-tune what is trainable, win back what compression lost, and rank layers by what they matter."""

from __future__ import annotations

from lowrank.training.data import language_model_batches
from lowrank.training.finetuning import finetune
from lowrank.training.healing import HealReport, HealResult, heal
from lowrank.training.history import TrainingResult
from lowrank.training.ranks import allocate_ranks

__all__ = ["HealReport", "HealResult", "TrainingResult", "allocate_ranks", "finetune", "heal", "language_model_batches"]
