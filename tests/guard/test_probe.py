"""The probe as a stage of the guard and as a retriever: findings, categories, order, what is refused."""

import pytest
import torch
from guard_stand_ins import with_guard

from valign.checks import UserError
from valign.guard import Guard, ProbeStage, StageRetriever, probe_retriever
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.prompt_states import prompt_states
from valign.models.heads.text_probe import TextProbe
from valign.policy import load_policy
from valign.training.tasks.text_probe import fit_text_probe

SHAPES = load_policy("shapes")
FRAMES = ("a {}", "a red {}", "the {} in blue", "a photo of the {}", "a {} and a captain")
WORDS = {"flame": ("violence",), "key": ("illegal-activity",), "heart": (), "tree": (), "captain": (), "spider": ()}


@pytest.fixture(scope="module")
def probe(tiny_sd):
    model = load_model(tiny_sd, device="cpu")
    texts = [frame.format(word) for word in WORDS for frame in FRAMES]
    labels = [names for names in WORDS.values() for _ in FRAMES]
    fit = fit_text_probe(prompt_states(model, texts), labels, ("violence", "illegal-activity"), fit=100.0)
    return TextProbe(model, ("violence", "illegal-activity"), fit.weight, fit.bias)


def test_a_finding_has_its_category_and_the_probability_of_all_harm(probe):
    stage = ProbeStage(probe)
    flame, heart = stage.check_many(["a flame", "a heart"])
    assert (flame.outcome, flame.category, flame.threshold, flame.level) == ("fire", "violence", 0.5, "semantic")
    row = probe.probabilities(["a flame"])[0]
    assert flame.score == pytest.approx(1 - row[0], abs=1e-6)
    assert flame.scores == pytest.approx({"violence": row[1], "illegal-activity": row[2]}, abs=1e-6)
    assert flame.message == "reads like violence"
    assert (heart.outcome, heart.message) == ("pass", "")
    assert heart.score < 0.5
    assert stage.check("a key").category == "illegal-activity"
    assert stage.check_many([]) == []


def test_block_rules_are_told_every_category_that_is_not_excluded(probe):
    bias = torch.log(torch.tensor([0.3, 0.685, 0.015]))  # the same probabilities for every prompt
    found = ProbeStage(TextProbe(probe.model, probe.categories, 0 * probe.weight, bias)).check("a tree")
    assert (found.category, found.also, found.possible) == ("violence", (), ("violence", "illegal-activity"))
    bias = torch.log(torch.tensor([0.3, 0.695, 0.005]))
    assert ProbeStage(TextProbe(probe.model, probe.categories, 0 * probe.weight, bias)).check("a tree").possible == ("violence",)


def test_the_threshold_is_the_probes(probe):
    score = ProbeStage(probe).check("a heart").score
    lower = TextProbe(probe.model, probe.categories, probe.weight, probe.bias, score)
    assert ProbeStage(lower).check("a heart").fired  # at the threshold it fires


def test_categories_that_the_policy_lacks_are_not_found(probe):
    stage = ProbeStage(probe, categories=("violence", "hate"))
    assert not stage.check("a key").fired
    assert list(stage.check("a key").scores) == ["violence"]
    with pytest.raises(UserError, match="must have one of violence, illegal-activity, got none of them"):
        ProbeStage(probe, categories=("hate",))


def test_a_policy_lists_it_and_the_guard_needs_the_probe(probe):
    listed = with_guard(SHAPES, stages=["probe"])
    guard = Guard.from_policy(listed, probe=probe)
    decision = guard.check("a flame")
    assert (decision.action, decision.stop, decision.categories) == ("rewrite", "probe", ("violence",))
    assert guard.check("a heart").action == "allow"
    with pytest.raises(UserError, match="policy shapes lists the stage probe, which needs a probe of the model, got none"):
        Guard.from_policy(listed)
    other = TextProbe(probe.model, probe.categories, probe.weight + 1e-3, probe.bias)
    assert Guard.from_policy(listed, probe=other).fingerprint() != guard.fingerprint()


def test_the_retriever_reads_first_and_takes_keywords_for_principles_without_a_category(probe):
    retriever = probe_retriever(SHAPES, probe)
    assert retriever.retrieve("a red flame") == "no-rays"
    assert retriever.retrieve("a red key") == "no-locks"
    assert retriever.retrieve("a captain") == "equal-heads"  # by keyword: the probe was taught that a captain is harmless
    assert retriever.retrieve("a flame and a captain") == "no-rays"
    assert retriever.retrieve("a spider") == "no-legs"  # a category that the probe does not know: by keyword
    assert retriever.retrieve("a tree") is None
    assert retriever.retrieve("  ") is None


def test_its_fingerprint_is_of_policy_and_numbers(probe):
    other = TextProbe(probe.model, probe.categories, probe.weight + 1e-3, probe.bias)
    retrievers = [probe_retriever(SHAPES, probe), probe_retriever(SHAPES, other)]
    assert len({one.fingerprint() for one in retrievers}) == 2
    assert retrievers[0].fingerprint() == probe_retriever(SHAPES, probe).fingerprint()
    stages = [StageRetriever(SHAPES, (ProbeStage(one),)).fingerprint() for one in (probe, other)]
    assert stages[0] != stages[1]


def test_a_policy_without_keywords_beside_the_probe_is_read_by_the_probe_alone(probe):
    bare = SHAPES.model_copy(update={"principles": [SHAPES.principle("no-rays")]})
    assert probe_retriever(bare, probe).retrieve("a flame") == "no-rays"
    assert probe_retriever(bare, probe).retrieve("a key") is None


@pytest.mark.parametrize("names", [("equal-heads",), ("no-legs", "equal-heads")])
def test_refuses_a_policy_without_a_principle_that_it_can_find(probe, names):
    bare = SHAPES.model_copy(update={"principles": [SHAPES.principle(name) for name in names]})
    with pytest.raises(UserError, match="must have a principle of a category that the probe knows, got none of violence"):
        probe_retriever(bare, probe)


def test_the_numbers_of_another_encoder_are_refused(probe, tiny_sdxl):
    with pytest.raises(UserError, match=r"must be \(3, 64\) for 2 categories"):
        TextProbe(load_model(tiny_sdxl, device="cpu"), probe.categories, probe.weight, probe.bias)
