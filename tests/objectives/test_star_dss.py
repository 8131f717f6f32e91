import pytest
import torch
from token_rows import rows, tokens_of
from torch.testing import assert_close

from valign.objectives import PRESERVING, AnswerTokens, StarDSS, StaticShaping, token_mean
from valign.objectives.preserving.star_dss import chunk_texts, kl_estimate, star_score, star_weights


def shaped(safe, **options):
    logits, reference, labels = rows(4)
    logits.requires_grad_()
    given = torch.full((3, 5), safe, dtype=torch.float64) if isinstance(safe, float) else safe
    tokens = tokens_of(logits, reference, labels, safe=given)
    return StarDSS(**options), tokens, logits


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_the_table_names_it():
    assert PRESERVING["star-dss"] is StarDSS
    assert PRESERVING["static-shaping"] is StaticShaping


def test_safe_answers_are_learned_plainly():
    objective, tokens, logits = shaped(1.0)
    plain = token_mean(-tokens.log_probs, tokens.mask)
    assert torch.equal(objective.loss(tokens), plain)
    assert torch.equal(gradient(objective.loss(tokens), logits), gradient(plain, logits))


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_unsafe_answers_have_no_pull_at_the_reference(estimator):
    logits, _, labels = rows(5)
    logits.requires_grad_()
    tokens = tokens_of(logits, logits, labels, safe=torch.zeros(3, 5, dtype=torch.float64))
    loss = StarDSS(estimator=estimator).loss(tokens)
    assert loss.item() == 0
    assert gradient(loss, logits).abs().max() < 1e-15


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_it_is_affine_in_each_score_and_the_sum_of_its_parts(estimator):
    objective, tokens, _ = shaped(torch.rand(3, 5, dtype=torch.float64), estimator=estimator, kl_scale=0.7)
    learned, anchored = objective.parts(tokens)
    assert_close(learned + anchored, objective(tokens))
    ends = [shaped(value, estimator=estimator, kl_scale=0.7)[0](shaped(value)[1]) for value in (0.0, 1.0)]
    assert_close(objective(tokens), (1 - tokens.safe) * ends[0] + tokens.safe * ends[1])
    none, _, _ = shaped(0.5, estimator=estimator, kl_scale=0.0)
    assert_close(none(tokens), torch.where(tokens.mask, tokens.safe * -tokens.log_probs, 0.0))


def test_the_formula_token_by_token():
    # 0.25 * 2.0 + 0.75 * 0.5 * d^2 / 2 with d = -2.0 + 1.5 = -0.5  ->  0.5 + 0.375 * 0.125 = 0.546875
    tokens = AnswerTokens(
        torch.tensor([[-2.0, -9.0]]),
        torch.tensor([[True, False]]),
        reference=torch.tensor([[-1.5, 0.0]]),
        safe=torch.tensor([[0.25, 0.0]]),
    )
    assert StarDSS()(tokens).tolist() == [[0.546875, 0.0]]
    # k3: exp(0.5) - 1 - 0.5 = 0.148721
    assert StarDSS(estimator="k3", kl_scale=1.0)(tokens)[0, 0].item() == pytest.approx(0.5 + 0.75 * 0.1487212707)
    assert StarDSS(estimator="k1", kl_scale=1.0)(tokens)[0, 0].item() == pytest.approx(0.5 + 0.75 * -0.5)


def test_k2_and_k3_agree_to_second_order_and_are_never_negative():
    gap = torch.linspace(-3, 3, 61, dtype=torch.float64)
    zero = torch.zeros(1, 61, dtype=torch.float64)
    second, third = (kl_estimate(gap[None], zero, name) for name in ("k2", "k3"))
    assert (second >= 0).all()
    assert (third >= 0).all()
    small = gap[None] * 1e-3
    assert_close(kl_estimate(small, zero, "k2"), kl_estimate(small, zero, "k3"), rtol=0, atol=6e-9)  # d^3 / 6 is left


