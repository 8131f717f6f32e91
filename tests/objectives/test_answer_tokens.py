import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, AnswerTokens, TokenObjective, token_kl, token_mean


def test_logits_and_labels_are_shifted_once():
    labels = torch.tensor([[3, 1, 4, 2]])
    logits = torch.full((1, 4, 5), -30.0)
    logits[0, torch.arange(3), labels[0, 1:]] = 30.0  # a model that is sure of the next token
    found = AnswerTokens.of(logits, labels)
    assert found.log_probs.shape == (1, 3)
    assert found.mask.all()
    assert_close(found.log_probs, torch.zeros(1, 3))


def test_a_label_at_the_first_place_is_never_trained():
    labels = torch.tensor([[2, -100, 1]])
    assert AnswerTokens.of(torch.zeros(1, 3, 5), labels).mask.tolist() == [[False, True]]


def test_half_precision_logits_become_float32():
    found = AnswerTokens.of(torch.zeros(1, 3, 4, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.long))
    assert found.log_probs.dtype == torch.float32
    assert_close(found.log_probs, torch.full((1, 2), -torch.tensor(4.0).log().item()))


def test_places_are_counted_per_turn_or_per_row():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1]]).bool()
    turns = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2]])
    found = AnswerTokens(torch.zeros(2, 7), mask, turns=turns)
    assert found.places().tolist() == [[0, 1, 2, 0, 1, 2, 0], [1, 0, 2, 1, 2, 0, 1]]
    assert found.places(per_turn=False).tolist() == [[0, 1, 2, 0, 3, 4, 0], [1, 0, 2, 3, 4, 0, 5]]


def test_the_mean_is_over_trained_tokens_alone():
    values, mask = torch.tensor([[1.0, 2.0], [4.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    assert token_mean(values, mask).item() == pytest.approx(7 / 3)


def test_divergence_is_the_sum_over_the_vocabulary():
    logits, reference, _ = rows(1)
    found = token_kl(logits.log_softmax(2), reference.log_softmax(2))
    p, q = logits.softmax(2), reference.softmax(2)
    assert_close(found, (p * (p / q).log()).sum(2))
    assert (found > 0).all()
    assert_close(token_kl(p.log(), p.log()), torch.zeros(3, 6, dtype=torch.float64))


def test_a_divergence_is_never_negative_and_far_words_break_no_gradient():
    near = torch.randn(50, 20, 30)
    assert (token_kl(near.log_softmax(2), (near + 1e-5 * torch.randn(50, 20, 30)).log_softmax(2)) >= 0).all()
    far = torch.tensor([[[0.0, -200.0], [0.0, -200.0]]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    token_kl(far, torch.zeros(1, 2, 2), mask).sum().backward()
    assert far.grad.isfinite().all()
    assert (far.grad[0, 1] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": torch.zeros(2, 2)}, r"AnswerTokens\.reference must have shape \(2, 3\), got \(2, 2\)"),
        ({"words": torch.zeros(2, 2, 4)}, r"AnswerTokens\.words must have shape \[2, 3, word\], got \(2, 2, 4\)"),
        (
            {"words": torch.zeros(2, 3, 4), "reference_words": torch.zeros(2, 3, 5)},
            r"must have the model's vocabulary of 4 words, got 5\. The reference must share the model's tokenizer",
        ),
        ({"log_probs": torch.zeros(2, 3, dtype=torch.bfloat16)}, "must be float32 or float64, got torch.bfloat16"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "must train at least one token, got none"),
        ({"safe": torch.full((2, 3), 1.1)}, r"AnswerTokens\.safe must be in \[0, 1\]"),
        ({"safe": torch.full((2, 3), torch.nan)}, r"AnswerTokens\.safe must be in \[0, 1\]"),
        ({"polarity": torch.tensor([1, 0])}, r"AnswerTokens\.polarity must be \+1 or -1 for each of 2 rows, got \[1, 0\]"),
    ],
)
def test_bad_tokens_are_refused(changes, message, as_in_use):
    given = {"log_probs": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), **changes}
    with pytest.raises(ValueError, match=message):
        AnswerTokens(**given)


TOKEN_OBJECTIVES = [name for name, kind in PRESERVING.items() if issubclass(kind, TokenObjective)]


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_every_token_objective_keeps_the_contract(name):
    logits, reference, labels = rows(2)
    logits.requires_grad_()
    more = {"safe": torch.rand(3, 5, dtype=torch.float64), "polarity": torch.tensor([1, -1, 1])}
    objective = PRESERVING[name]()
    tokens = tokens_of(logits, reference, labels, **more)
    values = objective(tokens)
    assert values.shape == tokens.mask.shape
    assert (values[~tokens.mask] == 0).all()
    loss = objective.loss(tokens)
    loss.backward()
    untrained = torch.cat([~tokens.mask, torch.ones(3, 1, dtype=torch.bool)], dim=1)
    assert (logits.grad[untrained] == 0).all()
    assert logits.grad[~untrained].any()
    shift = torch.randn(3, 6, 1, dtype=torch.float64)  # a constant on all logits of a place changes no probability
    assert_close(objective.loss(tokens_of(logits + shift, reference - shift, labels, **more)), loss)


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_what_is_missing_is_named_with_its_remedy(name):
    objective = PRESERVING[name]()
    bare = AnswerTokens(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    for need in objective.needs:
        with pytest.raises(ValueError, match=rf"{type(objective).__name__} must get AnswerTokens\.\w+, got None\. [A-Z]"):
            objective.loss(bare)
        assert hasattr(bare, need)
