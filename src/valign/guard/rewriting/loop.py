"""Carry a decision out: ask a rewriter for captions until one passes the guard, then the policy's own templates, else block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from math import inf

from valign.guard.configured import ConfiguredWaterfall
from valign.guard.decision import enforced
from valign.guard.records import Attempt, GuardDecision, GuardResult
from valign.guard.rewriting.acceptance import Acceptor
from valign.guard.rewriting.policy_rewriter import Editor, PolicyRewriter, Rewriter, RewriteRequest, role_of
from valign.guard.waterfall import Waterfall
from valign.models.encoders.minilm import RememberingEncoder
from valign.policy import Policy
from valign.text.syntax import SIGNS, has_syntax

Propose = Callable[[int], str | None]
OBJECTS = "the second judge objects"
MOST_CHECKS = 4  # texts that the guard judges before parts of a prompt are no longer looked at for a template
TEMPLATES = 8  # proposals of the policy rewriter that are tried when nothing better was accepted


class RewritingLoop:
    """Finds a prompt that passes every stage in place of one that should be rewritten.

    Args:
        waterfall: What a proposal must pass.
        rewriter: Proposes captions; None blocks whatever should be rewritten.
        acceptor: What a proposal must keep of the prompt.
        editors: Propose captions before the rewriter does, in this order. What they find must pass with a margin, `guard.margin`.
        harmless: A judge that took no part in finding the proposal; it must agree. None: the guard alone decides.
        template: The last resort, whatever its proposals keep.
    """

    def __init__(
        self,
        policy: Policy,
        waterfall: Waterfall | ConfiguredWaterfall,
        rewriter: Rewriter | None,
        acceptor: Acceptor,
        template: PolicyRewriter,
        *,
        editors: Sequence[Editor] = (),
        harmless: Callable[[str], bool] | None = None,
    ) -> None:
        self._policy, self._waterfall = policy, waterfall
        self._rewriter, self._acceptor, self._template = rewriter, acceptor, template
        self._editors, self._harmless = tuple(editors), harmless

    def finish(self, decision: GuardDecision, prompt: str) -> GuardResult:
        """The prompt itself if it is allowed, an accepted rewrite, or None; with every attempt."""
        if decision.action == "allow":
            return GuardResult(decision=decision, prompt=prompt)
        if decision.action == "block" or self._rewriter is None:
            return GuardResult(decision=decision, prompt=None)
        counter = _Counter(self._waterfall)
        request, calls = self._request(decision, prompt, counter), decision.chat_calls
        attempts, acceptor = list[Attempt](), self._acceptor
        if acceptor.encoder is not None:
            acceptor = replace(acceptor, encoder=RememberingEncoder(acceptor.encoder))
        for rewriter, propose in self._rewriters(request):
            for number in count():
                calls += rewriter.uses_chat
                attempt = self._attempt(rewriter, request, propose, number, counter, acceptor)
                if attempt is None:
                    break
                attempts.append(attempt)
                if attempt.accepted:
                    break
            if attempts and attempts[-1].accepted:
                break
        if not any(attempt.accepted for attempt in attempts):
            edited = {attempt.source for attempt in attempts} & {editor.name for editor in self._editors}
            counter.limit = MOST_CHECKS if edited else inf
            found = next((text for text in self._templates(request) if counter.passes(text)), None)
            if found is not None:
                attempts.append(Attempt(role="template", source=self._template.name, text=found, accepted=True))
        accepted = next((attempt.text for attempt in attempts if attempt.accepted), None)
        return GuardResult(
            decision=replace(decision, chat_calls=calls), prompt=accepted, attempts=tuple(attempts), checks=counter.checks
        )

    def _rewriters(self, request: RewriteRequest) -> Iterator[tuple[Editor | Rewriter, Propose]]:
        """Each with what gives its proposal of a number. The policy's own rewriter comes last anyway, so behind an editor it gets
        no turn here. Editors know English alone."""
        for editor in self._editors if request.finding.level != "language" else ():
            yield editor, _in_turn(editor.proposals(request))
        rewriter, most = self._rewriter, self._policy.guard.max_rewrites
        if rewriter is not None and not (self._editors and rewriter is self._template):
            yield rewriter, lambda number: rewriter.propose(request, number) if number < most else None

    def _request(self, decision: GuardDecision, prompt: str, counter: "_Counter") -> RewriteRequest:
        policy = self._waterfall.policy_for(prompt)
        finding = enforced(policy, next(one for one in decision.trace if one.stage == decision.stop and one.fired))
        return RewriteRequest(
            prompt=prompt,
            role=role_of(finding, decision.intent),
            finding=finding,
            intent=decision.intent,
            suspicious=cache(counter.suspicious),
            risks=counter.risks,
            texts=tuple(self._waterfall.syntax.texts(prompt)) if has_syntax(prompt) else (),
        )

    def _attempt(
        self,
        rewriter: Editor | Rewriter,
        request: RewriteRequest,
        propose: Propose,
        number: int,
        counter: "_Counter",
        acceptor: Acceptor,
    ) -> Attempt | None:
        try:
            text = propose(number)
        except Exception as error:
            reason = f"failed: {type(error).__name__}"
            return Attempt(role=request.role, source=rewriter.name, text="", accepted=False, reason=reason)
        if text is None:
            return None
        strict = rewriter in self._editors
        if strict and self._objects(text):  # costs least
            return Attempt(role=request.role, source=rewriter.name, text=text, accepted=False, reason=OBJECTS)
        found = acceptor(request.prompt, text, edited=strict)
        if request.role == "sign":  # a sign shows other words than the prompt, so only its form is judged
            found = replace(found, reason=acceptor.form(request.prompt, text))
        reason = found.reason or self._objection(text, counter, strict=strict)
        return Attempt(
            role=request.role,
            source=rewriter.name,
            text=text,
            accepted=not reason,
            reason=reason,
            keep_words=found.keep_words,
            keep_meaning=found.keep_meaning,
        )

    def _objection(self, text: str, counter: "_Counter", *, strict: bool) -> str:
        """Why the text must not be used; "" if it may."""
        if not strict and self._objects(text):
            return OBJECTS
        if not counter.passes(text, margin=self._policy.guard.margin if strict else 1.0):
            return "does not pass the guard"
        return ""

    def _objects(self, text: str) -> bool:
        return self._harmless is not None and not self._harmless(text)

    def _templates(self, request: RewriteRequest) -> list[str]:
        """The policy's own proposals, whatever they keep. A finding without a category (a chat judge's) has the sign only."""
        if request.role == "harm" and request.finding.category not in self._policy.category_ids():
            return []
        if request.role == "values" and request.finding.rule not in {norm.id for norm in self._policy.norms}:
            return ["people standing quietly in a friendly place"]
        if request.texts:  # a template has no use for brackets
            request = replace(request, prompt=min((one.text for one in request.texts), key=lambda text: len(SIGNS.findall(text))))
        return list(self._template.proposals(request))[:TEMPLATES]


def _in_turn(proposals: Iterator[str]) -> Propose:
    return lambda number: next(proposals, None)


class _Counter:
    """The waterfall, counting how often it is asked for one prompt; several texts at once are one question."""

    def __init__(self, waterfall: Waterfall | ConfiguredWaterfall) -> None:
        self._waterfall, self.checks = waterfall, 0
        self.limit = inf  # checks from which a part is taken for suspicious unseen

    def passes(self, text: str, *, margin: float = 1.0) -> bool:
        self.checks += 1
        return self._waterfall.passes(text, margin=margin)

    def risks(self, texts: Sequence[str]) -> list[float]:
        self.checks += 1
        return self._waterfall.risks(texts)

    def suspicious(self, part: str) -> bool:
        if self.checks + 1 >= self.limit:
            return True
        self.checks += 1
        return self._waterfall.suspicious(part)
