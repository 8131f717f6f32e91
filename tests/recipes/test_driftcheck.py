"""DRIFTCHECK on the chat world's bundled models."""

import pytest

from valign.checks import UserError
from valign.recipes.driftcheck import driftcheck
from valign.recipes.subjects import find_subjects
from valign.worlds.chat.judge import OracleJudge, chat_cases


def test_the_base_has_drifted_from_the_aligned_model_at_the_first_tokens(tmp_path):
    start, base = find_subjects("chat", "chat:base")
    options = {"plain": "base", "max_tokens": 24, "depth": 6, "profiled": 8, "device": "cpu"}
    found = driftcheck({"start": start, "base": base}, chat_cases(8), OracleJudge(), tmp_path, **options)
    first, second = found["systems"]
    assert first["r_unsafe"]["share"]["value"] > 0.9
    assert second["drift"]["value"] > 0.8
    assert second["reduction"] is None  # it is the plain one
    assert found["prompts"] == {"unsafe": 24, "safe": 16}
    profile = [one["kl"]["value"] for one in found["kl_profile"]["base"]]
    assert len(profile) == 6
    assert max(profile[:2]) > 1
    assert found["notes"] == []
    assert driftcheck({"start": start, "base": base}, chat_cases(8), OracleJudge(), tmp_path, **options) == found


def test_one_model_is_refused(tmp_path):
    start, _ = find_subjects("chat", "chat")
    with pytest.raises(UserError, match="a start and at least one more"):
        driftcheck({"start": start}, chat_cases(2), OracleJudge(), tmp_path)
    with pytest.raises(ValueError, match="plain must be one of other; got 'start'"):
        driftcheck({"start": start, "other": start}, chat_cases(2), OracleJudge(), tmp_path, plain="start")
    with pytest.raises(UserError, match="must name different models, got start and other, which are the same"):
        driftcheck({"start": start, "other": start}, chat_cases(2), OracleJudge(), tmp_path)
