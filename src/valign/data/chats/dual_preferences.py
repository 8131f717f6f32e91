"""Two answers to a prompt, with which is more helpful and which is safer (BeaverTails) -> `DualPreference`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.chats.layouts import listed_turns
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, number_cell, read_table, text_cell, whole_cell
from valign.progress import console


@dataclass(frozen=True)
class DualPreference:
    """``better`` and ``safer`` are places in ``answers``; ``harmless`` is signed: above 0 is safe, below 0 harmful."""

    turns: tuple[tuple[str, str], ...]  # (role, text), a user's last
    answers: tuple[str, str]
    better: int
    safer: int
    harmless: tuple[float, float]

    def chat(self, place: int) -> list[dict[str, str]]:
        """The whole chat with one of the answers."""
        said = [{"role": role, "content": text} for role, text in self.turns]
        return [*said, {"role": "assistant", "content": self.answers[place]}]


def read_dual_preferences(path: Path, reading: TableReading = AS_IT_IS) -> list[DualPreference]:
    """Rows of ``prompt`` (or ``question``), ``response_1``, ``response_2``, ``more_helpful_response_id``, ``safer_response_id``
    and, of each answer k, ``response_k_harmless_rate``, or ``is_response_k_safe`` (0 or 1).

    Rows whose ids are neither 1 nor 2 say nothing, and are left out with a remark.
    Raises: UserError, with the row, for a missing cell; if no row is left.
    """
    found, silent, rows = [], 0, read_table(path, reading)
    for number, row in enumerate(rows, start=1):
        try:
            made = _preference(row)
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        silent += made is None
        found += [] if made is None else [made]
    if silent:
        console.print(f"{silent} of {len(rows)} rows of {path} name neither answer 1 nor 2: they are left out", style="yellow")
    if not found:
        raise UserError(f"{path} must have at least one row that prefers answer 1 or 2, got none of {len(rows)}.")
    return found


def _preference(row: dict[str, Any]) -> DualPreference | None:
    asked = row.get("prompt") if not is_blank(row.get("prompt")) else row.get("question")
    turns = tuple(listed_turns("prompt", "role", "content")({"prompt": asked})) if isinstance(asked, list) else None
    said = turns or (("user", text_cell("prompt", asked)),)
    answers = tuple(text_cell(f"response_{k}", row.get(f"response_{k}")) for k in (1, 2))
    if not said[-1][1].strip() or not all(answer.strip() for answer in answers):
        raise UserError("must have a prompt, response_1 and response_2, got an empty one. Mend or delete the row.")
    ids = [whole_cell(name, row.get(name, 0), 0, 2**31) for name in ("more_helpful_response_id", "safer_response_id")]
    if not set(ids) <= {1, 2}:
        return None
    return DualPreference(said, answers, ids[0] - 1, ids[1] - 1, (_harmless(row, 1), _harmless(row, 2)))  # type: ignore[arg-type]


def _harmless(row: dict[str, Any], k: int) -> float:
    rate, safe = row.get(f"response_{k}_harmless_rate"), row.get(f"is_response_{k}_safe")
    if not is_blank(rate):
        return number_cell(f"response_{k}_harmless_rate", rate)
    if is_blank(safe):
        raise UserError(f"must have response_{k}_harmless_rate or is_response_{k}_safe, got neither. Fill one in.")
    return 1.0 if whole_cell(f"is_response_{k}_safe", int(safe) if isinstance(safe, bool) else safe, 0, 1) else -1.0
