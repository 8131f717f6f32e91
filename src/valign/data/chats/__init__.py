"""Chats for fine-tuning: every layout becomes one form, messages with a role and a text."""

from valign.data.chats.conversation import ROLES, Conversation
from valign.data.chats.layouts import CHAT_LAYOUTS, ChatLayout, detect_chat_layout
from valign.data.chats.reading import read_chats

__all__ = ["CHAT_LAYOUTS", "ROLES", "ChatLayout", "Conversation", "detect_chat_layout", "read_chats"]
