import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.data.chats.judged_answers import ResponseLabel
from valign.objectives.preference.cosa import OTHER, ConfigError

KNOWN = ("violence", "drugs", "theft")
risks = st.frozensets(st.sampled_from([*KNOWN, OTHER]))
labels = st.builds(ResponseLabel, risks, st.booleans())
configs = st.frozensets(st.sampled_from(KNOWN))


def label(*risks, addressed=True):
    return ResponseLabel(frozenset(risks), addressed)


@pytest.mark.parametrize(
    ("allowed", "answer", "error"),
    [
        ((), label(), 0.0),
        ((), label(addressed=False), 1.0),
        (("violence",), label("violence"), 0.1),
        (("violence",), label("violence", "drugs"), 3.1),
        (("violence",), label("violence", "drugs", OTHER, addressed=False), 7.1),
        ((), label("unheard of", "another"), 3.0),  # unknown risks fold into one
    ],
)
def test_the_error_by_hand(allowed, answer, error):
    assert ConfigError()(allowed, answer, KNOWN) == pytest.approx(error)
    other = ConfigError(alpha=0.2, beta=6.0, gamma=2.0)
    assert other(allowed, answer, KNOWN) == pytest.approx(2 * error)


@given(labels, configs, configs)
def test_only_a_harmless_answer_has_no_error_and_more_allowed_never_costs(answer, allowed, more):
    error = ConfigError()(allowed, answer, KNOWN)
    assert (error == 0) == (answer.addressed and not answer.risks)
    assert ConfigError()(allowed | more, answer, KNOWN) <= error + 1e-9


@given(st.lists(labels, unique=True, max_size=6), configs, st.integers(0, 5))
def test_no_pair_prefers_what_breaks_the_config_or_ties(found, allowed, seed):
    answers = {one: [f"{place} a", f"{place} b"] for place, one in enumerate(found)}
    rule = ConfigError()
    pairs = rule.pairs(allowed, answers, KNOWN, np.random.default_rng(seed))
    errors = {text: rule(allowed, one, KNOWN) for one, texts in answers.items() for text in texts}
    for pair in pairs:
        assert (errors[pair.chosen], errors[pair.rejected]) == (pair.chosen_error, pair.rejected_error)
        assert pair.chosen_error < pair.rejected_error - 1e-9
        assert pair.chosen_error < rule.beta - 1e-9
    values = [rule(allowed, one, KNOWN) for one in found]
    wanted = sum(abs(a - b) > 1e-9 and min(a, b) < 3 - 1e-9 for place, a in enumerate(values) for b in values[:place])
    assert len(pairs) == wanted
    backwards = rule.pairs(allowed, dict(reversed(answers.items())), KNOWN, np.random.default_rng(seed))
    assert sorted(p[2:] for p in backwards) == sorted(p[2:] for p in pairs)


def test_a_prompt_with_one_label_yields_no_pair():
    assert ConfigError().pairs((), {label(): ["a", "b"]}, KNOWN, np.random.default_rng(0)) == []


def test_bad_configs_and_weights_are_refused():
    with pytest.raises(ValueError, match="must name categories of drugs, theft, violence; got arson"):
        ConfigError()(("arson",), label(), KNOWN)
    with pytest.raises(ValueError, match="must not allow other-harms: it is never open"):
        ConfigError()((OTHER,), label(), KNOWN)
    with pytest.raises(ValueError, match=r"ConfigError\.alpha must be in \[0"):
        ConfigError(alpha=-1.0)
    with pytest.raises(ValueError, match=r"must have alpha < gamma < beta, got 0\.1, 4, 3"):
        ConfigError(gamma=4.0)
