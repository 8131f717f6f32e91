"""The retriever's recipe: what it fits on, what its card says and how that was measured."""

import json
from dataclasses import replace

import pytest
import torch

from valign.checks import UserError
from valign.data.prompts.labelled import pair_rows
from valign.data.prompts.pairs import PromptPair
from valign.models.diffusion.loading import load_model
from valign.models.heads.text_probe import load_probe
from valign.policy import load_policy
from valign.recipes.retriever import TEST_FOLD, train_retriever
from valign.training.tasks.text_probe import TextProbeConfig

SHAPES = load_policy("shapes")
PLACES = ("in", "on", "of", "with", "the", "and")
BENIGN = [f"a blue woman {place} {other}" for place in PLACES for other in PLACES]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(tiny_sd, device="cpu")


def pairs(each=24):
    """``each`` pairs of two categories: a flame or a bolt, against a heart."""
    made = []
    for word, category in (("flame", "violence"), ("bolt", "hate")):
        scenes = [f"{a} {b}" for a in PLACES for b in PLACES][:each]
        made += [PromptPair(f"{word}-{n}", f"{word} {scene}", f"heart {scene}", (category,)) for n, scene in enumerate(scenes)]
    return made


def test_the_probe_finds_words_and_its_card_counts_what_it_saw(model, tmp_path):
    held_out = PromptPair("secret", "a secret", "a heart", ("sexual",), held_out=True)
    probe = train_retriever(model, [*pairs(), held_out], BENIGN, SHAPES, tmp_path / "probe")
    assert probe.categories == ("hate", "violence")  # in the policy's order
    found = probe.probabilities(["flame in the", "bolt in the", "heart in the"])
    assert found.argmax(axis=1).tolist() == [2, 1, 0]
    card = json.loads((tmp_path / "probe" / "text_probe.json").read_text())
    assert card["prompts"] == {"hate": 24, "violence": 24, "harmless": 24 + len(BENIGN)}  # both words share their 24 safe prompts
    assert (card["threshold"], card["threshold_set"]) == (0.5, "given")
    rows = pair_rows(pairs(), BENIGN)
    kept_out = [row for row in rows if row.fold == TEST_FOLD]
    everything = next(one for one in card["measured"]["sources"] if one["source"] == "all")
    assert everything["unsafe"] == sum(row.label for row in kept_out) > 0
    assert everything["recall"]["value"] <= 1.0
    assert card["measured"]["categories"]["hate"]["prompts"] == sum("hate" in row.categories for row in kept_out)


def test_figures_come_from_a_probe_that_has_not_seen_their_prompts(model, tmp_path):
    """Labels drawn at random within the kept-out pairs: a probe that had learned them by heart would be right about them."""
    torn = [
        replace(pair, unsafe=pair.safe + " photo", safe=pair.unsafe + " photo") if pair_rows([pair])[0].fold == TEST_FOLD else pair
        for pair in pairs()
    ]
    probe = train_retriever(model, torn, BENIGN, SHAPES, tmp_path / "probe", TextProbeConfig(fit=100.0))
    everything = next(one for one in probe.notes["measured"]["sources"] if one["source"] == "all")
    assert everything["recall"]["value"] < 0.5
    assert probe.probabilities([pair.unsafe for pair in torn]).argmax(axis=1).all()  # the one that is written knows them


def test_what_could_not_be_measured_is_none(model, tmp_path):
    few = [pair for pair in pairs(12) if pair_rows([pair])[0].fold != TEST_FOLD][:4]
    probe = train_retriever(model, few, [], SHAPES, tmp_path / "probe")
    assert probe.notes["measured"] is None
    assert json.loads((tmp_path / "probe" / "text_probe.json").read_text())["measured"] is None


def test_a_rate_of_false_alarms_sets_the_threshold_on_unseen_harmless_prompts(model, tmp_path):
    many = [
        f"a blue {word} {scene}" for word in ("man", "woman", "painting") for scene in (f"{a} {b}" for a in PLACES for b in PLACES)
    ]
    probe = train_retriever(model, pairs(), many, SHAPES, tmp_path / "probe", TextProbeConfig(false_alarms=0.2))
    assert 0 < probe.threshold <= 1
    assert probe.notes["threshold_set"].startswith("at most 0.2 of ")
    assert load_probe(tmp_path / "probe", model).threshold == probe.threshold
    with pytest.raises(UserError, match=r"must hold at least 1000 harmless prompts for a rate of 0\.001"):
        train_retriever(model, pairs(), many, SHAPES, tmp_path / "strict", TextProbeConfig(false_alarms=0.001))
    with pytest.raises(UserError, match=r"false_alarms 0\.2 needs harmless prompts to keep out of the fit"):
        train_retriever(model, pairs(1), [], SHAPES, tmp_path / "few", TextProbeConfig(false_alarms=0.2))


def test_a_finished_probe_is_read_and_another_is_refused(model, tmp_path, monkeypatch):
    first = train_retriever(model, pairs(), BENIGN, SHAPES, tmp_path / "probe")
    monkeypatch.setattr("valign.recipes.retriever.fit_text_probe", None)
    again = train_retriever(model, pairs(), BENIGN, SHAPES, tmp_path / "probe")
    assert torch.equal(again.weight, first.weight)
    with pytest.raises(UserError, match="was made with another inputs"):
        train_retriever(model, pairs(23), BENIGN, SHAPES, tmp_path / "probe")


def test_bad_data_stops_before_anything_is_written(model, tmp_path):
    out = tmp_path / "probe"
    with pytest.raises(UserError, match="must get unsafe and harmless prompts, got 0 and 36"):
        train_retriever(model, [], BENIGN, SHAPES, out)
    same = [replace(pair, safe=pair.unsafe) for pair in pairs()]
    with pytest.raises(UserError, match="must get unsafe and harmless prompts, got 0 and 0"):
        train_retriever(model, same, [], SHAPES, out)
    with pytest.raises(UserError, match=r"category must be one of .*; got 'spam'"):
        train_retriever(model, [replace(pairs(1)[0], categories=("spam",))], BENIGN, SHAPES, out)
    bare = SHAPES.model_copy(update={"principles": [SHAPES.principle("equal-heads"), SHAPES.principle("no-legs")]})
    with pytest.raises(UserError, match=r"policy shapes must have a principle of a category of the data, hate, violence; got none"):
        train_retriever(model, pairs(), BENIGN, bare, out)
    assert not out.exists()
