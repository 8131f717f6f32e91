import pytest
import torch

from valign.objectives import PRESERVING, SafetyRecovery

PROMPT, HARMFUL, REFUSAL = [1, 2, 3], [10, 11, 12, 13], [20, 21, 9]


def test_the_table_names_it():
    assert PRESERVING["safety-recovery"] is SafetyRecovery


def test_only_the_refusal_is_trained_and_it_follows_the_prefix_directly():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        row = SafetyRecovery().row(PROMPT, HARMFUL, REFUSAL, generator)
        assert row.ids == [*PROMPT, *HARMFUL[: row.prefix], *REFUSAL]
        assert [token for token, trained in zip(row.ids, row.trained) if trained] == REFUSAL
        seen.add(row.prefix)
    assert seen == {0, 1, 2, 3, 4}


def test_half_of_the_draws_have_no_prefix_and_the_others_are_uniform():
    generator = torch.Generator().manual_seed(1)
    drawn = [SafetyRecovery(max_prefix=4).prefix_length(50, generator) for _ in range(4000)]
    assert max(drawn) == 4
    assert abs(drawn.count(0) / 4000 - 0.5) < 0.03  # 4 standard errors
    assert all(abs(drawn.count(k) / 4000 - 0.125) < 0.021 for k in range(1, 5))


def test_the_mix_is_the_papers_sixteen_beside_sixty_four():
    assert SafetyRecovery().rows_beside(64) == 16
    assert SafetyRecovery().rows_beside(1) == 1


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: SafetyRecovery(alpha=0.0), r"SafetyRecovery\.alpha must be in \(0, 1\], got 0"),
        (lambda: SafetyRecovery(alpha=1.0), r"SafetyRecovery\.alpha must be in \(0, 1\), got 1\. Without ordinary rows"),
        (lambda: SafetyRecovery(max_prefix=0), r"SafetyRecovery\.max_prefix must be in \[1, inf\), got 0"),
        (
            lambda: SafetyRecovery(share=1.0).row(PROMPT, [], REFUSAL, torch.Generator()),
            "must have a harmful answer to start with, got an empty one",
        ),
        (lambda: SafetyRecovery().row(PROMPT, HARMFUL, [], torch.Generator()), r"refusal must be in \[1, inf\), got 0"),
    ],
)
def test_bad_input_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()
