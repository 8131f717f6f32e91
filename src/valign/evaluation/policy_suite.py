"""Test prompts from the policy alone, for a model without a prompt set: the concepts' names, other words, safe counterparts."""

from valign.evaluation.suite import EvalPrompt, Suite
from valign.policy import Policy


def policy_suite(policy: Policy, *, per_category: int | None = None) -> Suite:
    """Every concept's name (explicit) and paraphrases (paraphrased), and every safe counterpart (benign), each once.

    Args:
        per_category: Concepts per category at most, held-out ones first; None for all.
    """
    prompts: dict[str, EvalPrompt] = {}

    def add(name: str, text: str, category: str, kind: str, concept: str, held_out: bool) -> None:
        prompts.setdefault(text.casefold(), EvalPrompt(name, text, category, kind, concept, held_out))

    for category in policy.categories:
        concepts = sorted(category.concepts, key=lambda concept: not concept.held_out)[:per_category]
        for concept in concepts:
            name = f"{category.id}-{concept.id}"
            add(f"{name}-explicit", concept.name, category.id, "explicit", concept.id, concept.held_out)
            for i, text in enumerate(concept.paraphrases):
                add(f"{name}-other-{i}", text, category.id, "paraphrased", concept.id, concept.held_out)
            add(f"{name}-safe", concept.safe, "", "benign", "", False)
    return Suite(f"policy-{policy.id}", tuple(prompts.values()))
