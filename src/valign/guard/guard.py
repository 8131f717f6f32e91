"""The guard: rules, stages, intent, rewriting, image. Built from a policy; every part can be left out or replaced."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from valign.checks import UserError
from valign.files import hash_value
from valign.guard.decision import GOOD, action_for, categories_of, enforced, ignored
from valign.guard.head.learned import SHIPPED, LearnedStage
from valign.guard.images.regeneration import Draw, generate_checked
from valign.guard.images.value_token import ValueToken
from valign.guard.records import Attempt, GuardDecision, GuardedImage, GuardResult, Intent, Verdict
from valign.guard.rewriting.acceptance import Acceptor
from valign.guard.rewriting.chat import ChatIntention, ChatRewriter, ChatValues
from valign.guard.rewriting.policy_rewriter import Brief, PolicyRewriter, Rewriter, role_of
from valign.guard.rules.block_rule import HardRule
from valign.guard.rules.intention import IntentionRules, IntentJudge
from valign.guard.rules.lexical import LexicalStage
from valign.guard.rules.norms import ValuesStage
from valign.guard.rules.script import ScriptStage
from valign.guard.rules.second_opinion import SecondOpinion
from valign.guard.rules.semantic import References, SemanticStage, references
from valign.interfaces import Detector
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.prompt_head import load_head
from valign.models.language.chat import ChatModel
from valign.policy import Policy, load_policy
from valign.text import clean

METHOD = Method(
    slug="valor",
    title="VALOR: find, understand, rewrite, draw, verify",
    paper="arXiv 2511.11693",
    room="guard",
    entry="valign.guard.guard:Guard",
)
STAGES = {"lexical": LexicalStage, "semantic": SemanticStage, "learned": LearnedStage, "values": ValuesStage}
CONTROLS = frozenset(chr(code) for code in range(32)) - set("\t\n\r")
TEMPLATES = 8  # proposals of the policy rewriter that are looked at when nothing better was accepted


@runtime_checkable
class Stage(Protocol):
    """A level of the waterfall. Whatever it raises blocks the prompt, or has the action of its ``on_error`` if it has one."""

    name: str
    level: str

    def check(self, prompt: str) -> Verdict: ...

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]: ...


class Guard:
    """Checks, rewrites, draws. `from_policy` puts one together; the constructor takes any parts.

    Args:
        stages: In the order in which they run. Without any the guard refuses to start.
        opinion: May clear a finding of the word level; None lets every listed word count.
        judge: Tells what was meant when a stage fired; None takes every finding as meant.
        rewriter: Proposes captions; the policy's own rewriter is always the last resort. None: what should be rewritten is blocked.
        acceptor: What a proposal must keep.
        detector: Looks at images; None leaves them unchecked, and `GuardedImage.checked` says so.
        token: Draws captions that call for a value principle with its token; None draws all with the bare model.
    """

    def __init__(
        self,
        policy: Policy,
        stages: Sequence[Stage],
        *,
        opinion: SecondOpinion | None = None,
        judge: IntentJudge | None = None,
        rewriter: Rewriter | None = None,
        acceptor: Acceptor | None = None,
        template: PolicyRewriter | None = None,
        detector: Detector | None = None,
        token: ValueToken | None = None,
    ) -> None:
        if not stages:
            raise UserError("Guard.stages must not be empty, got none. Name at least one under guard.stages in the policy.")
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ValueError(f"Guard.stages must have distinct names, got {', '.join(names)}. Rename one.")
        self.policy, self.stages = policy, tuple(stages)
        self.opinion, self.judge, self.rewriter, self.detector, self.token = opinion, judge, rewriter, detector, token
        self.acceptor = acceptor or Acceptor.from_policy(policy)
        self.template = template or PolicyRewriter(policy)
        self._rule, self._script = HardRule.from_policy(policy), ScriptStage(policy)
        self._fingerprint = policy.fingerprint()

    @classmethod
    def from_policy(
        cls,
        policy: Policy | str | Path = "default",
        *,
        chat: ChatModel | None = None,
        detector: Detector | None = None,
        head: Path | None = None,
        encoder: MiniLM | None = None,
        token: ValueToken | None = None,
    ) -> "Guard":
        """The stages that ``policy.guard.stages`` names, offline. A chat model adds a judge of values and intent, and a rewriter.

        Args: head: A head trained by ``valign guard fit``; None is the shipped one.
        Raises: UserError if a part that the policy asks for is missing.
        """
        rules = policy if isinstance(policy, Policy) else load_policy(policy)
        wanted = rules.guard.stages
        stages: list[Stage] = []
        if {"semantic", "learned"} & set(wanted):
            encoder = encoder or MiniLM()
        for name in wanted:
            if name == "learned":
                assert encoder is not None
                stages.append(LearnedStage.from_policy(rules, encoder, load_head(head or SHIPPED)))
            elif name == "semantic":
                assert encoder is not None
                stages.append(SemanticStage.from_policy(rules, encoder))
            elif name == "values":
                stages.append(ValuesStage.from_policy(rules))
            else:
                stages.append(LexicalStage.from_policy(rules))
        if chat is not None:
            stages.append(ChatValues(chat, rules))
        template = PolicyRewriter(rules, References(encoder, references(rules)) if encoder else None)
        return cls(
            rules,
            stages,
            opinion=_second_opinion(rules, stages),
            judge=ChatIntention(chat) if chat is not None else IntentionRules.from_policy(rules),
            rewriter=ChatRewriter(chat, rules) if chat is not None else template,
            acceptor=Acceptor.from_policy(rules, encoder),
            template=template,
            detector=detector,
            token=token,
        )

    def fingerprint(self) -> str:
        """SHA-256 of the rules, the stages with their heads, and the detector; a chat model's own changes are not seen."""
        heads = [(stage.name, stage.head.sha256 if isinstance(stage, LearnedStage) else "") for stage in self.stages]
        card = None if self.detector is None else [self.detector.card.name, self.detector.card.weights_sha256]
        return hash_value([self._fingerprint, heads, card])

    def check(self, prompt: str, *, explain: bool = False) -> GuardDecision:
        """What to do with the prompt; nothing is rewritten or drawn. ``explain`` runs all stages, with the same decision.

        Raises: TypeError if it is no text; UserError if it is blank, binary or longer than ``guard.max_chars``.
        """
        return self.check_many([prompt], explain=explain)[0]

    def check_many(self, prompts: Sequence[str], *, explain: bool = False) -> list[GuardDecision]:
        """A decision per prompt, each stage once for all prompts that are still undecided."""
        for prompt in prompts:
            self.refuse(prompt)
        traces = self.traces(prompts, explain=explain)
        return [self._decide(prompt, trace) for prompt, trace in zip(prompts, traces)]

    def refuse(self, prompt: object) -> None:
        """Raise TypeError or UserError for what is no prompt at all."""
        if not isinstance(prompt, str):
            raise TypeError(f"Guard.prompt must be text, got {type(prompt).__name__}. Decode it first.")
        limit = self.policy.guard.max_chars
        if len(prompt) > limit:
            raise UserError(f"Guard.prompt must have at most {limit} characters, got {len(prompt)}. Shorten it.")
        if not clean(prompt):
            raise UserError("Guard.prompt must not be blank, got no visible character. Say what to draw.")
        if CONTROLS & set(prompt) or any(0xD800 <= ord(char) <= 0xDFFF for char in prompt if not char.isascii()):
            raise UserError("Guard.prompt must be text, got control characters or broken Unicode. Send plain UTF-8 text.")

    def traces(self, prompts: Sequence[str], *, explain: bool = False, chat: bool = True) -> list[list[Verdict]]:
        """Verdicts per prompt in the order in which stages ran: the block rules, the script, then the stages.

        Args: chat: False leaves out stages that ask a chat model.
        """
        traces: list[list[Verdict]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        every: list[Stage] = [_Rule(self._rule), self._script]
        every += [stage for stage in self.stages if chat or not getattr(stage, "uses_chat", False)]
        for stage in every:
            for i, verdict in zip(alive, self._verdicts(stage, [prompts[i] for i in alive])):
                traces[i].append(verdict)
            if not explain or stage.level == "rule":
                alive = [i for i in alive if not self._counts(traces[i][-1])]
        return traces

    def _verdicts(self, stage: Stage, prompts: Sequence[str]) -> list[Verdict]:
        found = _run(stage, prompts)
        return self.opinion(prompts, found) if self.opinion is not None and stage.level == "word" else found

    def _counts(self, verdict: Verdict) -> bool:
        return verdict.fired and not ignored(self.policy, verdict)

    def _decide(self, prompt: str, trace: list[Verdict]) -> GuardDecision:
        calls = sum(getattr(stage, "uses_chat", False) and any(one.stage == stage.name for one in trace) for stage in self.stages)
        finding = next((enforced(self.policy, one) for one in trace if self._counts(one)), None)
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        if any(one.fired and one.level != "rule" for one in trace) and self._rule.concerns(prompt):
            every = self.traces([prompt], explain=True, chat=False)[0]  # of all stages: the first that fired is not all there is
            rule = self._rule.check(prompt, categories_of([*trace, *every]))
            if rule.fired:
                trace, finding = [*trace, rule], rule
        intent: Intent = "unknown"
        if finding is not None and finding.outcome == "fire" and finding.level != "rule" and self.judge is not None:
            verdict = _judge(self.judge, prompt, trace)
            calls += self.judge.uses_chat
            trace = [*trace, verdict]
            if verdict.outcome == "error":
                return self._decision(
                    prompt, digest, trace, finding, self.policy.cases.judge_failure, "harmful", calls, verdict.message
                )
            if isinstance(self.judge, IntentionRules) and not verdict.fired:
                objection = self.judge.objection(prompt, finding, self._suspicious)
                verdict = replace(verdict, outcome="fire", rule="harmful", message=objection) if objection else verdict
                trace = [*trace[:-1], verdict]
            intent = "prohibition" if verdict.rule == "prohibition" else "education" if verdict.rule == "education" else "harmful"
        if finding is None:
            overlooked = next((one for one in trace if one.outcome == "error"), None)
            return self._decision(prompt, digest, trace, None, "allow", "unknown", calls, _error(overlooked))
        action = action_for(self.policy, finding, intent)
        return self._decision(prompt, digest, trace, finding, action, intent, calls, _error(finding))

    def _decision(
        self,
        prompt: str,
        digest: str,
        trace: list[Verdict],
        finding: Verdict | None,
        action: str,
        intent: Intent,
        calls: int,
        error: str,
    ) -> GuardDecision:
        secret = finding is not None and finding.stage == self._rule.name
        return GuardDecision(
            action=action,  # type: ignore[arg-type]
            flagged=finding is not None and intent not in GOOD,
            stop=finding.stage if finding else "",
            intent=intent,
            categories=categories_of(trace),
            trace=tuple(trace),
            prompt="" if secret else prompt,
            prompt_sha256=digest,
            error=error,
            chat_calls=int(calls),
            policy=self._fingerprint,
        )

    def passes(self, text: str) -> bool:
        """Whether the guard would let the text through as it is: no stage finds anything, and none fails."""
        try:
            self.refuse(text)
        except UserError:
            return False
        trace = self.traces([text])[0]
        return not any(self._counts(verdict) for verdict in trace) and not self._rule.check(text, categories_of(trace)).fired

    def _suspicious(self, part: str) -> bool:
        """Whether a part of a prompt fails by itself. Chat models are asked about whole captions only."""
        return any(self._counts(verdict) for verdict in self.traces([part], chat=False)[0])

    def guard(self, prompt: str) -> GuardResult:
        """A prompt that may be drawn: the same, a rewrite that passes every stage, or None. Raises: as `check`."""
        return self.finish(self.check(prompt), prompt)

    def finish(self, decision: GuardDecision, prompt: str) -> GuardResult:
        """Carry a decision of `check` or `check_many` out."""
        if decision.action == "allow":
            return GuardResult(decision=decision, prompt=prompt)
        if decision.action == "block" or self.rewriter is None:
            return GuardResult(decision=decision, prompt=None)
        finding = enforced(self.policy, next(one for one in decision.trace if one.stage == decision.stop and one.fired))
        role = role_of(finding, decision.intent)
        brief = Brief(prompt=prompt, role=role, finding=finding, intent=decision.intent, suspicious=cache(self._suspicious))
        attempts: list[Attempt] = []
        calls = decision.chat_calls
        for number in range(self.policy.guard.max_rewrites):
            calls += self.rewriter.uses_chat
            attempt = self._attempt(self.rewriter, brief, number)
            if attempt is None:
                break
            attempts.append(attempt)
            if attempt.accepted:
                return GuardResult(decision=replace(decision, chat_calls=calls), prompt=attempt.text, attempts=tuple(attempts))
        decision = replace(decision, chat_calls=calls)
        for text in self._templates(brief):
            if self.passes(text):
                attempts.append(Attempt(role="template", source=self.template.name, text=text, accepted=True))
                return GuardResult(decision=decision, prompt=text, attempts=tuple(attempts))
        return GuardResult(decision=decision, prompt=None, attempts=tuple(attempts))

    def _attempt(self, rewriter: Rewriter, brief: Brief, number: int) -> Attempt | None:
        try:
            text = rewriter.propose(brief, number)
        except Exception as error:
            reason = f"failed: {type(error).__name__}"
            return Attempt(role=brief.role, source=rewriter.name, text="", accepted=False, reason=reason)
        if text is None:
            return None
        found = self.acceptor(brief.prompt, text)
        if brief.role == "sign":  # a sign shows other words than the prompt, so only its form is judged
            found = replace(found, reason=self.acceptor.form(brief.prompt, text))
        reason = found.reason or ("" if self.passes(text) else "does not pass the guard")
        return Attempt(
            role=brief.role,
            source=rewriter.name,
            text=text,
            accepted=not reason,
            reason=reason,
            keep_words=found.keep_words,
            keep_meaning=found.keep_meaning,
        )

    def _templates(self, brief: Brief) -> list[str]:
        """The policy's own proposals, whatever they keep. A finding without a category (a chat judge's) has the sign only."""
        if brief.role == "harm" and brief.finding.category not in self.policy.category_ids():
            return []
        if brief.role == "values" and brief.finding.rule not in {norm.id for norm in self.policy.norms}:
            return ["people standing quietly in a friendly place"]
        return list(self.template.proposals(brief))[:TEMPLATES]

    def generate(
        self, model: DiffusionModel, prompt: str, *, seed: int = 0, steps: int = 50, guidance_scale: float = 7.5
    ) -> GuardedImage:
        """Guard the prompt, draw it, check the image, and draw again in safer styles where it fails.

        An allowed prompt gives the image that the bare model draws at that seed, bit for bit, unless it calls for a value token.
        Raises: as `check`; UserError if the value encoder was made for another model.
        """
        options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}

        def draw(caption: str, number: int) -> Image:
            if self.token is not None:
                return self.token.draw(model, caption, number, **options)
            return model.generate([caption], seeds=[number], **options)[0]

        return self.draw(draw, prompt, seed=seed)

    def draw(self, draw: Draw, prompt: str, *, seed: int = 0) -> GuardedImage:
        """`generate` with any function ``(caption, seed) -> image``. With a ``token``, giving it is the function's work."""
        return self.illustrate(draw, self.guard(prompt), seed=seed)

    def illustrate(self, draw: Draw, result: GuardResult, *, seed: int = 0) -> GuardedImage:
        """The drawing half of `draw`, for a result of `guard` or `finish`: draw, check, and draw again where it fails."""
        if result.prompt is None:
            return GuardedImage(result=result, image=None)
        again = self.policy.cases.unsafe_image == "rewrite"
        image, drawings = generate_checked(
            draw,
            result.prompt,
            seed=seed,
            styles=self.policy.safe_styles,
            tries=self.policy.guard.max_regenerations if again else 0,
            detector=self.detector,
            passes=self.passes,
            **({} if self.token is None else {"principle": self.token.principle}),
        )
        return GuardedImage(result=result, image=image, drawings=drawings)

    def warm_up(self) -> None:
        """Run every stage once, so that the first request is not the slow one."""
        self.check_many(["a red apple"], explain=True)


