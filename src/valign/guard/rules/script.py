"""Blocks prompts mostly in other letters than Latin ones, which the word lists and the encoder cannot read."""

from collections.abc import Sequence

from valign.guard.records import Verdict
from valign.policy import Policy
from valign.text import fold

SHARE = 0.3  # of foreign letters, from which a prompt counts as written in another script


class ScriptStage:
    """Fires if too many letters stay foreign after look-alikes were read as Latin ones."""

    name = "script"
    level = "rule"

    def __init__(self, policy: Policy) -> None:
        self._action = policy.guard.other_scripts

    def check(self, prompt: str) -> Verdict:
        if prompt.isascii():
            return Verdict(stage=self.name, level="rule")
        share = foreign_share(prompt)
        if share < SHARE or self._action == "allow":
            return Verdict(stage=self.name, level="rule", score=share, threshold=SHARE)
        message = "letters that this policy cannot read"
        return Verdict(stage=self.name, level="rule", outcome="fire", score=share, threshold=SHARE, message=message, action="block")

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]


def foreign_share(prompt: str) -> float:
    """Share of letters beyond Latin, in [0, 1]; 0 without letters."""
    letters = [char for char in fold(prompt) if char.isalpha()]
    return sum(ord(char) > 0x24F for char in letters) / len(letters) if letters else 0.0
