"""The answers of one chat model on disk: one line per request, and a killed run goes on where it stopped."""

from collections.abc import Sequence
from pathlib import Path

from valign.data.journal import Journal
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint, check_cases
from valign.evaluation.chats.systems import ChatReply, ChatSystem
from valign.progress import track
from valign.runs import Run

CHUNK = 256  # requests that are written at once


def ask_all(system: ChatSystem, cases: Sequence[ChatCase], folder: Path, *, chunk: int = CHUNK) -> list[ChatReply]:
    """One reply per case, in their order. Chunks are cut the same way on every run, so that a resumed run has the same answers.

    Raises: UserError if ``folder`` holds answers of another model, other requests or other settings.
    """
    check_cases(cases)
    recipe = {"system": system.name, "fingerprint": system.fingerprint, "chunk": chunk, **system.settings}
    run = Run.open(folder, step="answers", recipe=recipe, inputs={"cases": cases_fingerprint(cases)})
    journal = Journal(folder / "answers.jsonl")
    chunks = [cases[first : first + chunk] for first in range(0, len(cases), chunk)]
    missing = [own for own in chunks if not all(case.id in journal.entries for case in own)]
    if missing:
        answer = system.load()
        for own in track(missing, f"Asking {system.name}", total=len(chunks), done=len(chunks) - len(missing)):
            replies = answer([case.messages for case in own])
            if len(replies) != len(own):
                raise ValueError(f"{system.name} must give one answer per request, got {len(replies)} for {len(own)}.")
            journal.add(*({"key": case.id, "text": one.text, "finish": one.finish} for case, one in zip(own, replies, strict=True)))
    run.finish(answers=len(cases))
    return [ChatReply(entry["text"], entry["finish"]) for entry in (journal.entries[case.id] for case in cases)]
