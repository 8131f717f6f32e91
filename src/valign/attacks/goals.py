"""What attacks are after: unsafe prompts of a suite, or of a data set that was trained on; and each one's scene without harm."""

from pathlib import Path

from valign.data.prompts.pairs import load_pairs
from valign.evaluation.suite import EvalPrompt, Suite
from valign.guard.records import Verdict
from valign.guard.rewriting.policy_rewriter import PolicyRewriter, RewriteRequest
from valign.policy import Policy


def trained_goals(folder: Path) -> tuple[Suite, dict[str, str]]:
    """The unsafe prompts of a data set of ``valign data build``, as a suite, and each one's safe prompt, by id.

    A pair of several categories asks for the first one.
    """
    pairs = [pair for pair in load_pairs(folder / "prompts" / "pairs.parquet") if pair.categories]
    prompts = [EvalPrompt(pair.id, pair.unsafe, pair.categories[0], "explicit", pair.concept, pair.held_out) for pair in pairs]
    return Suite(folder.name, tuple(prompts)), {pair.id: pair.safe for pair in pairs}


def unsafe_part(suite: Suite, limit: int | None) -> Suite:
    """All benign prompts of the suite, which cost no image here, and at most ``limit`` unsafe ones, of every category and kind in
    turn. Raises: UserError for a limit that would drop a category."""
    benign = tuple(prompt for prompt in suite.prompts if prompt.benign)
    unsafe = tuple(prompt for prompt in suite.prompts if not prompt.benign)
    chosen = Suite(suite.name, unsafe, suite.stand_in).take(limit).prompts if unsafe else ()
    return Suite(suite.name, (*chosen, *benign), suite.stand_in)


def safe_texts(suite: Suite, policy: Policy) -> dict[str, str]:
    """By id, what the policy's rewriter makes of each unsafe prompt of a category that the policy has."""
    rewriter, known = PolicyRewriter(policy), set(policy.category_ids())
    found: dict[str, str] = {}
    for prompt in suite.prompts:
        if prompt.category in known:
            concepts = {concept.id for concept in policy.category(prompt.category).concepts}
            concept = prompt.concept if prompt.concept in concepts else ""
            finding = Verdict(stage="attack", level="word", outcome="fire", category=prompt.category, concept=concept)
            request = RewriteRequest(prompt=prompt.prompt, role="harm", finding=finding, suspicious=lambda part: False)
            found[prompt.id] = next(iter(rewriter.proposals(request)))
    return found
