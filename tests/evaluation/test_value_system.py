import numpy as np
import pytest

from valign.checks import UserError
from valign.evaluation import value_system
from valign.guard.value_retriever import KeywordRetriever
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.value_encoder import ValueText, copy_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
from valign.policy import load_policy

MADE = {"sampling": SamplingConfig(steps=2, guidance_scale=4.0)}


@pytest.fixture(scope="module")
def pipeline(tiny_sd):
    model, policy = load_model(tiny_sd, device="cpu"), load_policy("shapes")
    principles = [ValueText(p.id, p.text, tuple(p.aliases), p.kind) for p in policy.principles]
    return ValueGuidedPipeline(model, copy_encoder(model, principles), KeywordRetriever(policy))


def test_it_draws_what_the_pipeline_draws_and_leaves_other_prompts_alone(pipeline):
    system = value_system(pipeline, name="livo", mixing=1.0, **MADE)
    drawn = system.generate(["a captain", "a tree"], [1, 2])
    base = pipeline.model.generate(["a captain", "a tree"], seeds=[1, 2], **MADE)
    with_token = pipeline.generate(["a captain"], seeds=[1], principles="equal-heads", mixing=1.0, **MADE)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(with_token[0]))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(base[0]))
    alone = pipeline.model.generate(["a tree"], seeds=[2], **MADE)
    assert np.array_equal(np.asarray(drawn[1]), np.asarray(alone[0]))


def test_its_fingerprint_knows_the_mixing(pipeline):
    assert value_system(pipeline, name="a", **MADE).fingerprint == value_system(pipeline, name="b", **MADE).fingerprint
    assert value_system(pipeline, name="a", mixing=0.7, **MADE).fingerprint != value_system(pipeline, name="a", **MADE).fingerprint


def test_refuses_a_pipeline_that_would_never_give_a_token(pipeline):
    bare = ValueGuidedPipeline(pipeline.model, pipeline.encoder)
    with pytest.raises(UserError, match="livo needs a pipeline with a retriever"):
        value_system(bare, name="livo", **MADE)
