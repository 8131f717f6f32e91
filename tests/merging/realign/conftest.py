"""A base, its aligned model, and two fine-tuned ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from realign_data import model, plus, tensors


@dataclass
class Family:
    base: Path
    aligned: Path
    tuned: Path
    other: Path
    weights: dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def family(tmp_path):
    base = tensors(0)
    safety, task, second = tensors(1, scale=0.3), tensors(2, scale=0.2), tensors(3, scale=0.2)
    aligned = plus(base, safety)
    weights = {"base": base, "aligned": aligned, "tuned": plus(aligned, task), "other": plus(aligned, second)}
    return Family(*(model(tmp_path / name, tensors) for name, tensors in weights.items()), weights)