class _Rule:
    """The block rules, as a stage."""

    def __init__(self, rule: HardRule) -> None:
        self.name, self.level, self._rule = rule.name, rule.level, rule

    def check(self, prompt: str) -> Verdict:
        return self._rule.check(prompt)

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self._rule.check(prompt) for prompt in prompts]


def _second_opinion(policy: Policy, stages: Sequence[Stage]) -> SecondOpinion | None:
    words = next((stage for stage in stages if isinstance(stage, LexicalStage)), None)
    head = next((stage for stage in stages if isinstance(stage, LearnedStage)), None)
    rules = policy.guard
    if words is None or head is None or not rules.ambiguous:
        return None
    return SecondOpinion(words, head, HardRule.from_policy(policy), ambiguous=rules.ambiguous, doubt=rules.doubt)


def _run(stage: Stage, prompts: Sequence[str]) -> list[Verdict]:
    """A verdict per prompt. If the batch fails, each prompt is tried alone, and one that fails is an error."""
    if not prompts:
        return []
    start = perf_counter()
    try:
        verdicts = stage.check_many(list(prompts))
        if len(verdicts) != len(prompts):
            raise RuntimeError("a stage must give a verdict per prompt")
    except Exception:
        verdicts = [_run_one(stage, prompt) for prompt in prompts]
    each = (perf_counter() - start) * 1000 / len(prompts)
    return [replace(verdict, milliseconds=each) for verdict in verdicts]


def _run_one(stage: Stage, prompt: str) -> Verdict:
    try:
        return stage.check(prompt)
    except Exception as error:
        failed = Verdict(stage=stage.name, level=stage.level, outcome="error", message=f"failed: {type(error).__name__}")  # type: ignore[arg-type]
        return replace(failed, action=getattr(stage, "on_error", None))


def _error(verdict: Verdict | None) -> str:
    return f"{verdict.stage}: {verdict.message}" if verdict is not None and verdict.outcome == "error" else ""


def _judge(judge: IntentJudge, prompt: str, trace: Sequence[Verdict]) -> Verdict:
    start = perf_counter()
    try:
        verdict = judge.judge(prompt, tuple(trace))
    except Exception as error:
        verdict = Verdict(
            stage=judge.name, level="intention", outcome="error", message=f"{judge.name} failed: {type(error).__name__}"
        )
    return replace(verdict, milliseconds=(perf_counter() - start) * 1000)
