"""Answers of a chat model to a few held-out chats, before and after its training, beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from valign.data.tasks.base import TaskRow
from valign.files import read_json, write_json
from valign.models.heads.task_model import TaskModel
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.generation import answer_chats


@dataclass(frozen=True)
class AnswerPreviews:
    """Writes ``answers.json``: for each chat its messages, and the greedy answers ``before`` and ``after``."""

    model: ChatTaskModel | None
    rows: tuple[Any, ...]
    path: Path
    max_tokens: int = 64

    @classmethod
    def of(cls, model: TaskModel, rows: Sequence[TaskRow], count: int, out: Path) -> "AnswerPreviews":
        """Of the first ``count`` rows; of a model that does not chat, none."""
        chat = model if isinstance(model, ChatTaskModel) and count else None
        return cls(chat, tuple(rows[:count]), out / "answers.json")

    def write(self, when: str) -> None:
        """Answer all chats now. Answers from before the training are never asked for a second time."""
        known = read_json(self.path) if self.path.exists() else []
        if self.model is None or (when == "before" and known):
            return
        asked = [row.messages[:-1] for row in self.rows]
        was = self.model.training
        self.model.eval()
        loaded = replace(self.model.loaded, model=self.model.network)
        longest = max(len(loaded.renderer.prompt(messages)) for messages in asked)
        room = self.max_tokens if loaded.window is None else min(self.max_tokens, loaded.window - longest)
        answers = answer_chats(loaded, asked, max_tokens=max(room, 1))
        self.model.train(was)
        found = known or [{"messages": messages} for messages in asked]
        write_json(self.path, [{**entry, when: answer.text} for entry, answer in zip(found, answers)])
