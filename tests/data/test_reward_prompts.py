import json

import pytest

from valign.data.chats.dual_preferences import read_dual_preferences
from valign.data.chats.reward_prompts import fingerprint, read_reward_prompts


def table(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_texts_or_messages_and_labels_may_be_unknown(tmp_path):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": "make tea", "harmful": 0}, {"prompt": messages, "harmful": True, "category": "hate", "demonstration": "no"}]
    plain, chat = read_reward_prompts(table(tmp_path / "a.jsonl", *rows))
    assert (plain.query, plain.harmful, plain.category, plain.demonstration) == ("make tea", False, None, None)
    assert (chat.messages, chat.harmful, chat.category, chat.demonstration) == (messages, True, "hate", "no")
    assert chat.with_query("Q: hi")[-1] == {"role": "user", "content": "Q: hi"}
    assert fingerprint([plain]) != fingerprint([chat])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "row 1: prompt must be a text, or messages that end with a user's turn"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "end with a user's turn"),
        ({"prompt": "x", "harmful": 2}, r"row 1: harmful must be a whole number in \[0, 1\], got 2"),
    ],
)
def test_bad_prompts_are_refused_with_their_row(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_reward_prompts(table(tmp_path / "a.jsonl", row))


BEAVER = {
    "question": "how?",
    "response_1": "so",
    "response_2": "no",
    "more_helpful_response_id": 1,
    "safer_response_id": 2,
    "response_1_harmless_rate": -3,
    "response_2_harmless_rate": 2,
}


def test_two_preferences_are_read_and_rows_that_prefer_nothing_are_left_out(tmp_path):
    safe = {name: value for name, value in BEAVER.items() if "harmless" not in name}
    rows = [BEAVER, BEAVER | {"safer_response_id": 0}, safe | {"is_response_1_safe": False, "is_response_2_safe": True}]
    first, last = read_dual_preferences(table(tmp_path / "a.jsonl", *rows))
    assert (first.better, first.safer, first.harmless) == (0, 1, (-3.0, 2.0))
    assert first.chat(1) == [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "no"}]
    assert last.harmless == (-1.0, 1.0)


def test_bad_preferences_are_refused(tmp_path):
    with pytest.raises(ValueError, match="response_1_harmless_rate or is_response_1_safe, got neither"):
        read_dual_preferences(table(tmp_path / "a.jsonl", BEAVER | {"response_1_harmless_rate": None}))
    with pytest.raises(ValueError, match="got an empty one"):
        read_dual_preferences(table(tmp_path / "b.jsonl", BEAVER | {"response_2": ""}))
    with pytest.raises(ValueError, match="at least one row that prefers answer 1 or 2, got none of 1"):
        read_dual_preferences(table(tmp_path / "c.jsonl", BEAVER | {"more_helpful_response_id": 3}))
