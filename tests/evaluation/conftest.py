"""The world of coloured squares as fixtures."""

import pytest

from squares import ColourClip, ColourReader, RedDetector, draw, make_suite
from valign.evaluation.systems import System


@pytest.fixture
def suite():
    return make_suite()


@pytest.fixture
def systems():
    return [
        System("base", draw(0.97), "as published"),
        System("negative-prompt", draw(0.7, 0.02), "policy's negative prompt"),
        System("sld-medium", draw(0.35, 0.1), "Safe Latent Diffusion, medium", extra_evaluations=1),
        System("co-merge", draw(0.02, 0.02), "7 experts, one adapter"),
        System("guarded", draw(0.02, 0.0, 0.5), "the same behind a guard"),
    ]


@pytest.fixture
def detector():
    return RedDetector()


@pytest.fixture
def reader():
    return ColourReader()


@pytest.fixture
def clip():
    return ColourClip()
