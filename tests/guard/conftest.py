"""A guard without the trained stages, which is quick, and the encoder for the tests that need it."""

import pytest
from guard_stand_ins import with_guard

from valign.policy import load_policy


@pytest.fixture(scope="session")
def policy():
    return with_guard(load_policy("default"), stages=["lexical", "values"])


@pytest.fixture(scope="session")
def guard(policy):
    from valign.guard import Guard

    return Guard.from_policy(policy)


@pytest.fixture(scope="session")
def minilm():
    from valign.models.encoders.minilm import MiniLM

    return MiniLM()
