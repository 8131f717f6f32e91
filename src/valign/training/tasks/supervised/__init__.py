"""Fine-tuning: classification, regression, causal language models, diffusion models."""

from valign.training.tasks.supervised.config import SupervisedConfig
from valign.training.tasks.supervised.diffusion_task import DiffusionTaskModel
from valign.training.tasks.supervised.finetune import FinetuneResult, finetune
from valign.training.tasks.supervised.judging import judge, mean_loss
from valign.training.tasks.supervised.pair_task import PairTaskModel
from valign.training.tasks.supervised.task import SupervisedTask

__all__ = [
    "DiffusionTaskModel",
    "FinetuneResult",
    "PairTaskModel",
    "SupervisedConfig",
    "SupervisedTask",
    "finetune",
    "judge",
    "mean_loss",
]
