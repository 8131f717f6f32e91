"""Training loops, on accelerate: checkpoints that resume to the same bytes, validation, previews, trackers."""

from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.train import TrainResult, train_preference

__all__ = ["PreferenceConfig", "TrainResult", "train_preference"]
