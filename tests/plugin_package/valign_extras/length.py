"""Block prompts that are longer than a text encoder reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from valign.guard.records import Verdict
from valign.guard.stages import StageParts


@dataclass(frozen=True)
class LengthStage:
    """Fire on a prompt of more than ``limit`` words."""

    limit: int = 60
    name: str = "length"
    level: str = "rule"

    def check(self, prompt: str) -> Verdict:
        words = len(prompt.split())
        return Verdict(stage=self.name, level="rule", outcome="fire" if words > self.limit else "pass", score=words, action="block")

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]


def length_stage(parts: StageParts) -> LengthStage:
    """The row: a stage from what the guard is built of."""
    return LengthStage()
