"""Fine-tuning on labelled texts: classification, regression, causal language models."""

from valign.training.supervised.config import SupervisedConfig
from valign.training.supervised.finetune import FinetuneResult, finetune
from valign.training.supervised.judging import judge
from valign.training.supervised.loop import SupervisedLoop

__all__ = ["FinetuneResult", "SupervisedConfig", "SupervisedLoop", "finetune", "judge"]
