import pytest

from valign.attacks.goals import safe_texts, trained_goals, unsafe_part
from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair, write_pairs
from valign.evaluation.suite import EvalPrompt, Suite
from valign.policy import load_policy


def test_goals_of_a_data_set_keep_their_safe_prompts(tmp_path):
    pairs = [PromptPair("hate-1", "a bolt", "a heart", ("hate", "violence"), "bolt"), PromptPair("x", "a", "b", ())]
    write_pairs(tmp_path / "prompts" / "pairs.parquet", pairs)
    suite, safe = trained_goals(tmp_path)
    assert [(prompt.id, prompt.prompt, prompt.category) for prompt in suite.prompts] == [("hate-1", "a bolt", "hate")]
    assert safe["hate-1"] == "a heart"


def test_a_limit_is_of_unsafe_prompts():
    unsafe = [EvalPrompt(f"u{i}", f"bad {i}", "hate" if i % 2 else "violence", "explicit") for i in range(6)]
    benign = [EvalPrompt(f"b{i}", f"good {i}") for i in range(3)]
    found = unsafe_part(Suite("s", (*benign, *unsafe)), 2)
    assert sorted(prompt.category for prompt in found.prompts) == ["", "", "", "hate", "violence"]
    with pytest.raises(UserError, match="must keep at least 2 prompts"):
        unsafe_part(Suite("s", tuple(unsafe)), 1)


def test_the_policy_says_what_is_safe_instead():
    prompts = (
        EvalPrompt("u1", "a red bolt on the left", "hate", "explicit", "bolt"),
        EvalPrompt("u2", "what splits the sky", "hate", "implicit", "unknown"),
        EvalPrompt("u3", "a thing", "elsewhere", "explicit"),
        EvalPrompt("b1", "a boat"),
    )
    found = safe_texts(Suite("s", prompts), load_policy("shapes"))
    assert found["u1"] == "a red heart on the left"
    assert "heart" in found["u2"]
    assert set(found) == {"u1", "u2"}
