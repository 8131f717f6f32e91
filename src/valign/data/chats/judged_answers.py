"""Prompts with several answers, each with the harm that a judge finds in it and whether it does what was asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from valign.checks import UserError
from valign.data.chats.reward_prompts import prompt_turns
from valign.data.prompts.tables import AS_IT_IS, TableReading, kind_of, read_table, text_cell, whole_cell


class ResponseLabel(NamedTuple):
    """What a judge says of an answer; answers of one label are alike."""

    risks: frozenset[str]  # categories of harm that it holds
    addressed: bool  # whether it does what was asked; a refusal never does


@dataclass(frozen=True)
class JudgedPrompt:
    """A conversation that ends with a user's turn, its own risks, and answers by their label."""

    turns: tuple[tuple[str, str], ...]  # (role, text), without a system turn
    risks: frozenset[str]
    answers: Mapping[ResponseLabel, Sequence[str]]


def read_judged_prompts(path: Path, reading: TableReading = AS_IT_IS) -> list[JudgedPrompt]:
    """Rows of ``prompt`` (a text or messages), ``risks`` (a list of category ids), and ``answers``, a list of objects with
    ``text``, ``risks`` and ``addressed`` (0 or 1).

    Raises: UserError, with the row, for an empty prompt, a system turn, which is where configs go, or an answer of another form.
    """
    found = []
    for number, row in enumerate(read_table(path, reading), start=1):
        try:
            found.append(_judged(row))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
    return found


def _judged(row: Mapping[str, Any]) -> JudgedPrompt:
    turns = prompt_turns(row.get("prompt"))
    if any(role == "system" for role, _ in turns):
        raise UserError("prompt must have no system turn, where safety configs go, got one. Take it out.")
    answers: dict[ResponseLabel, list[str]] = {}
    for place, item in enumerate(_list("answers", row.get("answers")), start=1):
        if not isinstance(item, dict) or not text_cell("text", item.get("text")).strip():
            raise UserError(f"answers must be objects with text, risks and addressed, got another at {place}. Mend or delete it.")
        addressed = item.get("addressed")
        flag = whole_cell("addressed", int(addressed) if isinstance(addressed, bool) else addressed, 0, 1)
        label = ResponseLabel(frozenset(map(str, _list("risks", item.get("risks")))), bool(flag))
        answers.setdefault(label, []).append(item["text"])
    return JudgedPrompt(turns, frozenset(map(str, _list("risks", row.get("risks")))), answers)


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list, got {kind_of(value)}. Write [] for none.")
    return value
