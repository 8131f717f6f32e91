"""DRIFTCHECK run on models: answers, refusals, drift and its reduction, toxicity, and the KL divergence by token, in one folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_choice
from valign.evaluation.chats.answers import ask_all
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint
from valign.evaluation.chats.judges import ChatJudge
from valign.evaluation.chats.kl_profile import kl_profile
from valign.evaluation.chats.systems import ChatReply, local_system
from valign.evaluation.driftcheck.measures import ToxicityScorer, blindness, measure_systems, toxicity_scores
from valign.files import read_json, write_json
from valign.models.language.loading import LoadedChat, load_chat
from valign.recipes.check_chats import judge_all
from valign.recipes.subjects import Subject
from valign.runs import Run, versions

MAX_TOKENS = 128  # of an answer, as published


def driftcheck(
    subjects: Mapping[str, Subject],
    cases: Sequence[ChatCase],
    judge: ChatJudge,
    out: Path,
    *,
    plain: str = "",
    toxicity: ToxicityScorer | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 64,
    depth: int = 20,
    profiled: int = 64,
    device: str = "auto",
    anyway: bool = False,
) -> dict[str, Any]:
    """Measure every model against the first; returns what ``out/driftcheck.json`` holds. A killed run goes on where it stopped.

    Args:
        subjects: Chat models by name; the first is the aligned start.
        plain: Name of the plain fine-tuning that the others' drift is a share of.
        depth, profiled: Tokens of the KL profile, and how many of the start's answers to unsafe prompts it is taken over; 0 is off.
        anyway: Also take adapters whose records name another model.
    Raises: UserError for fewer than two models, another kind of model, or ``plain`` that is none of the others.
    """
    names = list(subjects)
    if len(names) < 2 or any(one.kind != "chat" for one in subjects.values()):
        raise UserError(f"driftcheck must get a start and at least one more chat model, got {', '.join(names) or 'none'}.")
    if plain:
        check_choice("plain", plain, names[1:])
    options: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "device": device, "anyway": anyway}
    systems = {name: local_system(name, one.folder, adapter=one.adapter, **options) for name, one in subjects.items()}
    same = _equal({name: one.fingerprint for name, one in systems.items()})
    if same:
        raise UserError(f"--model must name different models, got {same[0]} and {same[1]}, which are the same. Check the paths.")
    run = Run.open(
        out,
        step="driftcheck",
        recipe={"plain": plain, "depth": depth, "profiled": profiled, "judge": asdict(judge.card), "max_tokens": max_tokens},
        inputs={"cases": cases_fingerprint(cases), **{name: one.fingerprint for name, one in systems.items()}},
    )
    if run.done and (out / "driftcheck.json").exists():
        return dict(read_json(out / "driftcheck.json"))
    replies = {name: ask_all(system, cases, out / name) for name, system in systems.items()}
    verdicts = {name: judge_all(judge, cases, replies[name], out / name) for name in names}
    scores = None if toxicity is None else {name: toxicity_scores(toxicity, replies[name]) for name in names}
    found = measure_systems(cases, verdicts, plain=plain, toxicity=scores)
    unchanged = [name for name in names[1:] if [one.text for one in replies[name]] == [one.text for one in replies[names[0]]]]
    blind = blindness(found[0])
    found = [replace(one, reduction=None) if blind or one.name in unchanged else one for one in found]
    notes = [f"{name} answers every prompt as {names[0]} does: there is nothing to compare." for name in unchanged]
    record = {
        "start": names[0],
        "plain": plain,
        "judge": asdict(judge.card),
        "prompts": {"unsafe": sum(case.risky for case in cases), "safe": sum(not case.risky for case in cases)},
        "systems": [asdict(one) for one in found],
        "notes": [*([blind] if blind else []), *notes],
        "kl_profile": _profiles(subjects, cases, replies[names[0]], depth, profiled, device) if depth and profiled else {},
        "versions": versions(),
    }
    write_json(out / "driftcheck.json", record)
    run.finish(systems=names)
    return dict(read_json(out / "driftcheck.json"))


def _equal(fingerprints: Mapping[str, str]) -> tuple[str, str] | None:
    """Two names of one model; None if all differ."""
    first: dict[str, str] = {}
    for name, one in fingerprints.items():
        if one in first:
            return first[one], name
        first[one] = name
    return None


def _profiles(
    subjects: Mapping[str, Subject], cases: Sequence[ChatCase], replies: Sequence[ChatReply], depth: int, count: int, device: str
) -> dict[str, list[dict[str, Any]]]:
    """Of each model against the first, on the first's own answers to unsafe prompts."""
    answered = [(case, reply.text) for case, reply in zip(cases, replies) if case.risky and reply.text]
    chats = [[*case.messages, {"role": "assistant", "content": text}] for case, text in answered[:count]]
    if not chats:
        return {}
    (_, start), *others = subjects.items()

    def load(one: Subject) -> LoadedChat:
        return load_chat(one.folder, adapter=one.adapter, device=device, anyway=True)  # checked before the answers

    first = load(start)
    return {name: [asdict(one) for one in kl_profile(first, load(other), chats, depth=depth)] for name, other in others}
