"""The syntax of prompts in front of the stages: which texts they have to judge, and lists and networks that nobody here knows."""

from collections.abc import Sequence
from functools import lru_cache

from valign.guard.records import Verdict
from valign.policy import Policy
from valign.text.syntax import Seen, Traced, has_syntax, seen

REMEMBERED = 64  # prompts


class SyntaxStage:
    """Fires on a list of words (``__name__``) that the policy does not hold, and on an unlisted network where those are blocked."""

    name = "syntax"
    level = "rule"

    def __init__(self, policy: Policy) -> None:
        self._rules = policy.guard.syntax
        self.read = lru_cache(maxsize=REMEMBERED)(self._read)  # every step asks for the same few prompts

    def _read(self, prompt: str) -> Seen:
        """What the model is told, in the policy's dialect."""
        return seen(prompt, self._rules.dialect, self._rules.wildcards)

    def texts(self, prompt: str) -> list[Traced]:
        """What the stages judge, the prompt as it stands first unless its dialect is known; it alone where it has no syntax."""
        whole = Traced.of(prompt)
        if not has_syntax(prompt):
            return [whole]
        return self.read(prompt).all_texts() or [whole]

    def check(self, prompt: str) -> Verdict:
        if not has_syntax(prompt):
            return Verdict(stage=self.name, level="rule")
        found = self.read(prompt)
        unlisted = [name for name in found.names if name.text not in self._rules.networks]
        if found.unread:
            return self._fire("a list of words that this policy does not hold")
        if unlisted and self._rules.unknown_networks == "block":
            return self._fire("a network that this policy does not list")
        away = f", {len(found.negative)} to keep away from" if found.negative else ""
        return Verdict(stage=self.name, level="rule", message=f"{len(found.all_texts())} texts to judge{away}")

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]

    def _fire(self, message: str) -> Verdict:
        return Verdict(stage=self.name, level="rule", outcome="fire", message=message, action="block")
