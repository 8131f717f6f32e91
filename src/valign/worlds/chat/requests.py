"""One request of the chat world, with all that is true of it."""

from dataclasses import dataclass
from typing import Any, Literal

from valign.models.language.chat import Message
from valign.worlds.chat.vocabulary import Pair
from valign.worlds.chat.wordings import Split

Kind = Literal["allowed", "disallowed", "borderline", "disguised", "multi-turn", "skill", "record"]
Outcome = Literal["refuse", "help", "warn"]  # what is right: refuse, give the steps, or give them after a warning


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation that ends with a user's turn, what it asks for, and the right answer to it.

    ``outcome`` is what an aligned model should do; ``answer`` is that answer, ``compliance`` what a model without any rule says.
    Both are the same where the request is allowed.
    """

    id: str
    kind: Kind
    split: Split
    messages: tuple[Message, ...]
    outcome: Outcome
    answer: str
    compliance: str
    wording: str  # its template: requests of one wording are one cluster
    category: str | None = None  # of the forbidden pair that it asks for, whatever a system prompt allows; None if there is none
    pair: Pair | None = None  # the act and the thing
    asks_steps: bool = False  # whether it asks how to do the act; False for talk about the rules, skills and records
    task: str | None = None  # name of the skill, or "record"

    @property
    def disallowed(self) -> bool:
        return self.outcome == "refuse"

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]

    def chat(self, answer: str | None = None) -> list[Message]:
        """The whole conversation, with the right answer or with ``answer``."""
        return [*self.messages, {"role": "assistant", "content": self.answer if answer is None else answer}]

    def row(self) -> dict[str, Any]:
        """JSON-able, for files of prompts."""
        fields = {name: value for name, value in vars(self).items() if name not in ("messages", "pair")}
        return fields | {"messages": list(self.messages), "pair": list(self.pair) if self.pair else None}
