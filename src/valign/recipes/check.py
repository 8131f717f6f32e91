"""Was safety lost? One model before and after a change, on the same prompts: safe, drifted or undecided, with a report.

`check` takes names as the command does; `check_chats` and `check_images` take what is loaded already.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_options, option
from valign.data.journal import Journal
from valign.data.prompts.overlap import fold
from valign.data.prompts.tables import AS_IT_IS, TableReading
from valign.detectors import build
from valign.detectors.base import check_domain
from valign.evaluation import Evaluators, ReportOptions, Suite, System, evaluate, read_suite, refuse_overlap
from valign.evaluation.chats.answers import CHUNK, ask_all
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint, suite_cases
from valign.evaluation.chats.judges import (
    ANSWER_COLUMNS,
    AnswerVerdict,
    ChatJudge,
    JudgeCard,
    PhraseJudge,
    measure_judge,
    read_labelled_answers,
)
from valign.evaluation.chats.systems import ChatReply, ChatSystem, local_system
from valign.evaluation.checking.decision import Decision, DriftLimits, VerdictName, check_sample, decide
from valign.evaluation.checking.junit import write_junit
from valign.evaluation.checking.outcomes import PairedOutcome, answer_outcomes, image_outcomes
from valign.evaluation.checking.page import write_check_page
from valign.evaluation.paired_drift import EXACT, JudgeError
from valign.evaluation.policy_suite import policy_suite
from valign.evaluation.results import ImageResult, read_results
from valign.files import read_json, write_json
from valign.interfaces import DetectorCard, SamplingConfig
from valign.models.files.origin import model_origins
from valign.policy import Policy
from valign.recipes.subjects import Subject, find_subjects
from valign.runs import Run, versions
from valign.worlds import CHAT_WORLDS, WORLDS, find_oracle

SIDES = ("before", "after")
SCHEMA = 1  # of check.json


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is asked, and how."""

    samples: int | None = option(
        None,
        help="of a bundled world: requests per kind (chat; default 300, the most) or prompts per concept (shapes; default 10)",
        low=1,
    )
    max_tokens: int = option(128, help="length of an answer of a chat model, in tokens", low=1)
    answer_batch: int = option(64, help="answers of a chat model at a time", low=1)
    seed: int = option(0, help="random seed of the prompts of a world", low=0, rare=True)
    show_texts: bool | None = option(None, help="print changed requests and answers in the report; on only for stand-in harms")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found; ``exit_code`` is 0 safe, 1 drifted, 2 undecided."""

    kind: str
    before: str
    after: str
    policy: str
    suite: str
    judge: JudgeCard
    decision: Decision
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def verdict(self) -> VerdictName:
        return self.decision.verdict

    @property
    def exit_code(self) -> int:
        return self.decision.exit_code

    def record(self) -> dict[str, Any]:
        """JSON-able, as ``check.json`` holds it."""
        head = {"schema": SCHEMA, "verdict": self.verdict, "reason": self.decision.reason, "exit_code": self.exit_code}
        return head | {"needed": self.decision.needed} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class CheckNames:
    """What stands in the report."""

    before: str
    after: str
    policy: str
    suite: str


def check(
    before: str | Path,
    after: str | Path,
    policy: Policy,
    out: Path,
    *,
    base: str = "",
    suite: str = "",
    reading: TableReading = AS_IT_IS,
    layout: str | None = None,
    judge: ChatJudge | None = None,
    judge_labels: Path | None = None,
    detector: str | Sequence[str] = (),
    limits: DriftLimits | None = None,
    options: CheckOptions | None = None,
    sampling: SamplingConfig | None = None,
    trained_on: Collection[str] = (),
    device: str = "auto",
    anyway: bool = False,
) -> dict[str, Any]:
    """Compare two models, or a model and an adapter, by name; returns what ``out/check.json`` holds.

    Args:
        before, after, base: As `find_subjects` takes them.
        policy: Its world's prompts are asked where it has one and ``suite`` names no others.
        suite: A table of prompts with labels. Needed for chat models under another policy than a world's; a diffusion model is
            asked the policy's own concepts.
        reading, layout: How that table and the labels are read; see `read_suite`.
        judge: Of a chat model's answers; the oracle on the chat world's requests, phrases otherwise.
        judge_labels: Table of labelled answers on which the judge's error is measured first.
        detector: Of images, by name; a world's oracle for its models.
        trained_on: Texts that no prompt may be.
    Raises: UserError, before long work, for whatever cannot be checked; see `check_chats` and `check_images`.
    """
    limits, options = limits or DriftLimits(), options or CheckOptions()
    first, second = find_subjects(str(before), str(after), base=base)
    names: dict[str, str] = {"before": str(before), "after": str(after), "policy": policy.id}
    tests = read_suite(suite, layout, reading=reading.without(ANSWER_COLUMNS), known=policy.category_ids()) if suite else None
    if first.kind == "chat":
        cases, title, own = _chat_cases(policy, tests, options)
        if trained_on:
            _refuse_trained(cases, trained_on)
        chosen = judge or own
        if judge_labels is not None:
            chosen = MeasuredJudge(
                chosen, measure_judge(chosen, read_labelled_answers(judge_labels, reading.beside("judge-labels")))
            )
        answers: dict[str, Any] = {
            "max_tokens": options.max_tokens,
            "batch_size": options.answer_batch,
            "device": device,
            "anyway": anyway,
        }
        then, now = (local_system(side, one.folder, adapter=one.adapter, **answers) for side, one in zip(SIDES, (first, second)))
        stand_in = tests is None or tests.stand_in
        return check_chats(
            then,
            now,
            cases,
            chosen,
            out=out,
            limits=limits,
            names=CheckNames(suite=title, **names),
            show=stand_in if options.show_texts is None else options.show_texts,
        )
    if judge is not None or judge_labels is not None:
        raise UserError("A judge of answers has no effect on images, got one. Name a --detector.")
    asked, evaluators = image_tests(policy, tests, detector, first, options)
    if trained_on:
        refuse_overlap(asked, trained_on)
    _check_image_sample(asked, evaluators.detector.card, limits)
    pair = _image_systems(first, second, sampling or SamplingConfig(batch_size=16), device=device, anyway=anyway)
    return check_images(
        *pair,
        asked,
        evaluators,
        out=out,
        limits=limits,
        sampling=sampling or SamplingConfig(batch_size=16),
        names=CheckNames(suite=asked.name, **names),
    )


# ---- chats -----------------------------------------------------------------------------------------------------------


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
    _check_different(before.fingerprint, after.fingerprint)
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
    result = _result("chat", outcomes, limits, names, card, blind=blind)
    changed = _changed_answers(cases, outcomes, replies, show)
    return _write(run, out, result, changed, shown=show)


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


def _chat_cases(policy: Policy, tests: Suite | None, options: CheckOptions) -> tuple[list[ChatCase], str, ChatJudge]:
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


def _refuse_trained(cases: Sequence[ChatCase], texts: Collection[str]) -> None:
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


# ---- images ----------------------------------------------------------------------------------------------------------


def check_images(
    before: System,
    after: System,
    suite: Suite,
    evaluators: Evaluators,
    *,
    out: Path,
    limits: DriftLimits,
    sampling: SamplingConfig,
    names: CheckNames,
) -> dict[str, Any]:
    """Generate with both models at equal prompts and seeds, measure, decide, report; the images' own report is in ``evaluation/``.

    Raises: UserError, before any image, if there are too few prompts for a verdict; and what `evaluate` refuses.
    """
    _check_different(before.fingerprint, after.fingerprint)
    card = evaluators.detector.card
    _check_image_sample(suite, card, limits)
    run = Run.open(
        out,
        step="check",
        recipe={**asdict(limits), "names": asdict(names), "sampling": asdict(sampling), **evaluators.describe()},
        inputs={"suite": suite.fingerprint(), "before": before.fingerprint, "after": after.fingerprint},
        seed=sampling.seed,
    )
    if run.done and (out / "check.json").exists():
        return dict(read_json(out / "check.json"))
    title = ReportOptions(title="Before and after")
    summary = evaluate([before, after], suite, evaluators, out=out / "evaluation", sampling=sampling, report=title)
    found = read_results(out / "evaluation" / "results.parquet")
    sides = [[row for row in found if row.system == one.name and _counts(row, card)] for one in (before, after)]
    judge = JudgeCard(name=card.name, version=card.weights_sha256[:12], harm=detector_error(card), refusals=EXACT)
    outcomes = image_outcomes(*sides)
    own = {name: card.within(name) for name in suite.categories() if card.measures(name)}
    errors = {name: detector_error(one) for name, one in own.items() if one.better_than_chance() is not False}
    blind = ""
    if judge.harm is None and not any(row.harmful for rows in sides for row in rows):
        blind = (
            f"Detector {card.name} found no image harmful on either side, and its own error was never measured: it is not shown "
            "that it would see harm. Measure it: `valign detector evaluate --save`."
        )
    result = _result("diffusion", outcomes, limits, names, judge, notes=summary["notes"], by_category=errors, blind=blind)
    moved = [one for one in outcomes if one.known and one.before.bad != one.after.bad]
    changed = [{"id": one.id, "category": one.category, "text": "", **_image_words(one)} for one in moved]
    return _write(run, out, result, changed, shown=False)


def detector_error(card: DetectorCard) -> JudgeError | None:
    """A detector's own error as a judge's; None where it was never measured.

    Raises: UserError if the detector is no better than chance.
    """
    if card.sensitivity is None or card.specificity is None:
        return None
    return JudgeError(
        sensitivity=card.sensitivity, specificity=card.specificity, positives=card.positives, negatives=card.negatives
    )


def _counts(row: ImageResult, card: DetectorCard) -> bool:
    return row.benign or card.measures(row.category)


def _image_words(one: PairedOutcome) -> dict[str, dict[str, str]]:
    words = ("harmless", "harmful") if one.risky else ("an image", "no image")
    return {side: {"word": words[bool(getattr(one, side).bad)], "text": ""} for side in SIDES}


def _check_image_sample(suite: Suite, card: DetectorCard, limits: DriftLimits) -> None:
    texts = [{fold(one.prompt) for one in suite.prompts if wanted(one)} for wanted in (lambda p: not p.benign, lambda p: p.benign)]
    check_sample(len(texts[0]), len(texts[1]), limits, harm=detector_error(card), refusals=None)


def image_tests(
    policy: Policy, given: Suite | None, detector: str | Sequence[str], subject: Subject, options: CheckOptions
) -> tuple[Suite, Evaluators]:
    """The prompts, and what looks at the images; a world's own for its models.

    Raises: UserError where nobody is named who judges the images, or the detector cannot judge this model's.
    """
    origins = model_origins(subject.folder)
    world = next((one for one in WORLDS.values() if set(one.origins) & set(origins)), None)
    if not detector and world is None:
        raise UserError("--detector must name what judges the images, got nothing. See `valign detector list`.")
    judge = build(detector, oracle=find_oracle) if detector else world.oracle()  # type: ignore[union-attr]
    check_domain(judge.card, origins, subject.name)
    if given is not None:
        tests = given
    elif world is not None and world.policy == policy.id:
        tests = world.suite(**({} if options.samples is None else {"per_concept": options.samples}), seed=options.seed)
    else:
        tests = policy_suite(policy)
    return tests, Evaluators(judge, fidelity=world.oracle() if world else None, clip=world.clip() if world else None)


def _image_systems(
    first: Subject, second: Subject, sampling: SamplingConfig, *, device: str, anyway: bool
) -> tuple[System, System]:
    from valign.evaluation import adapter_system, base_system
    from valign.models.diffusion.loading import load_model

    loaded = {folder: load_model(folder, device=device) for folder in dict.fromkeys((first.folder, second.folder))}

    def system(side: str, one: Subject) -> System:
        if one.adapter is None:
            return base_system(loaded[one.folder], sampling, name=side)
        return adapter_system(loaded[one.folder], one.adapter, sampling, name=side, anyway=anyway)

    return system("before", first), system("after", second)


# ---- both ------------------------------------------------------------------------------------------------------------


def _check_different(before: str, after: str) -> None:
    """Raise UserError for one fingerprint on both sides: a model compared with itself shows nothing."""
    if before == after:
        raise UserError("before and after must be two models, got the same twice: there is nothing to compare. Check the paths.")


def _result(
    kind: str,
    outcomes: Sequence[PairedOutcome],
    limits: DriftLimits,
    names: CheckNames,
    judge: JudgeCard,
    *,
    notes: Sequence[str] = (),
    by_category: Mapping[str, JudgeError | None] | None = None,
    blind: str = "",
) -> CheckResult:
    decision = decide(outcomes, limits, harm=judge.harm, refusals=judge.refusals, by_category=by_category, blind=blind)
    return CheckResult(kind=kind, judge=judge, decision=decision, notes=tuple(notes), **asdict(names))


def _write(run: Run, out: Path, result: CheckResult, changed: Sequence[Mapping[str, Any]], *, shown: bool) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(result.record()))
    write_junit(out / "junit.xml", record)
    write_check_page(out / "report.html", record, changed, shown=shown)
    write_json(out / "check.json", record)
    run.finish(verdict=record["verdict"])
    return record
