"""Carry a decision out: ask a rewriter for captions until one passes the guard, then the policy's own templates, else block."""

from dataclasses import replace
from functools import cache

from valign.guard.decision import enforced
from valign.guard.records import Attempt, GuardDecision, GuardResult
from valign.guard.rewriting.acceptance import Acceptor
from valign.guard.rewriting.policy_rewriter import PolicyRewriter, Rewriter, RewriteRequest, role_of
from valign.guard.waterfall import Waterfall
from valign.policy import Policy

TEMPLATES = 8  # proposals of the policy rewriter that are tried when nothing better was accepted


class RewritingLoop:
    """Finds a prompt that passes every stage in place of one that should be rewritten.

    Args:
        waterfall: What a proposal must pass.
        rewriter: Proposes captions; None blocks whatever should be rewritten.
        acceptor: What a proposal must keep of the prompt.
        template: The last resort, whatever its proposals keep.
    """

    def __init__(
        self, policy: Policy, waterfall: Waterfall, rewriter: Rewriter | None, acceptor: Acceptor, template: PolicyRewriter
    ) -> None:
        self._policy, self._waterfall = policy, waterfall
        self._rewriter, self._acceptor, self._template = rewriter, acceptor, template

    def finish(self, decision: GuardDecision, prompt: str) -> GuardResult:
        """The prompt itself if it is allowed, an accepted rewrite, or None; with every attempt."""
        if decision.action == "allow":
            return GuardResult(decision=decision, prompt=prompt)
        if decision.action == "block" or self._rewriter is None:
            return GuardResult(decision=decision, prompt=None)
        request, calls = self._request(decision, prompt), decision.chat_calls
        attempts: list[Attempt] = []
        for number in range(self._policy.guard.max_rewrites):
            calls += self._rewriter.uses_chat
            attempt = self._attempt(self._rewriter, request, number)
            if attempt is None:
                break
            attempts.append(attempt)
            if attempt.accepted:
                break
        if not any(attempt.accepted for attempt in attempts):
            found = next((text for text in self._templates(request) if self._waterfall.passes(text)), None)
            if found is not None:
                attempts.append(Attempt(role="template", source=self._template.name, text=found, accepted=True))
        accepted = next((attempt.text for attempt in attempts if attempt.accepted), None)
        return GuardResult(decision=replace(decision, chat_calls=calls), prompt=accepted, attempts=tuple(attempts))

    def _request(self, decision: GuardDecision, prompt: str) -> RewriteRequest:
        finding = enforced(self._policy, next(one for one in decision.trace if one.stage == decision.stop and one.fired))
        return RewriteRequest(
            prompt=prompt,
            role=role_of(finding, decision.intent),
            finding=finding,
            intent=decision.intent,
            suspicious=cache(self._waterfall.suspicious),
        )

    def _attempt(self, rewriter: Rewriter, request: RewriteRequest, number: int) -> Attempt | None:
        try:
            text = rewriter.propose(request, number)
        except Exception as error:
            reason = f"failed: {type(error).__name__}"
            return Attempt(role=request.role, source=rewriter.name, text="", accepted=False, reason=reason)
        if text is None:
            return None
        found = self._acceptor(request.prompt, text)
        if request.role == "sign":  # a sign shows other words than the prompt, so only its form is judged
            found = replace(found, reason=self._acceptor.form(request.prompt, text))
        reason = found.reason or ("" if self._waterfall.passes(text) else "does not pass the guard")
        return Attempt(
            role=request.role,
            source=rewriter.name,
            text=text,
            accepted=not reason,
            reason=reason,
            keep_words=found.keep_words,
            keep_meaning=found.keep_meaning,
        )

    def _templates(self, request: RewriteRequest) -> list[str]:
        """The policy's own proposals, whatever they keep. A finding without a category (a chat judge's) has the sign only."""
        if request.role == "harm" and request.finding.category not in self._policy.category_ids():
            return []
        if request.role == "values" and request.finding.rule not in {norm.id for norm in self._policy.norms}:
            return ["people standing quietly in a friendly place"]
        return list(self._template.proposals(request))[:TEMPLATES]
