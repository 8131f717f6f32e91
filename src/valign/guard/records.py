"""The guard's records: typed, with the same keys for every decision, ready for JSON. Their ``repr`` shows no prompt."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from PIL.Image import Image

from valign.policy import Action

SCHEMA = 1  # of the JSON form; grows when a key changes its meaning
Level = Literal["rule", "language", "word", "semantic", "value", "intention", "rewrite", "image"]
Intent = Literal["unknown", "harmful", "prohibition", "education"]  # the last two are good intents
Outcome = Literal["pass", "fire", "error"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one stage found. ``score >= threshold`` where both are given and it fired."""

    stage: str
    level: Level
    outcome: Outcome = "pass"
    category: str = ""  # policy category of the finding
    concept: str = ""  # policy concept of the finding
    also: tuple[str, ...] = ()  # further categories that the stage found, the most certain first
    likely: tuple[str, ...] = ()  # categories that the prompt could have even if nothing is found in it; asked for by block rules
    possible: tuple[str, ...] = ()  # categories that it could have if any stage finds something in it
    rule: str = ""  # id of the norm or block rule
    span: tuple[int, int] | None = None  # where in the prompt: start, end in characters; where, not what: verdicts are logged
    score: float | None = None
    threshold: float | None = None
    ranking: float = 0.0  # of prompts by one number, in [0, 1] or a cosine; for ROC curves
    scores: Mapping[str, float] = field(default_factory=dict)  # per category, where the stage has them
    message: str = ""  # what happened, without words of the prompt
    action: Action | None = None  # asked for by the rule itself; None leaves it to the category
    milliseconds: float = field(default=0.0, compare=False)

    @property
    def fired(self) -> bool:
        """An error counts as a finding: the guard fails closed."""
        return self.outcome != "pass"


@dataclass(frozen=True, kw_only=True)
class GuardDecision:
    """What to do with a prompt, and why. ``flagged`` is harm that was meant; a forbidding sign is rewritten but not flagged."""

    action: Action
    flagged: bool
    stop: str  # name of the stage that decided; "" when all passed
    intent: Intent = "unknown"
    categories: tuple[str, ...] = ()  # policy ids, most certain first
    trace: tuple[Verdict, ...] = ()  # in the order in which stages ran
    prompt: str = field(default="", repr=False)  # "" where the prompt must not be kept (block rules)
    prompt_sha256: str = ""
    error: str = ""  # a stage that failed, and how; the action is then "block"
    chat_calls: int = 0
    policy: str = ""  # fingerprint of the rules
    config: str = ""  # the safety config in force, in the policy's terms; "" without one
    opened: bool = False  # allowed only because the config opens what was found

    @property
    def blocked(self) -> bool:
        return self.action == "block"

    @property
    def scores(self) -> dict[str, float]:
        """Highest score per category over all stages that give one."""
        found: dict[str, float] = {}
        for verdict in self.trace:
            for name, score in verdict.scores.items():
                found[name] = max(score, found.get(name, score))
        return found

    def to_json(self, *, with_prompt: bool = False) -> dict[str, Any]:
        """Plain values, the same keys every time. The prompt only on demand; its hash always."""
        data = {"schema": SCHEMA, **vars(self), "scores": self.scores, "prompt": self.prompt if with_prompt else None}
        data["trace"] = [{**vars(verdict), "scores": dict(verdict.scores)} for verdict in self.trace]  # asdict is five times slower
        return data


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One rewrite that was tried."""

    role: str  # harm, values, sign, or template
    source: str  # name of the rewriter
    text: str = field(repr=False)
    accepted: bool
    reason: str = ""  # why not; "" when accepted
    keep_words: float | None = None  # Jaccard overlap of words with the prompt, in [0, 1]
    keep_meaning: float | None = None  # cosine with the prompt, in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class GuardResult:
    """A prompt that an image may be generated from: ``prompt`` passes the guard's own stages, or is None."""

    decision: GuardDecision
    prompt: str | None = field(repr=False)
    attempts: tuple[Attempt, ...] = ()
    checks: int = 0  # texts that the guard judged while it looked for a rewrite

    @property
    def action(self) -> Action:
        """What was done: a rewrite that failed is a block."""
        return "block" if self.prompt is None else self.decision.action

    @property
    def blocked(self) -> bool:
        return self.prompt is None

    @property
    def rewritten(self) -> bool:
        return self.prompt is not None and self.decision.action == "rewrite"

    def to_json(self, *, with_prompt: bool = False) -> dict[str, Any]:
        """As `GuardDecision.to_json`; the rewrites too only on demand, for they hold words of the prompt."""
        attempts = [asdict(one) | {"text": one.text if with_prompt else None} for one in self.attempts]
        return {
            "action": self.action,
            "result": self.prompt if with_prompt else None,
            "attempts": attempts,
            "decision": self.decision.to_json(with_prompt=with_prompt),
        }


@dataclass(frozen=True, kw_only=True)
class GenerationAttempt:
    """One generated image: the caption's style suffix, the seed, the verdict of the image check, and the value token if any."""

    style: str  # "" for the first try
    seed: int
    verdict: Verdict | None  # None when no image check is configured
    principle: str = ""  # id of the principle whose token the image got


@dataclass(frozen=True, kw_only=True)
class GuardedImage:
    """An image that passed every check, or none. A flagged image is never kept."""

    result: GuardResult
    image: Image | None
    attempts: tuple[GenerationAttempt, ...] = ()  # "drawings" in JSON

    @property
    def blocked(self) -> bool:
        return self.image is None

    @property
    def checked(self) -> bool:
        """Whether an image check looked at the image."""
        return bool(self.attempts) and self.attempts[-1].verdict is not None

    def to_json(self, *, with_prompt: bool = False) -> dict[str, Any]:
        drawings = [asdict(one) for one in self.attempts]
        return {"blocked": self.blocked, "checked": self.checked, "drawings": drawings} | self.result.to_json(
            with_prompt=with_prompt
        )
