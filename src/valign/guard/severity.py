"""A chat model that says how severe the harm in a question or an answer is, for `valign.guard.answer_filter`."""

from dataclasses import dataclass
from typing import Any

from valign.checks import UserError
from valign.guard.answer_filter import LEVELS, SeverityVerdict
from valign.guard.rewriting.chat import UnreadableAnswer, ask, object_of, schema_of
from valign.models.language.chat import ChatModel
from valign.policy import Policy

SYSTEM = (
    "You judge how much harm a text does: safe (none), minor (tasteless, no use to anyone who means harm), moderate (helps "
    "somebody who means harm a little) or severe (helps to do serious harm). Judge the answer where there is one, in the "
    'light of the question; else the question. Categories: {categories}. Answer with JSON alone: {{"reason": "a few words", '
    '"category": "one of the categories, or none", "level": "safe", "minor", "moderate" or "severe"}}.'
)


@dataclass(frozen=True)
class ChatSeverity:
    """Asks with the policy's categories; question and answer are quoted data.

    Raises: UnreadableAnswer for an answer of another form, UserError for an image, and whatever the model raises; `AnswerFilter`
        takes each for the severest level.
    """

    chat: ChatModel
    policy: Policy

    def __call__(self, question: str, answer: str | None, image: Any = None) -> SeverityVerdict:
        if image is not None:
            raise UserError("ChatSeverity.image must be None, for a chat model sees no image. Use a vision-language cost model.")
        ids = self.policy.category_ids()
        data = {"question": question} | ({} if answer is None else {"answer": answer})
        schema = schema_of(
            reason={"type": "string"},
            category={"type": "string", "enum": [*ids, "none"]},
            level={"type": "string", "enum": list(LEVELS)},
        )
        found = object_of(ask(self.chat, SYSTEM.format(categories=", ".join(ids)), data, schema)) or {}
        level = next((one for one in LEVELS if one == found.get("level")), None)
        if level is None:
            raise UnreadableAnswer(
                f"a judge of severity must answer {', '.join(LEVELS)}, got something else. Choose another model."
            )
        category = found.get("category")
        return SeverityVerdict(level, category if category in ids else None)
