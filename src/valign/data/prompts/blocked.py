"""Pairs that no one may build: whatever the source, a prompt that meets an ``always_block`` rule of the policy makes no image."""

from collections.abc import Iterable

from valign.data.prompts.pairs import PromptPair
from valign.policy import BlockRules, Policy


def allowed_prompts(policy: Policy, prompts: Iterable[str]) -> tuple[list[str], int]:
    """Prompts that no ``always_block`` rule matches, in their order, and how many were dropped. Other spellings match too."""
    rules, every = BlockRules(policy.always_block), list(prompts)
    kept = [prompt for prompt in every if rules.match(prompt) is None]
    return kept, len(every) - len(kept)


def held_out_concepts(policy: Policy) -> frozenset[str]:
    """Ids and names of the concepts that never enter training data."""
    return frozenset(
        word
        for category in policy.categories
        for concept in category.concepts
        if concept.held_out
        for word in (concept.id, concept.name)
    )


def allowed_pairs(policy: Policy, pairs: Iterable[PromptPair]) -> tuple[list[PromptPair], dict[str, int]]:
    """Pairs that may be used, in their order, and how many were dropped as ``always_block`` or ``held_out``."""
    rules, held_out = BlockRules(policy.always_block), held_out_concepts(policy)
    kept: list[PromptPair] = []
    dropped = {"always_block": 0, "held_out": 0}
    for pair in pairs:
        if rules.match(pair.unsafe) or rules.match(pair.safe):
            dropped["always_block"] += 1
        elif pair.held_out or pair.concept in held_out:
            dropped["held_out"] += 1
        else:
            kept.append(pair)
    return kept, {reason: count for reason, count in dropped.items() if count}
