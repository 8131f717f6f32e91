"""Which words must change, the judge, and a fit of the editing model, on words that mean nothing."""

import shutil

import numpy as np
import pytest
import torch

from valign.checks import UserError
from valign.data.prompts.pairs import LabelledPrompt
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.edit_model import DELETE, KEEP, REPLACE, judge_logits
from valign.models.heads.ngrams import ngram_ids
from valign.training.engine.checkpoint import Checkpoints
from valign.training.tasks.rewriter.fit import EditTask, RewriterConfig, fit_edits, vocabulary_of, with_masks
from valign.training.tasks.rewriter.judge import fit_judge
from valign.training.tasks.rewriter.labels import EditExample, aligned, examples, matched, smallest_changes, without, words_of

CONFIG = RewriterConfig(steps=2, batch_size=4, tuned_layers=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


def row(number, prompt, label, pair=""):
    return LabelledPrompt(f"t:{number}", prompt, label, ("violence",) if label else (), "t", pair or f"t:{number}", pair)


def risk_of(*bad):
    """Harm as long as one of these words is there, more with more of them."""
    return lambda texts: np.array([len(set(bad) & set(text.split())) - 0.5 for text in texts])


def test_a_twin_is_aligned_word_by_word():
    found = aligned("a man hits the dog hard", "a man strokes the dog")
    assert found.changed == [False, False, True, False, False, True]
    assert found.gone == [False, False, False, False, False, True]
    assert found.instead == ["", "", "strokes", "", "", ""]


def test_unequal_runs_are_matched_by_form():
    assert matched(["hitting", "dogs"], ["gently", "stroking", "all", "cats"]) == ["stroking", "cats"]
    assert matched(["hits"], ["ran", "slowly"]) == [""]


def test_leaving_words_out_closes_the_gap():
    assert without("a man hits the dog", [2]) == "a man the dog"
    assert words_of("the man's dog") == ["the", "man", "dog"]


def test_the_smallest_set_holds_all_words_that_harm():
    prompt = "a man hits the dog with rope"
    every = [[True] * 7]
    assert smallest_changes([prompt], every, risk_of("hits")) == [(2,)]
    assert smallest_changes([prompt], every, risk_of("hits", "rope")) == [(2, 6)]  # neither alone is enough
    assert smallest_changes([prompt], every, risk_of("a")) == [None]  # function words are never tried
    assert smallest_changes([prompt], [[False] * 7], risk_of("hits")) == [None]


def test_examples_come_from_pairs_alone():
    rows = [row(0, "a man hits the dog", 1, "p"), row(1, "a man pets the dog", 0, "p"), row(2, "a man hits", 1), row(3, "a cup", 0)]
    (found,) = examples(rows, risk_of("hits"), most=9, seed=0)
    assert (found.prompt, found.change, found.instead[2]) == (rows[0].prompt, (False, False, True, False, False), "pets")
    assert not any(found.open)


def test_the_judge_is_a_logistic_regression_by_hand():
    texts = [("a hit", 1), ("a fight", 1), ("a cup", 0), ("a tree", 0)] * 4
    judge = fit_judge([row(number, text, label) for number, (text, label) in enumerate(texts)], 256)
    scores = judge_logits(judge["judge.weight"], judge["judge.bias"], ["a hit", "a cup", "a tree and a fight"])
    assert scores[0] > scores[1]
    grams = ngram_ids("a cup", 256)
    expected = judge["judge.bias"] + judge["judge.weight"][grams].sum() / len(grams) ** 0.5
    assert float(scores[1]) == pytest.approx(float(expected), abs=1e-5)


NO3, NO5 = (False,) * 3, (False,) * 5
EXAMPLES = [
    EditExample("e0", "a man hits the dog", "violence", (False, False, True, False, False), NO5, NO5, ("", "", "pets", "", "")),
    EditExample("e1", "a cruel man", "hate", (False, True, False), NO3, (False, True, False), ("", "", "")),
]
CAPTIONS = ["a dog pets a cat", "a red cup near a tree"]


def test_tags_say_keep_delete_or_replace_by_which_category(encoder):
    task = EditTask(EXAMPLES, CAPTIONS, ("hate", "violence"), ("cup", "pets"), encoder, CONFIG)
    assert [task._goal(EXAMPLES[0], word)[0] for word in range(5)] == [KEEP, KEEP, REPLACE + 1, KEEP, KEEP]
    assert task._goal(EXAMPLES[1], 1)[0] == DELETE
    assert task._goal(None, 0) == (KEEP, 1.0)


def test_masks_stand_for_words(encoder):
    assert with_masks("a red cup, near a tree", [1, 5]) == "a [MASK] cup, near a [MASK]"
    assert vocabulary_of(["a cup", "the cup", "cup tree"], encoder) == ("cup",)  # three times; function words never


def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(encoder, tmp_path, monkeypatch):
    given = (EXAMPLES, CAPTIONS, ("hate", "violence"), ("cup", "dog", "pets", "tree"), encoder)
    monkeypatch.setattr(Checkpoints, "prune", lambda *_, **__: None)
    whole = fit_edits(*given, CONFIG, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000002")
    resumed = fit_edits(*given, CONFIG, out=tmp_path / "cut")
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_nothing_to_learn_from_is_refused(encoder):
    with pytest.raises(UserError, match=r"fit_edits\.examples must not be empty"):
        fit_edits([], CAPTIONS, ("hate",), ("cup",), encoder, CONFIG)
