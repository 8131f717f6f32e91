"""RED-EVAL run on a chat model or an endpoint: every template on every question bank, in one folder that resumes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.evaluation.chats.answers import ask_all
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint
from valign.evaluation.chats.judges import ChatJudge
from valign.evaluation.chats.red_eval import (
    AttackSuccess,
    RedTemplate,
    annotate,
    attack_success,
    filled_cases,
    mean_success,
    without_thought,
)
from valign.evaluation.chats.systems import ChatSystem
from valign.files import hash_value, read_json, write_json
from valign.recipes.check_chats import judge_all
from valign.runs import Run, versions


def red_eval(
    system: ChatSystem, banks: Mapping[str, Sequence[ChatCase]], templates: Sequence[RedTemplate], judge: ChatJudge, out: Path
) -> dict[str, Any]:
    """Ask, judge, count; returns what ``out/red-eval.json`` holds. Answers and verdicts lie beside it.

    Raises: UserError for no template, an empty bank, or names that stand twice; and if no answer under a template can be annotated.
    """
    names = [template.name for template in templates]
    if not names or len(set(names)) < len(names):
        raise UserError(f"Templates must have names of their own, at least one, got {', '.join(names) or 'none'}. Rename a file.")
    empty = [name for name, bank in banks.items() if not bank]
    if empty or not banks:
        raise UserError(f"Question banks must hold questions, got none in {', '.join(empty) or 'no bank'}.")
    run = Run.open(
        out,
        step="red-eval",
        recipe={"templates": {one.name: hash_value(one.text) for one in templates}, "judge": asdict(judge.card), **system.settings},
        inputs={"model": system.fingerprint, **{name: cases_fingerprint(bank) for name, bank in banks.items()}},
    )
    if run.done and (out / "red-eval.json").exists():
        return dict(read_json(out / "red-eval.json"))
    found: list[AttackSuccess] = []
    means: dict[str, Any] = {}
    for name, bank in banks.items():
        entries = []
        for template in templates:
            folder = out / "answers" / name / template.name
            replies = ask_all(system, filled_cases(bank, template), folder)
            cut = [without_thought(reply) for reply in replies]
            entries.append(annotate(replies, cut, judge_all(judge, bank, cut, folder)))
            found.append(attack_success(name, template.name, entries[-1]))
        means[name] = asdict(mean_success(entries))
    record = {
        "model": system.name,
        "judge": asdict(judge.card),
        "rates": [asdict(one) for one in found],
        "banks": means,
        "mean": sum(one["value"] for one in means.values()) / len(means),
        "notes": _notes(judge, found),
        "versions": versions(),
    }
    write_json(out / "red-eval.json", record)
    run.finish(mean=record["mean"])
    return dict(read_json(out / "red-eval.json"))


def _notes(judge: ChatJudge, found: Sequence[AttackSuccess]) -> list[str]:
    """What a reader must know of the judge."""
    notes, same = [], {one.harmful == 0 for one in found if not one.harmful or not one.unharmful}
    if judge.card.harm is None:
        notes.append(f"The error of judge {judge.card.name} about harm was never measured: rates are what it saw.")
    if len(same) == 1 and all(not one.harmful or not one.unharmful for one in found):
        word = "harmless" if same.pop() else "harmful"
        notes.append(f"Judge {judge.card.name} called every answer {word}: it is not shown that it tells harm from its absence.")
    return notes
