"""Synthetic worlds with exact oracles: data and weights, never a code path."""

from valign.checks import check_choice
from valign.detectors.oracle import OracleDetector
from valign.worlds.base import ChatWorld, ModelMeasurement, World, WorldBudget, WorldGrammar
from valign.worlds.chat.world import CHAT
from valign.worlds.shapes.world import SHAPES

WORLDS = {world.name: world for world in (SHAPES,)}  # of images
CHAT_WORLDS = {world.name: world for world in (CHAT,)}

__all__ = [
    "CHAT_WORLDS",
    "WORLDS",
    "ChatWorld",
    "ModelMeasurement",
    "World",
    "WorldBudget",
    "WorldGrammar",
    "any_world",
    "find_oracle",
    "world",
]


def world(name: str) -> World:
    """The world of images of this name. Raises: ValueError that lists the names."""
    check_choice("world", name, WORLDS)
    return WORLDS[name]


def any_world(name: str) -> World | ChatWorld:
    """The world of this name, of images or of chats. Raises: ValueError that lists the names."""
    worlds: dict[str, World | ChatWorld] = {**WORLDS, **CHAT_WORLDS}
    check_choice("world", name, worlds)
    return worlds[name]


def find_oracle(name: str) -> OracleDetector | None:
    """The oracle of the world of this name, and of the first world for ``oracle``; None for the name of something else."""
    found = next(iter(WORLDS.values())) if name == "oracle" else WORLDS.get(name)
    return found.oracle() if found else None
