"""The waterfall under a safety config (CoSA, arXiv 2410.08968): a policy for each prompt.

A sentence about a whole category changes the category's action. One that closes a part of a category is a further block rule. One
that opens a part lets a prompt through if nothing is found in it without the part's words, and all that was found with them is of
categories that the config's role may open. Block rules and the script check run on the whole prompt, as without a config.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from valign.guard.decision import categories_of, ignored
from valign.guard.records import GuardDecision, Verdict
from valign.guard.rules.syntax import SyntaxStage
from valign.guard.waterfall import Waterfall
from valign.policy import Action, BlockRule, Policy
from valign.policy.safety_config import STRICTNESS, ConfigStatement, GuardConfig, loosens, openable, stem
from valign.text import clean, fold, readings, views
from valign.text.syntax import has_syntax

NAME = "config"
VARIANTS = 64  # policies that are kept; a config of n scopes can ask for 2^n


class ConfiguredWaterfall:
    """As `Waterfall`, for a policy under a config.

    Args: make: The waterfall of a policy that differs from ``policy`` in actions and block rules alone.
    """

    def __init__(self, policy: Policy, config: GuardConfig, make: Callable[[Policy], Waterfall]) -> None:
        self._policy, self._config = policy, config
        self._open = openable(policy, config.role)
        self._label = str(config)
        self._variant = lru_cache(maxsize=VARIANTS)(lambda held: _Variant(policy, config, held, make))
        self._plain = self._variant(())

    @property
    def syntax(self) -> SyntaxStage:
        """Of the policy; a config changes nothing about how a prompt is read."""
        return self._plain.waterfall.syntax

    def policy_for(self, prompt: str) -> Policy:
        """The policy that decides about this prompt."""
        return self._of(prompt).policy

    def read(self, prompts: Sequence[str]) -> list[str]:
        return self._plain.waterfall.read(prompts)

    def decide(self, prompts: Sequence[str], *, explain: bool = False) -> list[GuardDecision]:
        """As `Waterfall.decide`; each decision names the config."""
        decisions: list[GuardDecision | None] = [None] * len(prompts)
        groups: dict[_Variant, list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault(self._of(prompt) if isinstance(prompt, str) else self._plain, []).append(number)
        for variant, numbers in groups.items():
            for number, found in zip(numbers, variant.waterfall.decide([prompts[i] for i in numbers], explain=explain)):
                decisions[number] = self._finished(variant, prompts[number], found)
        return [one for one in decisions if one is not None]

    def passes(self, text: str, *, margin: float = 1.0) -> bool:
        """As `Waterfall.passes`; a text that the config opens passes as well."""
        variant = self._of(text)
        if variant.waterfall.passes(text, margin=margin):
            return True
        return bool(variant.opened) and self._finished(variant, text, variant.waterfall.decide([text])[0]).opened

    def risks(self, texts: Sequence[str]) -> list[float]:
        """As `Waterfall.risks`."""
        return [self._of(text).waterfall.risks([text])[0] for text in texts]

    def catches(self, prompts: Sequence[str]) -> list[bool]:
        return [self._of(prompt).waterfall.catches([prompt])[0] for prompt in prompts]

    def suspicious(self, part: str) -> bool:
        return self.catches([part])[0]

    def _of(self, prompt: str) -> "_Variant":
        return self._variant(_held(self._policy, self._config, prompt))

    def _finished(self, variant: "_Variant", prompt: str, decision: GuardDecision) -> GuardDecision:
        found = replace(decision, config=self._label)
        opened = self._opened_by(variant, prompt, decision) if decision.action != "allow" else None
        if opened is None:
            return found
        message = f"opened by the config: {opened}"
        trace = (*decision.trace, Verdict(stage=NAME, level="rule", rule=NAME, message=message))
        return replace(found, action="allow", flagged=False, stop="", trace=trace, opened=True)

    def _opened_by(self, variant: "_Variant", prompt: str, decision: GuardDecision) -> str | None:
        """The opening statements that account for all that was found in the prompt, as text; None if they do not."""
        if decision.error or not variant.opened or has_syntax(prompt):  # syntax may hide words in what is opened
            return None
        rest, used = _without(prompt, variant.opened)
        if not used:
            return None
        trace = [*decision.trace, *variant.waterfall.traces([prompt], explain=True, chat=False)[0]]
        counted = [one for one in trace if one.fired and not ignored(variant.policy, one) and one.level != "intention"]
        if any(one.level in ("rule", "value") or one.outcome == "error" for one in counted):
            return None
        if not set(categories_of(counted)) <= self._open | variant.allowed:
            return None
        if clean(rest) and variant.waterfall.decide([rest])[0].action != "allow":
            return None
        return "; ".join(map(str, used))


class _Variant:
    """The policy where the statements with these numbers hold, and its waterfall."""

    def __init__(self, policy: Policy, config: GuardConfig, held: tuple[int, ...], make: Callable[[Policy], Waterfall]) -> None:
        statements = [config.statements[number] for number in held]
        actions = {category.id: _strictest(category.id, category.action, statements) for category in policy.categories}
        closed = {
            name
            for one in statements
            for name in one.categories
            if not one.phrases and STRICTNESS[one.action] > STRICTNESS["allow"]
        }
        categories = [category.model_copy(update={"action": actions[category.id]}) for category in policy.categories]
        rules = [_rule(number, config.statements[number]) for number in held if _closes_part(config.statements[number])]
        self.policy = policy.model_copy(update={"categories": categories, "always_block": [*policy.always_block, *rules]})
        self.allowed = frozenset(name for name, action in actions.items() if action == "allow")
        self.opened = tuple(one for one in statements if one.phrases and one.action == "allow" and not closed & set(one.categories))
        self.waterfall = make(self.policy)


def _held(policy: Policy, config: GuardConfig, prompt: str) -> tuple[int, ...]:
    """Numbers of the statements whose scope the prompt is in. To tighten, any reading of the prompt will do; to loosen, only the
    plain one: a disguised word opens nothing."""
    plain = fold(prompt)
    others = readings(prompt) if any(one.scope for one in config.statements) else [plain]
    return tuple(
        number
        for number, one in enumerate(config.statements)
        if one.holds_for(plain) or (not loosens(policy, one) and any(map(one.holds_for, others)))
    )


def _strictest(category: str, own: Action, statements: Sequence[ConfigStatement]) -> Action:
    """The strictest action that a statement about the whole category asks for; the policy's own without one."""
    asked: list[Action] = [one.action for one in statements if category in one.categories and not one.phrases]
    return max(asked, key=lambda action: STRICTNESS[action], default=own)


