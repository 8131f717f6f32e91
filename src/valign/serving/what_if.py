"""The same guard at other thresholds, to show what would change. No image or answer depends on it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from valign.guard.guard import Guard, Stage
from valign.guard.records import Verdict

PROBE = "a red apple"


class Retuned:
    """A stage that fires when its score reaches another threshold. Its errors stay errors."""

    def __init__(self, stage: Stage, threshold: float) -> None:
        self.name, self.level = stage.name, stage.level
        self._stage, self._threshold = stage, threshold

    def check(self, prompt: str) -> Verdict:
        return self._judge(self._stage.check(prompt))

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self._judge(verdict) for verdict in self._stage.check_many(prompts)]

    def _judge(self, verdict: Verdict) -> Verdict:
        if verdict.score is None or verdict.outcome == "error":
            return verdict
        return replace(verdict, outcome="fire" if verdict.score >= self._threshold else "pass", threshold=self._threshold)


def thresholds_of(guard: Guard) -> dict[str, float]:
    """Stages that score every prompt, and their thresholds; a stage with one per category gives the one that came nearest."""
    return {verdict.stage: verdict.threshold for verdict in guard.check(PROBE, explain=True).trace if verdict.threshold is not None}


def retuned(guard: Guard, moved: Mapping[str, float]) -> Guard:
    """A guard of the same parts with some levels moved: thresholds by stage, ``keep_words`` and ``keep_meaning``."""
    stages: list[Stage] = [Retuned(stage, moved[stage.name]) if stage.name in moved else stage for stage in guard.stages]
    acceptor = guard.acceptor
    words, meaning = moved.get("keep_words", acceptor.keep_words), moved.get("keep_meaning", acceptor.keep_meaning)
    return Guard(
        guard.policy,
        stages,
        opinion=guard.opinion,
        judge=guard.judge,
        rewriter=guard.rewriter,
        acceptor=replace(acceptor, keep_words=words, keep_meaning=meaning),
        template=guard.template,
        detector=guard.detector,
        reads=guard.reads,
    )
