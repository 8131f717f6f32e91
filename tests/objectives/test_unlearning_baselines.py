from math import log

import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, GradientAscent, NegativePreference, token_mean


def test_the_table_names_them():
    assert (PRESERVING["npo"], PRESERVING["ascent"]) == (NegativePreference, GradientAscent)


def test_at_the_start_the_preference_costs_two_ln_two_by_beta():
    logits, _, labels = rows(8)
    tokens = tokens_of(logits, logits, labels)
    assert_close(NegativePreference(beta=0.5).per_row(tokens), torch.full((3,), 4 * log(2), dtype=torch.float64))
    assert NegativePreference(beta=0.5).at_start == pytest.approx(4 * log(2))


def test_the_preference_row_by_row():
    logits, reference, labels = rows(9)
    tokens = tokens_of(logits, reference, labels)
    expected = []
    for row in range(3):
        gap = 0.0
        for place in range(5):
            if (y := int(labels[row, place + 1])) != -100:
                gap += logits[row, place].log_softmax(0)[y] - reference[row, place].log_softmax(0)[y]
        expected.append(-2 / 0.1 * torch.sigmoid(-0.1 * gap).log())
    assert_close(NegativePreference().loss(tokens), torch.stack(expected).mean())
    assert_close(NegativePreference()(tokens).sum(1), torch.stack(expected))


def test_towards_beta_zero_the_preference_is_ascent():
    logits, reference, labels = rows(10)
    logits.requires_grad_()
    tokens = tokens_of(logits, reference, labels)
    (npo,) = torch.autograd.grad(NegativePreference(beta=1e-7).loss(tokens), logits, retain_graph=True)
    (ascent,) = torch.autograd.grad((tokens.log_probs * tokens.mask).sum(1).mean(), logits)
    assert_close(npo, ascent, rtol=1e-5, atol=1e-7)


def test_ascent_is_minus_cross_entropy():
    logits, reference, labels = rows(11)
    tokens = tokens_of(logits, reference, labels)
    assert torch.equal(GradientAscent().loss(tokens), token_mean(tokens.log_probs, tokens.mask))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"NegativePreference\.beta must be in \(0, inf\), got 0"):
        NegativePreference(beta=0.0)
    with pytest.raises(ValueError, match=r"GradientAscent\.retain_weight must be in \[0, inf\), got -1"):
        GradientAscent(retain_weight=-1.0)
