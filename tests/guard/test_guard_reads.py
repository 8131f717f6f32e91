"""What the model reads of a long prompt is judged too: a word that is cut there may be another word."""

import pytest

from valign.guard import Guard, GuardedPipeline
from valign.models.diffusion.loading import load_model
from valign.policy import load_policy


class CutsAt:
    """A model whose text encoder reads so many characters."""

    def __init__(self, characters):
        self.characters = characters

    def text_read(self, prompts):
        return [prompt[: self.characters] for prompt in prompts]


@pytest.fixture(scope="module")
def guard():
    policy = load_policy("default")
    return Guard.from_policy(policy.model_copy(update={"guard": policy.guard.model_copy(update={"stages": ["lexical", "values"]})}))


def test_a_word_that_the_limit_makes_is_found(guard):
    prompt = "a calm lake with corpsewort on its banks"
    assert guard.check(prompt).action == "allow"
    cut = guard.for_model(CutsAt(len("a calm lake with corpse")))
    decision = cut.check(prompt)
    assert (decision.action, decision.stop) == ("rewrite", "lexical")
    assert decision.trace[-2].span is None or decision.trace[-1].span is None  # a place in another text
    assert not cut.passes(prompt)
    assert cut.catches([prompt, "a calm lake"]) == [True, False]
    assert cut.guard(prompt).prompt is None or guard.passes(cut.guard(prompt).prompt)
    assert guard.for_model(CutsAt(1000)).check(prompt).action == "allow"


@pytest.mark.parametrize("end", [10, 23, 30])
def test_a_harmless_prompt_stays_harmless_wherever_it_is_cut(guard, end):
    prompt = "a calm lake with corporate towers on its banks"
    assert guard.for_model(CutsAt(end)).check(prompt).action == "allow"
    assert guard.for_model(object()) is guard  # a model that does not say what it reads


def test_a_model_says_what_it_reads_while_it_generates_with_other_settings(tiny_sd, guard):
    model = load_model(tiny_sd, device="cpu")
    keeper = guard.for_model(model)
    long = "a quiet lake " * 60
    assert keeper.read(long) != long
    assert keeper.read("a quiet lake") == "a quiet lake"
    model.encode_prompts([long])
    assert keeper.check(long).action == "allow"


def test_a_guarded_pipeline_knows_what_its_pipeline_reads(tiny_sd, guard):
    pipe = load_model(tiny_sd, device="cpu").pipe
    long = "a quiet lake " * 60
    assert GuardedPipeline(pipe, guard).guard.read(long) == load_model(tiny_sd, device="cpu").text_read([long])[0] != long
    assert GuardedPipeline(object(), guard).guard is guard
