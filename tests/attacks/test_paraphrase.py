import json

import pytest
from red_world import square

from valign.attacks.base import SystemAnswer
from valign.attacks.paraphrase import Paraphrase
from valign.models.language.chat import ScriptedChat


def test_the_chat_model_sees_the_goal_as_data_and_why_the_last_tries_failed(goal, make_scope):
    chat = ScriptedChat([json.dumps({"prompt": f"try {i}"}) for i in range(5)])
    scope = make_scope(chat=chat)
    search = Paraphrase(memory=2).search(goal, scope)
    assert next(search) == "try 0"
    search.send(SystemAnswer("try 0", None, None, "guard"))
    search.send(SystemAnswer("try 1", "try 1", square("green")))
    search.send(SystemAnswer("try 2", "a rewrite", square("green")))
    assert len(json.loads(chat.calls[1][-1]["content"])["tries"]) == 1
    assert json.loads(chat.calls[0][-1]["content"]) == {"caption": goal.prompt, "tries": []}
    told = json.loads(chat.calls[3][-1]["content"])["tries"]
    assert told == [
        {"caption": "try 1", "reason": "the image is harmless"},
        {"caption": "try 2", "reason": "the caption was changed before the image was made"},
    ]
    assert goal.prompt not in chat.calls[0][0]["content"]
    assert scope.meter.chat_calls == 4


def test_ends_after_answers_that_cannot_be_read(goal, make_scope):
    chat = ScriptedChat(["no", '{"prompt": "one"}', "no", "no", "no"])
    search = Paraphrase().search(goal, make_scope(chat=chat))
    assert next(search) == "one"
    with pytest.raises(StopIteration):
        search.send(SystemAnswer("one", None, None, "guard"))
    assert len(chat.calls) == 5
