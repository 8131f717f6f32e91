"""Was safety lost? One model before and after a change, on the same prompts: safe, drifted or undecided, with a report.

`check` takes names as the command does; `check_chats` and `check_images` take what is loaded already.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.tables import AS_IT_IS, TableReading
from valign.evaluation import read_suite, refuse_overlap
from valign.evaluation.chats.judges import ANSWER_COLUMNS, ChatJudge, measure_judge, read_labelled_answers
from valign.evaluation.chats.systems import local_system
from valign.evaluation.checking.decision import DriftLimits
from valign.interfaces import SamplingConfig
from valign.policy import Policy
from valign.recipes.check_chats import MeasuredJudge, chat_cases, check_chats, refuse_trained
from valign.recipes.check_images import check_image_sample, check_images, image_systems, image_tests
from valign.recipes.check_result import SIDES, CheckNames, CheckOptions
from valign.recipes.subjects import find_subjects

__all__ = ["CheckNames", "CheckOptions", "check", "check_chats", "check_images"]


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
        cases, title, own = chat_cases(policy, tests, options)
        if trained_on:
            refuse_trained(cases, trained_on)
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
    check_image_sample(asked, evaluators.detector.card, limits)
    pair = image_systems(first, second, sampling or SamplingConfig(batch_size=16), device=device, anyway=anyway)
    return check_images(
        *pair,
        asked,
        evaluators,
        out=out,
        limits=limits,
        sampling=sampling or SamplingConfig(batch_size=16),
        names=CheckNames(suite=asked.name, **names),
    )
