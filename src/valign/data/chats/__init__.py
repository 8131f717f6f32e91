"""Chats for fine-tuning: every layout becomes one form, messages with a role and a text."""

from valign.data.chats.conversation import ROLES, Conversation
from valign.data.chats.layouts import CHAT_LAYOUTS, ChatLayout, detect_chat_layout
from valign.data.chats.pairs import ChatPair, is_pair_file, read_chat_pairs
from valign.data.chats.reading import read_chats

__all__ = [
    "CHAT_LAYOUTS",
    "ROLES",
    "ChatLayout",
    "ChatPair",
    "Conversation",
    "detect_chat_layout",
    "is_pair_file",
    "read_chat_pairs",
    "read_chats",
]
