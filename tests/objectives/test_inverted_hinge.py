import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, AnswerTokens, InvertedHinge


def hinge(logits, label=0):
    """IHL of one token."""
    return InvertedHinge()(AnswerTokens.of(torch.stack([logits, logits])[None], torch.tensor([[-100, label]]), vocabulary=True))[
        0, 0
    ]


def test_the_table_names_it():
    assert PRESERVING["ihl"] is InvertedHinge


def test_values_by_hand():
    # p = (0.2, 0.5, 0.3), y = 0: 1 + 0.2 - 0.5 = 0.7; y = 1: 1 + 0.5 - 0.3 = 1.2
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    assert hinge(logits, 0).item() == pytest.approx(0.7)
    assert hinge(logits, 1).item() == pytest.approx(1.2)
    assert hinge(torch.zeros(7)).item() == pytest.approx(1.0)  # uniform
    assert hinge(torch.tensor([0.3, -1.0])).item() == pytest.approx(2 * torch.tensor([0.3, -1.0]).softmax(0)[0].item())


def test_logits_in_the_unit_interval_are_not_taken_for_probabilities():
    logits = torch.tensor([0.9, 0.1, 0.2])
    p = logits.softmax(0)
    assert hinge(logits).item() == pytest.approx((1 + p[0] - p[2]).item())


def test_the_range_and_the_closed_form_of_the_gradient():
    for seed in range(20):
        logits = (5 * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()
        value = hinge(logits, 2)
        assert 0 <= value.item() <= 2
        (found,) = torch.autograd.grad(value, logits)
        p = logits.detach().softmax(0)
        m = max((v for v in range(6) if v != 2), key=lambda v: p[v])
        expected = p * (p[m] - p[2])
        expected[2] = p[2] * (1 - p[2] + p[m])
        expected[m] = -p[m] * (1 - p[m] + p[2])
        assert_close(found, expected)
        assert abs(found.sum().item()) < 1e-12


def test_it_stops_by_itself_where_ascent_does_not():
    logits = torch.tensor([-20.0, 20.0, 0.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(hinge(logits), logits)
    assert found.norm() < 1e-8
    (ascent,) = torch.autograd.grad(logits.log_softmax(0)[0], logits)
    assert ascent.norm() > 1


def test_the_loss_is_the_mean_over_trained_tokens():
    logits, reference, labels = rows(7)
    tokens = tokens_of(logits, reference, labels)
    p = logits.softmax(2)
    values = []
    for row in range(3):
        for place in range(5):
            if (y := int(labels[row, place + 1])) != -100:
                others = [p[row, place, v] for v in range(5) if v != y]
                values.append(1 + p[row, place, y] - max(others))
    assert_close(InvertedHinge().loss(tokens), torch.stack(values).mean())


def test_refuses_one_word_and_a_negative_weight():
    with pytest.raises(ValueError, match="vocabulary of 2 words or more, got 1"):
        hinge(torch.zeros(1))
    with pytest.raises(ValueError, match=r"InvertedHinge\.retain_weight must be in \[0, inf\), got -1"):
        InvertedHinge(retain_weight=-1.0)
