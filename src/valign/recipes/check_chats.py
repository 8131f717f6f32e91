"""The check of chat models: both are asked, a judge reads the answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.journal import Journal
from valign.data.prompts.overlap import fold
from valign.evaluation import Suite
from valign.evaluation.chats.answers import CHUNK, ask_all
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint, suite_cases
from valign.evaluation.chats.judges import AnswerVerdict, ChatJudge, JudgeCard, PhraseJudge
from valign.evaluation.chats.systems import ChatReply, ChatSystem
from valign.evaluation.checking.decision import DriftLimits, check_sample
from valign.evaluation.checking.outcomes import PairedOutcome, answer_outcomes
from valign.files import read_json
from valign.policy import Policy
from valign.recipes.check_result import SIDES, CheckNames, CheckOptions, check_different, decided, write_check
from valign.runs import Run
from valign.worlds import CHAT_WORLDS


def check_chats(
    before: ChatSystem,
    after: ChatSystem,
    cases: Sequence[ChatCase],
    judge: ChatJudge,
    *,
    out: Path,
    limits: DriftLimits,
    names: CheckNames,
    show: bool = False,
) -> dict[str, Any]:
    """Ask both models, judge, decide, report. A finished check is returned as it is, an interrupted one goes on.

    Args: show: Print changed requests and answers in the report.
    Raises: UserError, before anything is asked, if there are too few requests for a verdict; and if ``out`` holds another check.
    """
    check_different(before.fingerprint, after.fingerprint)
    card = judge.card
    risky, harmless = (len({case.cluster for case in cases if case.risky == wanted}) for wanted in (True, False))
    check_sample(risky, harmless, limits, harm=card.harm, refusals=card.refusals)
    run = Run.open(
        out,
        step="check",
        recipe={**asdict(limits), "names": asdict(names), "judge": asdict(card), "show": show},
        inputs={"cases": cases_fingerprint(cases), "before": before.fingerprint, "after": after.fingerprint},
    )
    if run.done and (out / "check.json").exists():
        return dict(read_json(out / "check.json"))
    replies = {side: ask_all(system, cases, out / side) for side, system in zip(SIDES, (before, after))}
    seen = {side: judge_all(judge, cases, replies[side], out / side) for side in SIDES}
    outcomes = answer_outcomes(cases, seen["before"], seen["after"])
    blind = _blind_to_answers(card, cases, seen, limits)
    result = decided("chat", outcomes, limits, names, card, blind=blind)
    changed = _changed_answers(cases, outcomes, replies, show)
    return write_check(run, out, result, changed, shown=show)


def _blind_to_answers(
    card: JudgeCard, cases: Sequence[ChatCase], seen: Mapping[str, Sequence[AnswerVerdict]], limits: DriftLimits
) -> str:
    """Why the judge is not shown to see harm, as a sentence: it calls nothing harmful, though risky requests were not refused."""
    risky = [[one for case, one in zip(cases, seen[side], strict=True) if case.risky] for side in SIDES]
    answered = sum(one.coherent is not False and one.refused is False for one in risky[-1])
    if card.harm is not None or any(one.harmful for side in risky for one in side) or answered <= limits.max_drift * len(risky[-1]):
        return ""
    return (
        f"Judge {card.name} called no answer harmful on either side, though {answered} of {len(risky[-1])} risky requests were not "
        "refused after, and its own error was never measured: it is not shown that it would see harm. Measure it by --judge-labels."
    )


def judge_all(judge: ChatJudge, cases: Sequence[ChatCase], replies: Sequence[ChatReply], folder: Path) -> list[AnswerVerdict]:
    """Verdicts on all answers, kept on disk: a judge that is a model is slow."""
    journal = Journal(folder / "verdicts.jsonl")
    for first in range(0, len(cases), CHUNK):
        own = slice(first, first + CHUNK)
        if not all(case.id in journal.entries for case in cases[own]):
            found = judge.judge(cases[own], replies[own])
            journal.add(*({"key": case.id, **asdict(one)} for case, one in zip(cases[own], found, strict=True)))
    entries = (journal.entries[case.id] for case in cases)
    return [AnswerVerdict(entry["refused"], entry["harmful"], entry["coherent"]) for entry in entries]


@dataclass(frozen=True)
class MeasuredJudge:
    """A judge with an error that was measured afterwards."""

    inner: ChatJudge
    card: JudgeCard

    def judge(self, cases: Sequence[ChatCase], replies: Sequence[ChatReply]) -> list[AnswerVerdict]:
        return self.inner.judge(cases, replies)


def chat_cases(policy: Policy, tests: Suite | None, options: CheckOptions) -> tuple[list[ChatCase], str, ChatJudge]:
    """The requests, what they are called, and who judges them unless somebody else is named."""
    world = next((one for one in CHAT_WORLDS.values() if one.policy == policy.id), None)
    if tests is not None:
        return suite_cases(tests), tests.name, PhraseJudge()
    if world is None:
        raise UserError(
            f"--suite must name a table of requests with labels for chat models under the policy {policy.id}, got nothing. "
            f"Without one, name the policy of a chat world: {', '.join(one.policy for one in CHAT_WORLDS.values())}."
        )
    made = world.cases(options.samples or 300, options.seed)
    return made, f"{world.name} world, held-out wordings", world.judge()


def refuse_trained(cases: Sequence[ChatCase], texts: Collection[str]) -> None:
    """Raise UserError if a request was trained on: its answer would not be evidence. Texts are not printed."""
    trained = set(map(fold, texts))
    seen = [case.id for case in cases if fold(case.text) in trained]
    if seen:
        raise UserError(
            f"Requests must not be ones that were trained on, got {len(seen)} of {len(cases)}: {', '.join(seen[:5])}. "
            "Take them out of one of the two."
        )


def _changed_answers(
    cases: Sequence[ChatCase], outcomes: Sequence[PairedOutcome], replies: Mapping[str, Sequence[ChatReply]], show: bool
) -> list[dict[str, Any]]:
    found = []
    for place, (case, one) in enumerate(zip(cases, outcomes)):
        if one.known and one.before.bad != one.after.bad:
            entry: dict[str, Any] = {"id": case.id, "category": case.category, "text": case.text if show else ""}
            for side in SIDES:
                bad, said = getattr(one, side).bad, replies[side][place].text
                word = ("complied" if bad else "no harm") if case.risky else ("refused" if bad else "not refused")
                entry[side] = {"word": word, "text": (said or "no answer") if show else ""}
            found.append(entry)
    return found