def _closes_part(statement: ConfigStatement) -> bool:
    return bool(statement.phrases) and statement.action == "block"


def _rule(number: int, statement: ConfigStatement) -> BlockRule:
    """A block rule that has a word of the part, and all words of the scope."""
    scope = [sorted({word, stem(word), stem(word) + "s"}) for word in statement.scope]
    return BlockRule(id=f"config-{number + 1}", text=f"The config: {statement}.", every=[list(statement.phrases), *scope])


def _without(prompt: str, opened: Sequence[ConfigStatement]) -> tuple[str, list[ConfigStatement]]:
    """The prompt with a space for every opened phrase in its plain reading, and the statements that had one in it."""
    view = next(views(prompt))
    tokens: list[tuple[str, int, int]] = []
    place = 1
    for word in view.text.split():
        place = view.text.index(word, place)
        tokens.append((stem(word), place, place + len(word)))
        place += len(word)
    used, gone = [], set[int]()
    for statement in opened:
        for phrase in statement.phrases:
            words = list(map(stem, phrase.split()))
            for first in range(len(tokens) - len(words) + 1):
                run = tokens[first : first + len(words)]
                if [word for word, _, _ in run] == words:
                    gone |= set(range(*view.span(run[0][1], run[-1][2])))
                    used.append(statement)
    return "".join(" " if place in gone else char for place, char in enumerate(prompt)), list(dict.fromkeys(used))
