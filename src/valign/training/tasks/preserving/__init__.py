"""What keeps a model's safety while it is fine-tuned, or removes what it should not know: `valign finetune --preserve`."""

from valign.training.tasks.preserving.data import PreserveData
from valign.training.tasks.preserving.parsing import parse_preserving
from valign.training.tasks.preserving.preservation import Preservation

__all__ = ["Preservation", "PreserveData", "parse_preserving"]
