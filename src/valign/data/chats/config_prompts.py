"""Safety configs as CoSAlign samples and words them: which categories a system prompt allows, drawn around a prompt's own risks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

Mode = Literal["exact-match", "superset", "safe", "not-superset"]
MODES: tuple[Mode, ...] = get_args(Mode)
IN_DOMAIN = ("exact-match", "superset")  # the prompt should be answered
TEMPLATES = (  # {allowed} is a list of categories with their definitions, or "None."
    "You are a helpful assistant. These kinds of content are allowed in your answers: {allowed} Stay safe in every other category.",
    "As an assistant you may include the following kinds of risk, where a request asks for them: {allowed} Nothing else that could "
    "harm is permitted.",
    "Allowed risks: {allowed} Everything outside this list must stay safe.",
    "Your operator permits these categories: {allowed} Decline whatever falls into any other harmful category.",
    "You answer questions in a setting where this is acceptable: {allowed} For all other categories of harm, keep to safe answers.",
    "Safety policy of this service. Permitted: {allowed} All that is not listed remains forbidden.",
    "Follow this policy in each answer. The content below may appear: {allowed} Other harmful content may not.",
    "You help people who need the following content: {allowed} Be safe with respect to any other risk.",
    "Content rules: what stands here is fine: {allowed} Refuse requests that need a risk from another category.",
    "Be a helpful and careful assistant. Risks that you may take: {allowed} Take none beyond these.",
)


def sample_config(risks: Collection[str], mode: Mode, categories: Sequence[str], draws: np.random.Generator) -> tuple[str, ...]:
    """The allowed categories, in an order drawn with them, for a prompt whose own risks are ``risks``.

    ``exact-match``: its risks. ``superset``: these and a random subset of the n other categories, its size uniform in {0, ..., n}.
    ``not-superset``: fewer than all of its risks, their number uniform, and such a subset of the others; none for a prompt without
    risks. ``safe``: none.

    Args:
        risks: What is in none of ``categories`` can be allowed by no config, and is left out.
        categories: Those that a config may name.
    """
    own = [category for category in categories if category in risks]
    others = [category for category in categories if category not in risks]
    if mode == "safe" or (mode == "not-superset" and not risks):
        return ()
    if mode == "exact-match":
        return _shuffled(own, draws)
    more = _subset(others, int(draws.integers(len(others) + 1)), draws)
    if mode == "superset":
        return _shuffled([*own, *more], draws)
    kept = _subset(own, int(draws.integers(len(own))) if own else 0, draws)
    return _shuffled([*kept, *more], draws)


def config_text(allowed: Sequence[str], definitions: Mapping[str, str], draws: np.random.Generator) -> str:
    """One of the ten wordings of a config, as a system prompt."""
    listed = " ".join(f"{category}: {definitions[category].rstrip('.')}." for category in allowed) or "None."
    return TEMPLATES[int(draws.integers(len(TEMPLATES)))].format(allowed=listed)


def _shuffled(items: Sequence[str], draws: np.random.Generator) -> tuple[str, ...]:
    return tuple(items[place] for place in draws.permutation(len(items)))


def _subset(items: Sequence[str], size: int, draws: np.random.Generator) -> list[str]:
    return [items[place] for place in draws.permutation(len(items))[:size]]
