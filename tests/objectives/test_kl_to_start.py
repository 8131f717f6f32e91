import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, KlToStart


def test_the_table_names_it():
    assert PRESERVING["kl"] is KlToStart


def test_the_divergence_word_by_word():
    logits, reference, labels = rows(12)
    tokens = tokens_of(logits, reference, labels)
    forward, reverse = [], []
    for row, place in tokens.mask.nonzero().tolist():
        start, policy = (side[row, place].softmax(0).tolist() for side in (reference, logits))
        forward.append(sum(p * (torch.tensor(p) / q).log().item() for p, q in zip(start, policy)))
        reverse.append(sum(p * (torch.tensor(p) / q).log().item() for p, q in zip(policy, start)))
    assert_close(KlToStart(weight=0.3).loss(tokens).item(), 0.3 * sum(forward) / len(forward), rtol=1e-5, atol=0)
    assert_close(KlToStart(direction="reverse").loss(tokens).item(), sum(reverse) / len(reverse), rtol=1e-5, atol=0)


def test_the_start_costs_nothing_and_pulls_nowhere():
    logits, _, labels = rows(13)
    logits.requires_grad_()
    loss = KlToStart().loss(tokens_of(logits, logits, labels))
    assert abs(loss.item()) < 1e-15
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15


def test_bad_options_are_refused(as_in_use):
    with pytest.raises(ValueError, match=r"KlToStart\.weight must be in \[0, inf\), got -1"):
        KlToStart(weight=-1.0)
    with pytest.raises(ValueError, match=r"KlToStart\.direction must be one of forward, reverse; got 'both'"):
        KlToStart(direction="both")
