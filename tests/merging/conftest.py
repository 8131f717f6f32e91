"""Experts with random or chosen factors, saved as adapters."""

import pytest
from expert_data import random_factors

from valign.merging import Expert
from valign.models.files.adapter_files import open_adapter, save_adapter


@pytest.fixture
def make_expert(tmp_path):
    def make(name, factors, weight=1.0, **metadata):
        save_adapter(tmp_path / name, factors, metadata={"base_fingerprint": "b" * 64, "category": name, **metadata})
        return Expert(name, open_adapter(tmp_path / name), weight)

    return make


@pytest.fixture
def three(make_expert):
    """Three unrelated experts of different rank."""
    return [make_expert(name, random_factors(rank=2 + i, seed=i)) for i, name in enumerate(("hate", "shocking", "violence"))]
