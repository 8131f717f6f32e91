import torch

from chat_data import tiny_chat
from valign.data.chats import Conversation
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.training.tasks.preserving.star_scores import score_chats


def test_every_answers_token_has_the_score_of_its_own_words(tmp_path):
    model = ChatTaskModel(load_chat(tiny_chat(tmp_path / "model"), device="cpu", dtype="float32"), max_tokens=64)
    row = Conversation(
        (("user", "say cup"), ("assistant", "cup cup door"), ("user", "say door"), ("assistant", "take the old key then turn it"))
    )
    asked = []

    def guard(partials):
        asked.extend(partials)
        return torch.tensor([1 - len(text.split()) / 10 for _, text in partials])

    found = score_chats(model, [row], guard, words=3)[row.content]
    starts = ["take the old", "take the old key then turn", "take the old key then turn it"]
    assert [text for _, text in asked] == ["cup cup door", *starts]
    assert [messages[-1]["content"] for messages, _ in asked] == ["say cup", *["say door"] * 3]
    chat = model.renderer.chat(row.messages)
    by_turn = [[round(10 * (1 - float(found[place]))) for place in range(*turn)] for turn in chat.turns]
    assert by_turn == [[3, 3, 3, 3], [3, 3, 3, 6, 6, 6, 7, 7]]  # the end mark has the whole answer's score
