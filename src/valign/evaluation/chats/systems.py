"""A chat model as something to ask: a local folder, one with an adapter, or an endpoint. Loaded only where answers are missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import hash_value, read_json
from valign.models.files.adapter_base import chat_folder_fingerprint
from valign.models.language.chat import ChatModel, ChatRefused, Message, OpenAIChat
from valign.models.language.generation import answer_chats
from valign.models.language.loading import LoadedChat, check_adapter, load_chat

SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # of models of one base


@dataclass(frozen=True)
class ChatReply:
    """What a model said; ``text`` is None where it gave no answer. ``finish`` is "length" where it was cut off."""

    text: str | None
    finish: str = "stop"


Answer = Callable[[Sequence[Sequence[Message]]], list[ChatReply]]


@dataclass(frozen=True)
class ChatSystem:
    """``load`` gives the function that answers; ``fingerprint`` changes whenever the answers would.

    ``settings`` are those of the answers, such as their length.
    """

    name: str
    fingerprint: str
    load: Callable[[], Answer]
    settings: dict[str, Any]
    folder: Path | None = None


def local_system(
    name: str,
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    max_tokens: int = 128,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    anyway: bool = False,
) -> ChatSystem:
    """A folder of a transformers chat model, with a peft adapter or without; greedy unless ``temperature`` is above 0.

    Args: anyway: Also take an adapter whose record names another model; refused here otherwise, before anything is asked.
    """
    if adapter is not None:
        check_adapter(Path(adapter).expanduser(), Path(folder).expanduser(), anyway=anyway)

    def load() -> Answer:
        loaded = load_chat(folder, adapter=adapter, device=device, dtype=dtype, anyway=anyway)
        return answering(loaded, max_tokens=max_tokens, batch_size=batch_size, temperature=temperature, seed=seed)

    settings = {"max_tokens": max_tokens, "batch_size": batch_size, "temperature": temperature, "seed": seed, "dtype": dtype}
    parts = [chat_folder_fingerprint(folder), *([chat_folder_fingerprint(adapter)] if adapter else [])]
    return ChatSystem(name, hash_value(parts), load, settings, Path(folder))


def answering(
    loaded: LoadedChat, *, max_tokens: int = 128, batch_size: int = 64, temperature: float = 0.0, seed: int = 0
) -> Answer:
    """A loaded model as a function of conversations."""

    def answer(chats: Sequence[Sequence[Message]]) -> list[ChatReply]:
        made = answer_chats(loaded, chats, max_tokens=max_tokens, batch_size=batch_size, temperature=temperature, seed=seed)
        return [ChatReply(one.text, one.finish) for one in made]

    return answer


def endpoint_system(name: str, chat: OpenAIChat) -> ChatSystem:
    """An OpenAI-compatible endpoint. A request that it refuses has no answer; one that is down stops the run."""
    settings = {"temperature": chat.temperature, "max_tokens": chat.max_tokens, "seed": chat.seed}
    return ChatSystem(name, hash_value([chat.base_url, chat.model]), lambda: asked_one_by_one(chat), settings)


def asked_one_by_one(chat: ChatModel) -> Answer:
    """Any chat model as a function of conversations."""

    def one(messages: Sequence[Message]) -> ChatReply:
        try:
            return ChatReply(chat.complete([dict(message) for message in messages]))
        except ChatRefused:
            return ChatReply(None)

    return lambda chats: [one(messages) for messages in chats]


def check_same_base(before: Path, after: Path) -> None:
    """Refuse two folders that are not one model before and after a change: answers to other tokens cannot be paired.

    Raises: UserError that names what differs.
    """
    first, second = (read_json(folder / "config.json") for folder in (before, after))
    differing = [name for name in SAME if first.get(name) != second.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{before} and {after} must be one model before and after a change, got {name} {first.get(name)} and "
            f"{second.get(name)}. Name models of one base."
        )
    templates = [_template(folder) for folder in (before, after)]
    if templates[0] != templates[1]:
        raise UserError(
            f"{before} and {after} must read chats in the same way, got different chat templates. Copy the tokenizer and the "
            "template of one to the other."
        )


def _template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return read_json(config).get("chat_template") if config.exists() else None
