"""Messages of a chat become token ids, the mask of supervised tokens, and the ids that end an answer: here, and nowhere else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from valign.checks import UserError
from valign.models.language.chat import Message

ROLES = ("system", "user", "assistant")
PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as a model reads it."""

    ids: list[int]
    supervised: list[bool]  # per id: whether an assistant's turn (its text and its end mark) holds it
    turns: list[tuple[int, int]]  # first and last + 1 supervised position of each assistant's turn


class ChatRenderer:
    """Renders chats by the tokenizer's own chat template.

    What is written in a message never becomes a control token: markers in it ("<|end|>") are broken up by a space.

    Args:
        tokenizer: A fast transformers tokenizer with a chat template.
        generation_config: Of the model, whose end ids count too; None where there is no model.
        name: What messages call the model.
    Raises: UserError without a chat template, or where it cannot tell where an assistant's turn begins and ends.
    """

    def __init__(self, tokenizer: Any, generation_config: Any = None, *, name: str = "The tokenizer") -> None:
        if not tokenizer.chat_template:
            raise UserError(f"{name} has no chat template, so it is not a chat model. Choose an instruction-tuned model.")
        self.tokenizer, self.name = tokenizer, name
        known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._markers = sorted(marker for marker in known if len(marker) > 1 and len(marker.split()) == 1)
        self.stop_ids = self._stops(generation_config)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat that the assistant is to go on with, the start of its turn included.

        Raises: UserError for messages that are not a chat, or that the template refuses.
        """
        return self._ids(messages, answer=True)

    def chat(self, messages: Sequence[Message]) -> RenderedChat:
        """Ids of a whole chat, every assistant's turn supervised: exactly its text and its end mark.

        Each turn is prefixed exactly as `prompt` prefixes it, which is checked.
        Raises: UserError for messages that are not a chat, without an assistant's turn, or whose template renders a turn otherwise
            in training than in use.
        """
        ids = self._ids(messages, answer=False)
        turns = [self._turn(ids, messages, place) for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError(f"A chat to learn from must have an assistant's turn, got {len(messages)} messages without one.")
        supervised = [False] * len(ids)
        for first, last in turns:
            supervised[first:last] = [True] * (last - first)
        return RenderedChat(ids, supervised, turns)

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without its end mark."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()

    def without_markers(self, text: str) -> str:
        """The text with every marker of the template ("<|im_end|>") broken up, so that no message can pretend to be another."""
        for marker in self._markers:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text

    def _ids(self, messages: Sequence[Message], *, answer: bool) -> list[int]:
        _check(messages, answer=answer)
        plain = [dict(message) | {"content": self.without_markers(message["content"])} for message in messages]
        try:
            found = self.tokenizer.apply_chat_template(plain, add_generation_prompt=answer, tokenize=True, return_dict=True)
        except Exception as error:  # a template raises whatever it likes
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{self.name}'s chat template must take the roles {roles}, got: {str(error).splitlines()[0]}. "
                "Where it takes no system turn, put that text into the first user turn yourself."
            ) from error
        return list(found["input_ids"])

    def _turn(self, ids: list[int], messages: Sequence[Message], place: int) -> tuple[int, int]:
        """First and last + 1 position of the assistant's turn ``messages[place]``."""
        before = self._ids(messages[:place], answer=True)
        through = ids if place + 1 == len(messages) else self._ids(messages[: place + 1], answer=False)
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise UserError(
                f"{self.name}'s chat template must render an assistant's turn in training as in use, got other tokens before turn "
                f"{place + 1}. Use a template that keeps earlier turns as they are."
            )
        ends = [spot for spot in range(len(before), len(through)) if through[spot] in self.stop_ids]
        last = ends[0] + 1 if ends else len(through)
        if last <= len(before):
            raise UserError(
                f"{self.name}'s chat template must end an assistant's turn with an end mark, got none in turn {place + 1}."
            )
        return len(before), last

    def _stops(self, generation_config: Any) -> frozenset[int]:
        """End ids of the tokenizer, of the generation config, and of the template's own assistant turn."""
        listed = getattr(generation_config, "eos_token_id", None)
        stops = set(listed if isinstance(listed, Iterable) else [listed]) | {self.tokenizer.eos_token_id}
        before, whole = self._ids(PROBE[:1], answer=True), self._ids(PROBE, answer=False)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
        closing = next((token for token in whole[len(before) :] if token in special), None)
        if whole[: len(before)] != before:
            raise UserError(
                f"{self.name}'s chat template must open an assistant's turn as its generation prompt does, got other tokens. "
                "Use a template whose add_generation_prompt writes what stands before an answer."
            )
        found = {int(token) for token in (*stops, closing) if token is not None}
        if not found:
            raise UserError(f"{self.name} must name a token that ends an answer, got none. Set the tokenizer's eos_token.")
        return frozenset(found)


def _check(messages: Sequence[Message], *, answer: bool) -> None:
    if not messages:
        raise UserError("A chat must have at least one message, got none.")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(f"A message must have a role of {', '.join(ROLES)} and a text as content, got {message!r}.")
    if answer and messages[-1]["role"] == "assistant":
        raise UserError("A chat to be answered must end with a user's turn, got an assistant's.")