def test_weights_are_the_score_of_each_tokens_own_chunk():
    # prompt of 3 tokens; chunks end at 5 and 7; 8 tokens in the row: the eighth has the last score
    with pytest.warns(UserWarning, match="1 tokens behind the last chunk have its score"):
        found = star_weights(torch.tensor([0.9, 0.2]), torch.tensor([5, 7]), length=8)
    assert_close(found, torch.tensor([0.9] * 5 + [0.2] * 3))
    padded = star_weights(torch.tensor([0.9, 0.2, 0.5]), torch.tensor([5, 8, -1]), length=8)
    assert_close(padded, torch.tensor([0.9] * 5 + [0.2] * 3))


def test_a_chunks_score_meets_the_loss_of_its_own_token():
    # two chunks: tokens 1-2 and 3-4 of a row of 5; the loss of token t stands at place t - 1
    safe = star_weights(torch.tensor([1.0, 0.0]), torch.tensor([3, 5]), length=5)[1:][None]
    labels = torch.tensor([[-100, 1, 1, 1, 1]])
    tokens = AnswerTokens.of(torch.zeros(1, 5, 4), labels, reference=torch.zeros(1, 4), safe=safe)
    learned, anchored = StarDSS().parts(tokens)
    assert (learned[0] > 0).tolist() == [True, True, False, False]
    assert (anchored[0] > 0).tolist() == [False, False, True, True]


def test_chunks_grow_by_words_of_the_text_itself():
    found = chunk_texts("one two\nthree  four five six. ", 2)
    assert [text for text, _ in found] == ["one two", "one two\nthree  four", "one two\nthree  four five six. "]
    assert [cut for _, cut in found] == [7, 19, 30]
    assert chunk_texts("one", 5) == [("one", 3)]
    assert len(chunk_texts("a b c d e f", 5)) == 2


def test_swapped_logits_swap_the_score():
    safe, unsafe = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.5])
    assert_close(star_score(safe, unsafe), 1 - star_score(unsafe, safe))
    assert_close(star_score(safe + 7, unsafe + 7), star_score(safe, unsafe))


def test_static_shaping_is_fine_tuning_on_the_kept_rows_times_their_share():
    logits, reference, labels = rows(6)
    safe = torch.full((3, 5), 0.9, dtype=torch.float64)
    safe[1, -1] = 0.1  # the whole of row 1 is unsafe, though its start is not
    tokens = tokens_of(logits, reference, labels, safe=safe)
    kept = tokens_of(logits[[0, 2]], reference[[0, 2]], labels[[0, 2]])
    share = kept.mask.sum() / tokens.mask.sum()
    assert_close(StaticShaping().loss(tokens), token_mean(-kept.log_probs, kept.mask) * share)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: StarDSS(kl_scale=-1.0), r"StarDSS\.kl_scale must be in \[0, inf\), got -1"),
        (lambda: StarDSS(estimator="k4"), r"StarDSS\.estimator must be one of k1, k2, k3, full; got 'k4'"),
        (lambda: star_weights(torch.tensor([1.5]), torch.tensor([2]), length=2), r"scores must be in \[0, 1\]"),
        (lambda: star_weights(torch.tensor([torch.nan]), torch.tensor([2]), length=2), r"scores must be in \[0, 1\]"),
        (lambda: star_weights(torch.tensor([0.5, 0.5]), torch.tensor([3, 2]), length=3), r"must rise to at most 3, got \[3, 2\]"),
        (lambda: star_weights(torch.tensor([0.5]), torch.tensor([4]), length=3), r"must rise to at most 3, got \[4\]"),
        (lambda: star_weights(torch.tensor([0.5]), torch.tensor([2, 3]), length=3), r"got 1 scores and 2 boundaries"),
        (lambda: chunk_texts("words", 0), r"chunk_texts\.size must be in \[1, inf\), got 0"),
        (lambda: chunk_texts(" \n", 5), r"must hold a word, got a blank text"),
    ],
)
def test_bad_input_is_refused(work, message, as_in_use):
    with pytest.raises(ValueError, match=message):
        work()
