"""A local transformers text classifier as a scorer of toxicity, for example one of the Detoxify kind."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from valign.checks import UserError, first_line
from valign.models.devices import LOAD_ERRORS, choose_device


def classifier_scorer(
    folder: Path, *, label: str = "toxicity", device: str = "auto", batch_size: int = 32
) -> Callable[[Sequence[str]], Float[np.ndarray, " text"]]:
    """Texts -> scores in [0, 1] of the classifier's ``label``: a sigmoid where labels go together, a softmax where one excludes the
    others.

    Raises: UserError if the folder is not such a model in safetensors, or has no such label.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} must be a text classifier in safetensors, got: {first_line(error)}") from error
    labels = {name: int(place) for name, place in (model.config.label2id or {}).items()}
    if label not in labels:
        raise UserError(f"{folder} must have the label {label}, got {', '.join(labels)}. Name one by --toxic-label.")
    model = model.to(choose_device(device)).eval()
    together = model.config.problem_type == "multi_label_classification" or len(labels) == 1

    @torch.inference_mode()
    def score(texts: Sequence[str]) -> Float[np.ndarray, " text"]:
        found: list[float] = []
        for first in range(0, len(texts), batch_size):
            inputs = tokenizer(list(texts[first : first + batch_size]), truncation=True, padding=True, return_tensors="pt")
            logits = model(**inputs.to(model.device)).logits.float()
            shares = logits.sigmoid() if together else logits.softmax(-1)
            found += shares[:, labels[label]].tolist()
        return np.array(found)

    return score
