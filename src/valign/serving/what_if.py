"""The same guard at other thresholds, to see what would change. Only looked at: nothing is drawn or answered by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from valign.guard.guard import Guard, Stage
from valign.guard.records import Verdict

PROBE = "a red apple"


@dataclass(frozen=True)
class Retuned:
    """A stage that fires when its score reaches another threshold. Its errors stay errors."""

    stage: Stage
    threshold: float

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def level(self) -> str:
        return self.stage.level

    def check(self, prompt: str) -> Verdict:
        return self._judge(self.stage.check(prompt))

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self._judge(verdict) for verdict in self.stage.check_many(prompts)]

    def _judge(self, verdict: Verdict) -> Verdict:
        if verdict.score is None or verdict.outcome == "error":
            return verdict
        return replace(verdict, outcome="fire" if verdict.score >= self.threshold else "pass", threshold=self.threshold)


def thresholds_of(guard: Guard) -> dict[str, float]:
    """Stages that score every prompt, and their thresholds; a stage with one per category gives the one that came nearest."""
    return {verdict.stage: verdict.threshold for verdict in guard.check(PROBE, explain=True).trace if verdict.threshold is not None}


def retuned(guard: Guard, thresholds: Mapping[str, float], **acceptor: float) -> Guard:
    """A guard of the same parts; stages that ``thresholds`` names fire from there on; ``keep_words``, ``keep_meaning`` as given."""
    stages = [Retuned(stage, thresholds[stage.name]) if stage.name in thresholds else stage for stage in guard.stages]
    return Guard(
        guard.policy,
        stages,
        judge=guard.judge,
        rewriter=guard.rewriter,
        acceptor=replace(guard.acceptor, **acceptor),
        template=guard.template,
        detector=guard.detector,
    )
