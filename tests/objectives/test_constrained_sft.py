import pytest
import torch
from token_rows import rows, tokens_of
from torch.nn.functional import softplus
from torch.testing import assert_close

from valign.objectives import PRESERVING, AnswerTokens, ConstrainedSFT, token_mean


def gradient(value, logits):
    (found,) = torch.autograd.grad(value, logits, retain_graph=True)
    return found


def test_the_table_names_it():
    assert PRESERVING["constrained-sft"] is ConstrainedSFT


def test_betas_by_hand():
    assert ConstrainedSFT().betas(3).tolist() == [0.5, 2.0, 2.0]
    assert_close(ConstrainedSFT().betas(7), torch.tensor([0.5, 2, 2, 2, 2, 0.1, 0.1], dtype=torch.float64))
    assert ConstrainedSFT(bias_length=0).betas(2).tolist() == [0.1, 0.1]
    assert ConstrainedSFT(bias_length=1).betas(2).tolist() == [0.5, 0.1]


def test_at_the_reference_it_is_plain_cross_entropy():
    logits, _, labels = rows()
    logits.requires_grad_()
    tokens = tokens_of(logits, logits, labels)
    assert (ConstrainedSFT().weights(tokens)[tokens.mask] == 1).all()
    plain = token_mean(-tokens.log_probs, tokens.mask)
    assert torch.equal(ConstrainedSFT().loss(tokens), plain)
    assert torch.equal(gradient(ConstrainedSFT().loss(tokens), logits), gradient(plain, logits))


def test_its_gradient_is_that_of_the_soft_form():
    # sum over tokens of (2 / beta_t) softplus(beta_t (log ref - log p)), written out token by token
    logits, reference, labels = rows(3, length=9)
    logits.requires_grad_()
    tokens, betas = tokens_of(logits, reference, labels), [0.5, 2, 2, 2, 2, 0.1, 0.1]
    total, count = 0.0, 0
    for row in range(3):
        for place, beta in zip(range(1, 8), betas):
            if labels[row, place + 1] != -100:
                gap = reference[row, place].log_softmax(0) - logits[row, place].log_softmax(0)
                total, count = total + 2 / beta * softplus(beta * gap[labels[row, place + 1]]), count + 1
    assert count == int(tokens.mask.sum())
    assert_close(gradient(ConstrainedSFT().loss(tokens), logits), gradient(total / count, logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gap", "beta", "expected"), [(0.5, 1e-9, 1.0), (50.0, 4.0, 1e-3), (-50.0, 4.0, 2.0)])
def test_limits_of_the_weight(gap, beta, expected):
    tokens = AnswerTokens(torch.tensor([[-60.0 + gap]]), torch.tensor([[True]]), reference=torch.tensor([[-60.0]]))
    assert ConstrainedSFT(beta=beta, bias_length=0).weights(tokens).item() == pytest.approx(expected)


def test_the_count_starts_anew_in_each_turn_unless_told():
    mask, reference = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
    tokens = AnswerTokens(torch.full((1, 4), -1.0), mask, reference=reference, turns=torch.tensor([[0, 0, 1, 1]]))
    first, second = 2 * torch.sigmoid(torch.tensor([0.5, 2.0]))
    assert_close(ConstrainedSFT().weights(tokens)[0], torch.stack([first, second, first, second]))
    assert_close(ConstrainedSFT(per_turn=False).weights(tokens)[0], torch.stack([first, second, second, second]))


@pytest.mark.parametrize("name", ["beta", "bias_factor", "first_token_bias_factor"])
def test_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=rf"ConstrainedSFT\.{name} must be in \(0, inf\), got 0"):
        ConstrainedSFT(**{name: 0.0})
    with pytest.raises(ValueError, match=r"ConstrainedSFT\.bias_length must be in \[0, inf\), got -1"):
        ConstrainedSFT(bias_length=-1)
