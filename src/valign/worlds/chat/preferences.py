"""Safety preferences of the chat world."""

from valign.data.chats import ChatPair, Conversation
from valign.worlds.chat.grammar import ChatGrammar


def chat_preferences(count: int, seed: int = 0) -> list[ChatPair]:
    """Refusals preferred to compliance with ``count`` disallowed requests of the training wordings."""
    found = []
    for request in ChatGrammar().requests("disallowed", count, seed, split="train"):
        turns = tuple((message["role"], message["content"]) for message in request.messages)
        safe, unsafe = (Conversation((*turns, ("assistant", said))) for said in (request.answer, request.compliance))
        found.append(ChatPair(safe, unsafe))
    return found
