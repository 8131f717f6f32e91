"""The rows beside the training rows, and which objective may have which of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_range
from valign.data.chats import ChatPair
from valign.data.tasks.base import Kind, TaskRow
from valign.objectives import AGL, SafeAlign, SafetyRecovery, StarDSS, StaticShaping, TokenObjective
from valign.text.refusals import reads_as_refusal

# scores in [0, 1], 1 is safe, of conversations (ending with a user's turn) with the beginning of an answer each
PartialGuard = Callable[[Sequence[tuple[Sequence[Mapping[str, str]], str]]], Float[Tensor, " partial"]]
WORDS = ("causal-lm", "chat")  # kinds whose answers are words


@dataclass(frozen=True, kw_only=True)
class PreserveData:
    """Rows of the task's own form.

    Args:
        calibration: What is to stay: safe answers, refusals of a chat model, safe images of risky prompts.
        pairs: Of chats: a safe and an unsafe answer each; ``calibration`` is then their safe side.
        forget: What is to be unlearned.
        guard: Scores beginnings of answers.
        guard_name: Of the guard, for the run's record.
        rows_per_step: Of calibration or forget rows; None: as many as training rows.
        refusals: Further words with which a refusal may begin.
    """

    calibration: tuple[TaskRow, ...] = ()
    pairs: tuple[ChatPair, ...] = ()
    forget: tuple[TaskRow, ...] = ()
    guard: PartialGuard | None = None
    guard_name: str = ""
    rows_per_step: int | None = None
    refusals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rows_per_step is not None:
            check_range("PreserveData.rows_per_step", self.rows_per_step, low=1)
        if self.pairs and not self.calibration:
            object.__setattr__(self, "calibration", tuple(pair.safe for pair in self.pairs))

    def record(self) -> dict[str, Any]:
        """Contents, for the hash of a run's inputs."""
        pairs = [[pair.safe.content, pair.unsafe.content] for pair in self.pairs]
        rows = [[row.content for row in part] for part in (self.calibration, self.forget)]
        return {"pairs": pairs, "calibration": rows[0], "forget": rows[1], "guard": self.guard_name}


def check_plan(
    objectives: Mapping[str, Any],
    data: PreserveData,
    kind: Kind,
    *,
    forgetting_start: bool = False,
    worded_calibration: bool | None = None,
) -> None:
    """Refuse what cannot work together, with the reason.

    Args:
        forgetting_start: The adapter's own start reads the rows to forget.
        worded_calibration: Answers to calibration rows are distributions over words; None: if those of ``kind`` are.
    Raises: UserError.
    """
    tokens = {name: one for name, one in objectives.items() if isinstance(one, TokenObjective)}
    by_rows = {rows: [name for name, one in tokens.items() if one.rows == rows] for rows in ("training", "forget")}
    for rows, names in by_rows.items():
        if len(names) > 1:
            raise UserError(f"--preserve must have one objective on the {rows} rows, got {' and '.join(names)}. Choose one.")
    if by_rows["training"] and "safety-recovery" in objectives:
        raise UserError(
            f"--preserve must not join safety-recovery with {by_rows['training'][0]}, which needs a reference for every row. "
            "Train with one after the other."
        )
    for name in by_rows["forget"]:
        if objectives[name].retain_weight == 0 and by_rows["training"]:
            raise UserError(
                f"--preserve {name} has retain_weight 0, so {by_rows['training'][0]} would have no row. Set {name}.retain_weight=1."
            )
    for name, one in objectives.items():
        _check_kind(name, one, kind, kind in WORDS if worded_calibration is None else worded_calibration)
    wants = [name for name, one in objectives.items() if isinstance(one, AGL) or getattr(one, "rows", "") == "calibration"]
    pairs = [name for name, one in objectives.items() if _wants_pairs(one)]
    guards = [name for name, one in objectives.items() if isinstance(one, StarDSS | StaticShaping)]
    _both("--calibration", data.calibration or data.pairs, [*wants, *pairs], "rows of what is to stay")
    _both("--forget", data.forget, by_rows["forget"], "rows to be unlearned")
    _both("--guard", data.guard, guards, "a guard that scores answers")
    if forgetting_start and not data.forget:
        raise UserError("The adapter fila must have rows to forget, got none. Give --forget FILE and --preserve ihl.")
    if pairs and not data.pairs:
        raise UserError(
            f"--calibration must hold pairs (columns prompt, chosen, rejected) for {pairs[0]}, got chats with one answer. "
            "The chosen answer is the safe one."
        )
    if kind == "chat" and data.calibration:
        _check_refusals(data)


def _check_kind(name: str, objective: Any, kind: Kind, worded_calibration: bool) -> None:
    chats = isinstance(objective, SafeAlign | SafetyRecovery | StarDSS | StaticShaping)
    if chats and kind != "chat":
        raise UserError(f"--preserve {name} must go with --task chat, got {kind}. It reads conversations.")
    words = isinstance(objective, TokenObjective) and not (kind == "diffusion" and name == "kl")
    worded = worded_calibration if getattr(objective, "rows", "calibration") == "calibration" else kind in WORDS
    if words and not worded:
        raise UserError(f"--preserve {name} must go with a language model, got {kind}. Use agl, which works on weights.")
    if isinstance(objective, AGL) and objective.fisher_labels == "model" and not worded:
        raise UserError(f"AGL.fisher_labels must be data for {kind}, got 'model'. Only a language model's answers can be drawn.")


def _wants_pairs(objective: Any) -> bool:
    return isinstance(objective, SafetyRecovery) or (isinstance(objective, SafeAlign) and objective.strategy == "B")


def _both(flag: str, given: object, wanting: Sequence[str], what: str) -> None:
    if wanting and not given:
        raise UserError(f"--preserve {wanting[0]} must have {what}, got none. Give {flag}.")
    if given and not wanting:
        raise UserError(f"{flag} must go with an objective that reads it, got none. Leave it out, or name one by --preserve.")


def _check_refusals(data: PreserveData) -> None:
    answers = [row.turns[-1][1] for row in data.calibration]  # type: ignore[attr-defined]
    if not any(reads_as_refusal(answer, data.refusals) for answer in answers):
        raise UserError(
            f"--calibration must hold refusals, got 0 among {len(answers)} answers. Add risky requests with the answers that the "
            "model is to keep, or name the words with which yours begin by --refusal."
        )
