"""Synthetic worlds with exact oracles: data and weights, never a code path."""

from valign.checks import check_choice
from valign.worlds.base import ModelMeasurement, World, WorldBudget, WorldGrammar
from valign.worlds.shapes.world import SHAPES

WORLDS = {world.name: world for world in (SHAPES,)}

__all__ = ["WORLDS", "ModelMeasurement", "World", "WorldBudget", "WorldGrammar", "world"]


def world(name: str) -> World:
    """The world of this name. Raises: ValueError that lists the names."""
    check_choice("world", name, WORLDS)
    return WORLDS[name]
