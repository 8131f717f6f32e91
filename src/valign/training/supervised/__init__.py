"""Fine-tuning: classification, regression, causal language models, diffusion models."""

from valign.training.supervised.config import SupervisedConfig
from valign.training.supervised.diffusion_task import DiffusionTaskModel
from valign.training.supervised.finetune import FinetuneResult, finetune
from valign.training.supervised.judging import judge, mean_loss
from valign.training.supervised.loop import SupervisedLoop
from valign.training.supervised.pair_task import PairTaskModel

__all__ = [
    "DiffusionTaskModel",
    "FinetuneResult",
    "PairTaskModel",
    "SupervisedConfig",
    "SupervisedLoop",
    "finetune",
    "judge",
    "mean_loss",
]
