import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, SafeAlign, token_mean

COLOURS = torch.tensor([1, -1, 1])


def aligned(seed=14, polarity=COLOURS):
    logits, reference, labels = rows(seed)
    logits.requires_grad_()
    return tokens_of(logits, reference, labels, polarity=polarity), logits


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def plain(tokens, chosen):
    mask = tokens.mask & chosen[:, None]
    return (torch.where(mask, -tokens.log_probs, 0.0)).sum() / mask.sum()


def test_the_table_names_it():
    assert PRESERVING["safe-align"] is SafeAlign


@pytest.mark.parametrize("objective", [SafeAlign(), SafeAlign(strategy="B", lambda2=0.0)])
def test_without_the_red_term_it_is_fine_tuning_on_blue_rows(objective):
    tokens, logits = aligned()
    expected = plain(tokens, COLOURS > 0)
    assert_close(objective.loss(tokens), expected)
    assert_close(gradient(objective.loss(tokens), logits), gradient(expected, logits))


def test_without_a_stop_red_rows_get_plain_ascent():
    tokens, logits = aligned()
    red = SafeAlign(strategy="B", tau=1e9).parts(tokens).red
    assert_close(gradient(red, logits), -0.1 * gradient(plain(tokens, COLOURS < 0), logits))


def test_only_tokens_below_the_stop_are_pushed_away():
    tokens, _ = aligned()
    tau = float((-tokens.log_probs.detach())[1][tokens.mask[1]].median())
    below = [v for v in (-tokens.log_probs)[1][tokens.mask[1]].tolist() if v <= tau]
    assert 0 < len(below) < int(tokens.mask[1].sum())
    red = SafeAlign(strategy="B", tau=tau).parts(tokens).red
    assert red.item() == pytest.approx(-0.1 * sum(below) / len(below))
    assert -0.1 * tau <= red.item() <= 0


def test_improbable_red_rows_cost_exactly_nothing():
    tokens, logits = aligned(polarity=torch.tensor([-1, -1, -1]))
    loss = SafeAlign(strategy="B", tau=1e-6).loss(tokens)
    assert loss.item() == 0
    assert (gradient(loss, logits) == 0).all()


def test_a_mixed_batch_is_the_sum_of_its_colours():
    tokens, _ = aligned()
    logits, reference, labels = rows(14)
    objective = SafeAlign(strategy="B", tau=3.0)
    blue = tokens_of(logits[[0, 2]], reference[[0, 2]], labels[[0, 2]], polarity=COLOURS[[0, 2]])
    red = tokens_of(logits[[1]], reference[[1]], labels[[1]], polarity=COLOURS[[1]])
    assert_close(objective.loss(tokens), objective.loss(blue) + objective.loss(red))
    assert_close(objective.loss(blue), token_mean(-blue.log_probs, blue.mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda1": -1.0}, r"SafeAlign\.lambda1 must be in \[0, inf\), got -1"),
        ({"lambda2": -0.1}, r"SafeAlign\.lambda2 must be in \[0, inf\), got -0\.1"),
        ({"tau": 0.0}, r"SafeAlign\.tau must be in \(0, inf\), got 0"),
        ({"strategy": "C"}, r"SafeAlign\.strategy must be one of A, B; got 'C'"),
    ],
)
def test_bad_options_are_refused(options, message, as_in_use):
    with pytest.raises(ValueError, match=message):
        SafeAlign(**options)
