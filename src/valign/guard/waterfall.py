"""The waterfall (VALOR, arXiv 2511.11693): block rules, script and stages in order, then the intent; a decision per prompt.

What follows from what is the table in `valign.guard.decision`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from valign.checks import UserError
from valign.guard.decision import GOOD, action_for, categories_of, enforced, ignored, suspected
from valign.guard.records import GuardDecision, Intent, Verdict
from valign.guard.rules.block_rule import BlockRuleStage
from valign.guard.rules.intention import IntentionRules, IntentJudge
from valign.guard.rules.language import LanguageStage, Translate
from valign.guard.rules.script import ScriptStage
from valign.guard.rules.second_opinion import SecondOpinion
from valign.guard.rules.syntax import SyntaxStage
from valign.guard.stages import Stage, run_stage, sound
from valign.policy import Action, Policy
from valign.text import clean
from valign.text.syntax import Traced

CONTROLS = frozenset(chr(code) for code in range(32)) - set("\t\n\r")


def require_prompt(policy: Policy, prompt: object) -> None:
    """Raises: TypeError if ``prompt`` is not text; UserError if it is blank, binary or longer than ``guard.max_chars``."""
    if not isinstance(prompt, str):
        raise TypeError(f"The prompt must be text, got {type(prompt).__name__}. Decode it first.")
    limit = policy.guard.max_chars
    if len(prompt) > limit:
        raise UserError(f"The prompt must have at most {limit} characters, got {len(prompt)}. Shorten it.")
    if not clean(prompt):
        raise UserError("The prompt must not be blank, got no visible character. Describe an image.")
    if CONTROLS & set(prompt) or any(0xD800 <= ord(char) <= 0xDFFF for char in prompt if not char.isascii()):
        raise UserError("The prompt must be text, got control characters or broken Unicode. Send plain UTF-8 text.")


class Waterfall:
    """Runs the stages over prompts and decides what is to be done with each.

    Args:
        stages: In the order in which they run.
        opinion: May clear a finding of the word level; None lets every listed word count.
        judge: Tells what was meant when a stage fired; None takes every finding as meant.
        reads: What the model's text encoder reads of each prompt; the stages judge that as well. None: all of it.
        translate: Into English, for the languages of which the policy wants that; None holds such prompts back.
        fingerprint: What decisions name as the rules; "" is the policy's own.
    Raises: UserError without stages; ValueError if two stages have one name.
    """

    def __init__(
        self,
        policy: Policy,
        stages: Sequence[Stage],
        *,
        opinion: SecondOpinion | None = None,
        judge: IntentJudge | None = None,
        reads: Callable[[Sequence[str]], list[str]] | None = None,
        translate: Translate | None = None,
        fingerprint: str = "",
    ) -> None:
        if not stages:
            raise UserError("Guard.stages must not be empty, got none. Name at least one under guard.stages in the policy.")
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ValueError(f"Guard.stages must have distinct names, got {', '.join(names)}. Rename one.")
        self._policy, self._stages, self._opinion, self._judge = policy, tuple(stages), opinion, judge
        self._block_rules, self._script = BlockRuleStage.from_policy(policy), ScriptStage(policy)
        self._fingerprint, self._reads = fingerprint or policy.fingerprint(), reads
        self.syntax, self._language = SyntaxStage(policy), LanguageStage(policy, translate)

    def policy_for(self, prompt: str) -> Policy:
        """The policy that decides about this prompt."""
        return self._policy

    def read(self, prompts: Sequence[str]) -> list[str]:
        """What the model reads of each prompt; all of it where no model was given."""
        return list(prompts) if self._reads is None else self._reads(prompts)

    def decide(self, prompts: Sequence[str], *, explain: bool = False) -> list[GuardDecision]:
        """A decision per prompt, each stage once for all prompts that are still undecided. Raises: as `require_prompt`."""
        for prompt in prompts:
            require_prompt(self._policy, prompt)
        return [self._decide(prompt, trace) for prompt, trace in zip(prompts, self.traces(prompts, explain=explain))]

    def traces(self, prompts: Sequence[str], *, explain: bool = False, chat: bool = True) -> list[list[Verdict]]:
        """Verdicts per prompt in the order in which stages ran: the block rules, the script, then the stages.

        No stage sees a prompt after its first finding. With ``explain`` all do, unless a block rule or the script fired.
        Args: chat: False leaves out stages that ask a chat model.
        """
        traces: list[list[Verdict]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        read = self.read(prompts)
        texts = list(map(self._texts, prompts))
        stages: list[Stage] = [self._block_rules, self.syntax, self._script, self._language]
        stages += [stage for stage in self._stages if chat or not getattr(stage, "uses_chat", False)]
        for stage in stages:
            for i, verdict in zip(alive, self._verdicts(stage, alive, prompts, texts, read)):
                plain = stage is self.syntax or stage is self._language  # has nothing to say of a plain English prompt
                if not plain or verdict.fired or verdict.message:
                    traces[i].append(verdict)
            alive = [i for i in alive if not self._ends(traces[i][-1], explain=explain)]
        return traces

    def _texts(self, prompt: str) -> list[Traced]:
        """What the stages judge of a prompt: what its syntax tells the model, and a translation."""
        english = self._language.translation(prompt)
        return [*self.syntax.texts(prompt), *([] if english is None else [Traced.made(english, 0)])]

    def passes(self, text: str, *, margin: float = 1.0) -> bool:
        """Whether the guard would let the text through as it is: no stage finds anything, and none fails.

        Args: margin: Share of its threshold that the score of a stage of meaning must stay below, in (0, 1].
        """
        try:
            require_prompt(self._policy, text)
        except UserError:
            return False
        trace = self.traces([text])[0]
        if any(_near(verdict, margin) or self._counts(verdict) for verdict in trace):
            return False
        return not any(self._block_rules.check(one.text, suspected(trace)).fired for one in self.syntax.texts(text))

    def risks(self, texts: Sequence[str]) -> list[float]:
        """What is found in each text relative to its threshold: the highest score of a stage of meaning over its threshold, and 1
        for every other finding. Below 1 the text passes all stages. Chat models are not asked."""
        return [self._risk(trace) for trace in self.traces(texts, explain=True, chat=False)]

    def _risk(self, trace: Sequence[Verdict]) -> float:
        meant = [one for one in trace if one.level == "semantic" and one.score is not None and one.threshold]
        ratios = [(one.score or 0.0) / (one.threshold or 1.0) for one in meant if self._counts(one) or not one.fired]
        return max(ratios, default=0.0) + sum(self._counts(one) for one in trace if one not in meant)

    def catches(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is a finding of any stage, whatever was meant. Chat models are not asked."""
        return [any(map(self._counts, trace)) for trace in self.traces(prompts, chat=False)]

    def suspicious(self, part: str) -> bool:
        """Whether a part of a prompt is a finding by itself. Chat models are not asked: they judge whole captions only."""
        return self.catches([part])[0]

    def _verdicts(
        self,
        stage: Stage,
        alive: Sequence[int],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Traced]],
        read: Sequence[str],
    ) -> list[Verdict]:
        """Of the prompts of those numbers: the worst over all texts that the model is told by each, and where these pass, of the
        part that it reads of the prompt: a word that is cut there may be another one."""
        if stage is self.syntax:
            return run_stage(stage, [prompts[i] for i in alive])
        found = self._verdicts_of(stage, [texts[i][0].text for i in alive])
        found = [_placed(verdict, texts[i][0]) for i, verdict in zip(alive, found)]
        more = [(place, one) for place, i in enumerate(alive) if not found[place].fired for one in texts[i][1:]]
        for (place, one), verdict in zip(more, self._verdicts_of(stage, [one.text for _, one in more])):
            if not found[place].fired and (verdict.fired or verdict.ranking > found[place].ranking):
                found[place] = _placed(verdict, one)
        cut = [place for place, i in enumerate(alive) if read[i] != prompts[i] and not found[place].fired]
        for place, verdict in zip(cut, self._verdicts_of(stage, [read[alive[place]] for place in cut])):
            if verdict.fired:
                found[place] = replace(verdict, span=None)  # a place in another text
        return found

    def _verdicts_of(self, stage: Stage, prompts: Sequence[str]) -> list[Verdict]:
        found = run_stage(stage, prompts)
        return self._opinion(prompts, found) if self._opinion is not None and stage.level == "word" else found

    def _ends(self, verdict: Verdict, *, explain: bool) -> bool:
        """Whether no further stage sees the prompt: after its first finding, or where all are to be shown, after a rule's."""
        return self._counts(verdict) and (not explain or verdict.level == "rule")

    def _counts(self, verdict: Verdict) -> bool:
        return verdict.fired and not ignored(self._policy, verdict)

    def _decide(self, prompt: str, trace: list[Verdict]) -> GuardDecision:
        finding = next((enforced(self._policy, one) for one in trace if self._counts(one)), None)
        rule = self._completed_rule(prompt, trace)
        if rule is not None:
            trace, finding = [*trace, rule], rule
        calls = sum(getattr(stage, "uses_chat", False) and any(one.stage == stage.name for one in trace) for stage in self._stages)
        intent: Intent = "unknown"
        action: Action
        if finding is None:
            action, error = "allow", _error(next((one for one in trace if one.outcome == "error"), None))
        elif self._judge is None or finding.outcome != "fire" or finding.level == "rule":
            action, error = action_for(self._policy, finding, intent), _error(finding)
        else:
            judged = self._judged(self._judge, prompt, trace, finding)
            trace, calls = [*trace, judged], calls + self._judge.uses_chat
            if judged.outcome == "error":
                intent, action, error = "harmful", self._policy.cases.judge_failure, judged.message
            else:
                intent = next((good for good in GOOD if good == judged.rule), "harmful")
                action, error = action_for(self._policy, finding, intent), ""
        return GuardDecision(
            action=action,
            flagged=finding is not None and intent not in GOOD,
            stop=finding.stage if finding else "",
            intent=intent,
            categories=categories_of(trace),
            trace=tuple(trace),
            prompt="" if finding is not None and finding.stage == self._block_rules.name else prompt,
            prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
            error=error,
            chat_calls=int(calls),
            policy=self._fingerprint,
        )

    def _completed_rule(self, prompt: str, trace: Sequence[Verdict]) -> Verdict | None:
        """The block rule that a word of the prompt completes with what any stage holds possible, at low limits: what such a rule is
        about must not be rewritten either."""
        texts = [one.text for one in self.syntax.texts(prompt)]
        if any(one.fired and one.level == "rule" for one in trace) or not any(map(self._block_rules.concerns, texts)):
            return None
        every = trace
        if any(map(self._counts, trace)):  # the stages behind the first finding have not been asked
            every = [*trace, *self.traces([prompt], explain=True, chat=False)[0]]
        rules = (self._block_rules.check(text, suspected(every)) for text in texts)
        return next((rule for rule in rules if rule.fired), None)

    def _judged(self, judge: IntentJudge, prompt: str, trace: Sequence[Verdict], finding: Verdict) -> Verdict:
        """The judge's verdict with its time; an exception is an error, and a good intent by rules may meet an objection."""
        start = perf_counter()
        try:
            verdict = sound(judge.judge(prompt, tuple(trace)), judge)
        except Exception as error:
            message = f"{judge.name} failed: {type(error).__name__}"
            verdict = Verdict(stage=judge.name, level="intention", outcome="error", message=message)
        verdict = replace(verdict, milliseconds=(perf_counter() - start) * 1000)
        if isinstance(judge, IntentionRules) and not verdict.fired:
            objection = judge.objection(prompt, finding, self.suspicious)
            if objection:
                return replace(verdict, outcome="fire", rule="harmful", message=objection)
        return verdict


def _placed(verdict: Verdict, text: Traced) -> Verdict:
    """The verdict on a text with its span in the prompt that the text came from."""
    if verdict.span is None or not text.origin:
        return verdict
    places = text.origin[slice(*verdict.span)]
    return replace(verdict, span=(min(places), max(places) + 1) if places else None)


def _near(verdict: Verdict, margin: float) -> bool:
    """Whether the score of a stage of meaning, though it passed, is not far enough below its threshold."""
    if margin >= 1.0 or verdict.level != "semantic" or verdict.score is None or verdict.threshold is None:
        return False
    return verdict.score >= margin * verdict.threshold


def _error(verdict: Verdict | None) -> str:
    return f"{verdict.stage}: {verdict.message}" if verdict is not None and verdict.outcome == "error" else ""
