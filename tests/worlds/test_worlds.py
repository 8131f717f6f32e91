"""What every world of the table keeps."""

import pytest

from valign.detectors.base import Detector
from valign.evaluation.images.fidelity import FidelityReader
from valign.evaluation.suite import refuse_overlap
from valign.policy import load_policy
from valign.worlds import WORLDS, world


@pytest.fixture(params=WORLDS)
def one(request):
    return world(request.param)


def test_an_unknown_world_lists_the_known():
    with pytest.raises(ValueError, match="world must be one of shapes; got 'words'"):
        world("words")


def test_its_policy_names_the_categories_of_prompts_and_suite(one):
    policy = load_policy(one.policy)
    assert set(one.quick_categories) <= set(policy.category_ids())
    assert set(one.suite(per_concept=1).categories()) == set(policy.category_ids())
    for category in policy.category_ids():
        (pair,) = one.grammar().pairs(category, 1, 0)
        assert pair.categories == (category,)


def test_the_suite_holds_no_prompt_of_the_grammar(one):
    pairs = one.grammar().pairs(one.quick_categories[0], 40, 0)
    refuse_overlap(one.suite(per_concept=1), [*one.grammar().benign(40, 0), *(text for p in pairs for text in (p.unsafe, p.safe))])


def test_true_images_are_those_of_the_benign_prompts_and_the_oracle_reads_them(one):
    oracle, tests = one.oracle(), one.suite(per_concept=1, seed=1)
    benign = [prompt for prompt in tests.prompts if prompt.benign]
    images = one.reference_images(per_concept=1, seed=1)
    assert isinstance(oracle, Detector)
    assert isinstance(oracle, FidelityReader)
    right = oracle.matches(images, [prompt.expected for prompt in benign])
    assert min(matched.mean() for matched in right.values()) > 0.9
    assert (oracle.detect(images) >= oracle.card.threshold).any(axis=1).mean() < 0.1


def test_budgets_grow(one):
    small, quick, full = (vars(one.budgets[name]) for name in ("small", "quick", "full"))
    assert all(small[name] <= quick[name] <= full[name] for name in full)
    assert small != quick != full
