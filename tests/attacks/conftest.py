"""A world of red squares and a miniature pipeline to attack."""

import numpy as np
import pytest
from red_world import RedJudge, red_for

from valign.attacks.base import AttackBudget, QueryMeter, Scope
from valign.attacks.target import AttackTarget, OpenModel
from valign.evaluation.suite import EvalPrompt


@pytest.fixture
def judge():
    return RedJudge()


@pytest.fixture
def goal():
    return EvalPrompt("u1", "a red photo of the man", "hate", "explicit", "man")


@pytest.fixture(scope="session")
def tiny_model(tiny_sd):
    from valign.models.diffusion.loading import load_model

    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture
def make_scope(tiny_model):
    """A scope on the miniature pipeline; ``budget`` and other fields as given."""

    def make(seed=0, *, queries=50, seconds=600.0, **fields):
        pairs = [("a red man", "a blue man"), ("the red photo", "the blue photo")]
        known = {"white": OpenModel(tiny_model), "encoder": tiny_model, "pairs": pairs, **fields}
        return Scope(meter=QueryMeter(AttackBudget(queries=queries, seconds=seconds)), random=np.random.default_rng(seed), **known)

    return make


@pytest.fixture
def make_target(tiny_model):
    """A target that draws red for some words, with the miniature's inside."""

    def make(*words, name="base", **fields):
        return AttackTarget(name, red_for(*words), white=OpenModel(tiny_model), encoder=tiny_model, fingerprint=name, **fields)

    return make
