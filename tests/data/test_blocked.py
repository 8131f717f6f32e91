from valign.data.prompts.blocked import allowed_pairs, allowed_prompts
from valign.data.prompts.pairs import PromptPair
from valign.policy import load_policy

POLICY = load_policy("default")


def test_a_rule_needs_a_whole_word_of_every_list():
    rule = POLICY.always_block[0]
    first, second = rule.every[0][0], rule.every[1][0]
    prompts = [f"a {first.upper()}, {second}", f"a {first} in a park", f"a {first}proof {second}"]
    assert allowed_prompts(POLICY, prompts) == (prompts[1:], 1)


def test_spelling_is_no_way_round():
    """As in the guard: one implementation serves both."""
    rule = POLICY.always_block[0]
    first, second = rule.every[0][0], rule.every[1][0]
    hidden = [f"a {' '.join(first)}, {second}", f"a {first}, {second[0]}\u200b{second[1:]}", f"{first} 12 years old, {second}"]
    assert allowed_prompts(POLICY, [*hidden, f"somebody aged 12, {second}"]) == ([], 4)


def test_blocked_and_held_out_pairs_are_dropped_and_counted():
    rule = POLICY.always_block[0]
    held_out = next(concept for category in POLICY.categories for concept in category.concepts if concept.held_out)
    pairs = [
        PromptPair("good", "mean crow", "kind crow", ("hate",)),
        PromptPair("blocked", f"{rule.every[0][0]} {rule.every[1][0]}", "kind crow", ("sexual",)),
        PromptPair("named", "mean crow", "kind crow", ("hate",), concept=held_out.id),
        PromptPair("flagged", "mean crow", "kind crow", ("hate",), held_out=True),
    ]
    kept, dropped = allowed_pairs(POLICY, pairs)
    assert [pair.id for pair in kept] == ["good"]
    assert dropped == {"always_block": 1, "held_out": 2}
