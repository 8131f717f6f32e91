"""Prompts written anew by a small trained language model (VPO, arXiv 2503.20491): a rewriter of the guard, and a stage before it.

The model gets one user turn, the same in training and in use: the task, and the request as quoted data. What it writes is
a proposal like any other: it must pass every stage of the guard, or is not used.
"""

import json
from dataclasses import dataclass, replace

from valign.checks import check_range
from valign.guard.guard import Guard
from valign.guard.records import Attempt, GuardResult
from valign.guard.rewriting.acceptance import recall
from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.methods import Method
from valign.models.language.chat import ChatModel, Message

METHOD = Method(
    slug="vpo",
    title="VPO: a small language model that makes prompts harmless, accurate and helpful",
    paper="arXiv 2503.20491",
    room="guard",
    entry="valign.guard.rewriting.optimizer:PromptOptimizer",
    fidelity="variant",
    note="images or short animations instead of videos; yes/no checks of them instead of VisionReward; our own instruction",
)
TASK = "Rewrite this image request so that it is harmless, accurate and helpful, in one line:"  # short: small models see it
PRINCIPLES = (  # what judges hold a rewrite against
    "Harmless: nothing violent, sexual, hateful, criminal or self-destructive, in its place "
    "something that fits the scene. Accurate: keep every wish that is harmless. Helpful: name subject, place, light and style "
    "plainly, and nothing needless."
)


def optimizer_turn(request: str) -> Message:
    """The user turn in which the model sees a request, quoted."""
    return {"role": "user", "content": f"{TASK}\n{json.dumps(request, ensure_ascii=False)}"}


@dataclass(frozen=True)
class PromptOptimizer:
    """As `Rewriter`: one proposal, whatever the role. ``chat`` is a model of ``valign train prompt-optimizer``."""

    chat: ChatModel
    name: str = "optimizer"
    uses_chat: bool = False  # it is small and local: not counted among the questions to a chat model

    def propose(self, request: RewriteRequest, attempt: int) -> str | None:
        return self.write(request.prompt) if attempt == 0 else None

    def write(self, request: str) -> str:
        """The new prompt. Raises: whatever the model raises."""
        return self.chat.complete([optimizer_turn(request)]).strip().strip('"').strip()


def optimize(guard: Guard, optimizer: PromptOptimizer, prompt: str, *, keep: float = 0.5) -> GuardResult:
    """The prompt as the optimizer writes it, if the guard lets that through; else the guard's own result for the prompt.

    A prompt that a block rule, the script or a failed stage blocks is never shown to the optimizer. A proposal that is not a
    caption, does not pass, keeps too little, or could not be made stands among the attempts with the reason.

    Args: keep: Share of the words of the guard's own result that a proposal must hold, in [0, 1]; 0 takes any that passes.
    Raises: as `Guard.check`; ValueError for another ``keep``.
    """
    check_range("optimize.keep", keep, low=0.0, high=1.0)
    decision = guard.check(prompt)
    if decision.action == "block":
        return guard.finish(decision, prompt)
    text, reason = "", ""
    try:
        text = optimizer.write(prompt)
    except Exception as error:  # a model that fails must not stop the guard
        reason = f"failed: {type(error).__name__}"
    found = guard.acceptor(prompt, text) if not reason else None
    own = guard.finish(decision, prompt)
    reason = reason or guard.acceptor.form(prompt, text) or ("" if guard.passes(text) else "does not pass the guard")
    if not reason and recall(own.prompt or "", text) < keep:
        reason = "keeps too few words of the request"
    attempt = Attempt(
        role="harm" if decision.action == "rewrite" else "quality",
        source=optimizer.name,
        text=text,
        accepted=not reason,
        reason=reason,
        keep_words=None if found is None else found.keep_words,
        keep_meaning=None if found is None else found.keep_meaning,
    )
    if attempt.accepted:
        return GuardResult(decision=decision, prompt=text, attempts=(attempt,))
    return replace(own, attempts=(attempt, *own.attempts))
