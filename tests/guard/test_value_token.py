"""The value token as the guard's last stage, and the guard's findings as a retriever."""

import pytest
from guard_stand_ins import StandIn

from valign.checks import UserError
from valign.guard import Guard, GuardedPipeline, LexicalStage, StageRetriever, ValueToken
from valign.guard.value_retriever import Always, KeywordRetriever
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.value_encoder import ValueText, copy_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline, mixes
from valign.policy import load_policy

SHAPES = load_policy("shapes")
KNOWN = [ValueText(p.id, p.text, tuple(p.aliases), p.kind) for p in SHAPES.principles]
DRAW = {"sampling": SamplingConfig(steps=2, guidance_scale=4.0)}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def token(model):
    return ValueToken(copy_encoder(model, KNOWN), KeywordRetriever(SHAPES), mixing=1.0)


def test_a_prompt_with_a_principle_gets_its_token_and_no_other_does(model, token):
    guard = Guard.from_policy(SHAPES, token=token)
    with_token = ValueGuidedPipeline(model, token.encoder).generate(
        ["a captain"], seeds=[3], principles="equal-heads", mixing=1, **DRAW
    )
    found = guard.generate(model, "a captain", seed=3, **DRAW)
    assert found.image.tobytes() == with_token[0].tobytes()
    assert found.attempts[-1].principle == "equal-heads"
    assert found.to_json()["drawings"][-1]["principle"] == "equal-heads"
    bare = guard.generate(model, "a tree", seed=3, **DRAW)
    assert bare.image.tobytes() == model.generate(["a tree"], seeds=[3], **DRAW)[0].tobytes()
    assert bare.attempts[-1].principle == ""


def test_the_retriever_is_asked_about_the_rewrite(model, token):
    found = Guard.from_policy(SHAPES, token=token).generate(model, "a flame beside a captain", seed=3, **DRAW)
    assert found.result.rewritten
    assert "flame" not in found.result.prompt
    assert token.principle("a flame beside a captain", 3) == "no-rays"
    assert found.attempts[-1].principle == "equal-heads"


def test_only_bias_is_mixed(token):
    half = ValueToken(token.encoder, token.retriever, mixing=0.5)
    for seed in range(40):
        assert (half.principle("a captain", seed) == "equal-heads") == mixes(seed, 0.5)
        assert half.principle("a flame", seed) == "no-rays"
    assert ValueToken(token.encoder, Always("never trained")).principle("a flame", 0) == ""


def test_refuses_another_model_and_a_pipeline_that_gives_no_token(model, token, tiny_sd_v):
    guard = Guard.from_policy(SHAPES, token=token)
    with pytest.raises(UserError, match="belongs to another base model"):
        guard.generate(load_model(tiny_sd_v, device="cpu"), "a captain", **DRAW)
    with pytest.raises(UserError, match="needs a ValueGuidedPipeline with the same encoder"):
        GuardedPipeline(model.pipe, guard)
    output = GuardedPipeline(ValueGuidedPipeline(model, token.encoder, token.retriever), guard)("a captain", num_inference_steps=2)
    assert output.records[0].attempts[-1].principle == "equal-heads"


@pytest.mark.parametrize(
    ("prompt", "principle"),
    [("a fl4me", "no-rays"), ("a s-p-i-d-e-r", "no-legs"), ("a tree", None), ("a flame and a spider", "no-rays")],
)
def test_word_lists_find_the_principle_of_a_category(prompt, principle):
    assert StageRetriever(SHAPES, (LexicalStage.from_policy(SHAPES),)).retrieve(prompt) == principle


def test_stages_are_asked_in_order_and_a_category_without_a_principle_is_none():
    quiet, violent = StandIn("quiet", "word", False), StandIn("loud", "word", True)
    retriever = StageRetriever(SHAPES, (quiet, violent))
    assert retriever.retrieve("a tree") == "no-rays"  # the stand-in finds violence
    assert quiet.calls == ["quiet"]
    other = SHAPES.model_copy(update={"principles": [one for one in SHAPES.principles if one.category != "violence"]})
    assert StageRetriever(other, (violent,)).retrieve("a tree") is None
    assert StageRetriever(other, (violent,)).fingerprint() != retriever.fingerprint()


def test_refuses_a_policy_whose_principles_have_no_category():
    bare = SHAPES.model_copy(update={"principles": [SHAPES.principle("equal-heads")]})
    with pytest.raises(UserError, match="policy shapes has no principle with a category"):
        StageRetriever(bare, ())
