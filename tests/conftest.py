"""Fixtures that every room's tests share: miniature pipelines with random weights, made once per run."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", VALIGN_PROGRESS="0")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("valign", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("valign")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of a Stable Diffusion 1.5 in miniature (predicts noise)."""
    return _build(tmp_path_factory, "sd", family="stable-diffusion")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory):
    """Folder of a Stable Diffusion 2.1 in miniature (predicts velocity)."""
    return _build(tmp_path_factory, "sd_v", family="stable-diffusion", prediction="velocity")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a Stable Diffusion XL in miniature."""
    return _build(tmp_path_factory, "sdxl", family="sdxl")


def _build(tmp_path_factory, name, **options):
    from valign.models.miniature import build_miniature

    return build_miniature(tmp_path_factory.mktemp("models") / name, **options)
