"""The stages of the waterfall: what a stage is, the table from which a policy's stages are built, and how one runs fail-closed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from valign.checks import UserError
from valign.guard.head.hyperbolic import HyperbolicStage
from valign.guard.head.learned import SHIPPED, LearnedStage
from valign.guard.head.probe import ProbeStage
from valign.guard.records import Verdict
from valign.guard.rules.lexical import LexicalStage
from valign.guard.rules.norms import ValuesStage
from valign.guard.rules.semantic import SemanticStage
from valign.models.encoders.hyperbolic_clip import HyperbolicClip
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.prompt_head import load_head
from valign.models.heads.text_probe import TextProbe
from valign.plugins import with_plugins
from valign.policy import Policy


@runtime_checkable
class Stage(Protocol):
    """A level of the waterfall. Whatever it raises blocks the prompt, or has the action of its ``on_error`` if it has one."""

    name: str
    level: str

    def check(self, prompt: str) -> Verdict: ...

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]: ...


@dataclass
class StageParts:
    """What a stage is built from. All stages share one encoder, which is loaded when the first of them asks for it."""

    policy: Policy
    head: Path | None = None  # file of a trained head; None is the shipped one
    loaded: MiniLM | None = None  # the encoder, if it was given or a stage needed it
    probe: TextProbe | None = None  # on the text encoders of the model that will generate
    hyperbolic: HyperbolicClip | None = None  # trained by ``valign train hysac``

    @property
    def encoder(self) -> MiniLM:
        self.loaded = self.loaded or MiniLM()
        return self.loaded

    @property
    def own_probe(self) -> TextProbe:
        """Raises: UserError if none was given."""
        if self.probe is None:
            raise UserError(
                f"policy {self.policy.id} lists the stage probe, which needs a probe of the model, got none. Fit one with "
                "`valign train retriever` and give it, or leave `probe` out of the policy's stages."
            )
        return self.probe

    @property
    def own_hyperbolic(self) -> HyperbolicClip:
        """Raises: UserError if none was given."""
        if self.hyperbolic is None:
            raise UserError(
                f"policy {self.policy.id} lists the stage hysac, which needs a hyperbolic CLIP, got none. Train one with "
                "`valign train hysac` and give its folder (--hysac), or leave `hysac` out of the policy's stages."
            )
        return self.hyperbolic


_OWN: dict[str, Callable[[StageParts], Stage]] = {
    "lexical": lambda parts: LexicalStage.from_policy(parts.policy),
    "semantic": lambda parts: SemanticStage.from_policy(parts.policy, parts.encoder),
    "learned": lambda parts: LearnedStage.from_policy(parts.policy, parts.encoder, load_head(parts.head or SHIPPED)),
    "probe": lambda parts: ProbeStage.from_policy(parts.policy, parts.own_probe),
    "hysac": lambda parts: HyperbolicStage.from_policy(parts.policy, parts.own_hyperbolic),
    "values": lambda parts: ValuesStage.from_policy(parts.policy),
}
STAGES = with_plugins("valign.guard_stages", _OWN)  # the names that a policy may list under guard.stages


def build_stages(parts: StageParts) -> list[Stage]:
    """The stages that ``policy.guard.stages`` names, in that order.

    Raises: UserError if a part that one needs is missing, or if one was given that none of them reads.
    """
    listed = parts.policy.guard.stages
    for what, given, stage in (("--head", parts.head, "learned"), ("--hysac", parts.hyperbolic, "hysac")):
        if given is not None and stage not in listed and set(listed) <= set(_OWN):  # a package's own stage may read it
            raise UserError(
                f"{what} has no effect under the policy {parts.policy.id}, whose stages are {', '.join(listed)}. Leave it out, or "
                f"list the stage {stage} under guard.stages."
            )
    return [STAGES[name](parts) for name in parts.policy.guard.stages]


def stage_fingerprint(stage: Stage) -> str:
    """SHA-256 of the stage's own weights, hex; "" for one that has none or does not say."""
    found = getattr(stage, "fingerprint", None)
    return str(found()) if found is not None else ""


def run_stage(stage: Stage, prompts: Sequence[str]) -> list[Verdict]:
    """A verdict per prompt, with its time. If the batch fails, each prompt is tried alone, and one that fails is an error.

    So is a verdict with a number that is not finite: no limit holds NaN back.
    """
    if not prompts:
        return []
    start = perf_counter()
    try:
        verdicts = stage.check_many(list(prompts))
        if len(verdicts) != len(prompts):
            raise RuntimeError("a stage must give a verdict per prompt")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # libraries in other languages raise more than `Exception`
        verdicts = [_run_one(stage, prompt) for prompt in prompts]
    each = (perf_counter() - start) * 1000 / len(prompts)
    return [replace(sound(verdict, stage), milliseconds=each) for verdict in verdicts]


def sound(verdict: Verdict, stage: Any) -> Verdict:
    """The verdict, or an error of ``stage`` in its place if one of its numbers is NaN or infinite."""
    numbers = (verdict.score, verdict.threshold, verdict.ranking, *verdict.scores.values())
    if all(number is None or isfinite(number) for number in numbers):
        return verdict
    return replace(
        Verdict(stage=verdict.stage, level=verdict.level, outcome="error", message="failed: a score is not finite"),
        action=getattr(stage, "on_error", None),
    )


def _run_one(stage: Stage, prompt: str) -> Verdict:
    try:
        return stage.check(prompt)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        failed = Verdict(stage=stage.name, level=stage.level, outcome="error", message=f"failed: {type(error).__name__}")  # type: ignore[arg-type]
        return replace(failed, action=getattr(stage, "on_error", None))
