"""Fixtures that every room's tests share: miniature pipelines with random weights, made once per run."""

import os
from collections.abc import Iterator
from dataclasses import replace

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", VALIGN_PROGRESS="0")

import pytest
import torch
from hypothesis import settings
from jaxtyping import config

torch.set_num_threads(1)
settings.register_profile("house", deadline=None)  # a first call pays for the type checks of the tests
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long chains first, so that no process is left with one at the end."""
    first = ("users", "experiments", "test_notebooks.py", "recipes")
    items.sort(key=lambda item: min((first.index(part) for part in item.path.parts if part in first), default=len(first)))


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
    from valign.models.diffusion.miniature import build_miniature

    return build_miniature(tmp_path_factory.mktemp("models") / name, **options)


@pytest.fixture
def few_shapes(monkeypatch):
    """The shapes world with a sixth of the test prompts, eight pairs, four steps: chains of commands end in seconds."""
    from valign.worlds import WORLDS, world

    shapes = world("shapes")
    budgets = {**shapes.budgets, "small": replace(shapes.budgets["small"], pairs=8, steps=4)}

    def suite(**options):
        whole = shapes.suite(**options)
        return replace(whole, prompts=whole.prompts[::6])

    monkeypatch.setitem(WORLDS, "shapes", replace(shapes, budgets=budgets, suite=suite))
    monkeypatch.setattr("valign.recipes.quickstart.STEPS", 4)  # denoising steps of an image


@pytest.fixture
def as_in_use() -> Iterator[None]:
    """Switch the type checks of the tests off, so that bad input meets the sentence that a user would meet."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
