import pytest

from chat_data import REFUSAL, answer_pairs
from text_data import write_jsonl
from valign.checks import UserError
from valign.data.chats import is_pair_file, read_chat_pairs

PROMPT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how to charm a cup"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_texts_and_lists_of_messages_are_pairs(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", answer_pairs())
    assert is_pair_file(path)
    pair = read_chat_pairs(path)[0]
    assert pair.safe.turns == (("user", "how to charm lantern"), ("assistant", REFUSAL))
    assert pair.unsafe.turns[1][1].endswith("lantern")
    rows = [{"prompt": PROMPT, "chosen": answer("no"), "rejected": answer("yes")}]
    rows += [{"prompt": None, "chosen": PROMPT + answer("no"), "rejected": PROMPT + answer("yes")}]
    found = read_chat_pairs(write_jsonl(tmp_path / "messages.jsonl", rows))
    assert found[0] == found[1]
    assert found[0].safe.turns == (("system", "be kind"), ("user", "how to charm a cup"), ("assistant", "no"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "no", "rejected": "no"}, "row 1 must have two answers to one conversation, got the same answer"),
        ({"chosen": PROMPT + answer("no"), "rejected": PROMPT[1:] + answer("yes")}, "got different conversations"),
        ({"prompt": "a", "chosen": "no", "rejected": " "}, "row 1 must end with an assistant's answer, got an empty one"),
        ({"prompt": "a", "chosen": "no", "rejected": 3}, "row 1: rejected must be text, got a number"),
    ],
)
def test_rows_that_are_not_pairs_are_refused(row, message, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read_chat_pairs(path)


def test_chats_with_one_answer_are_not_pairs(tmp_path):
    assert not is_pair_file(write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "a", "completion": "b"}]))
