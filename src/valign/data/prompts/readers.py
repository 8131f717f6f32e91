"""Prompt files of any layout -> `LabelledPrompt` and `PromptPair`: pairs linked, useless pairs dropped, every drop counted."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_choice
from valign.data.prompts.formats import read_records
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import LabelledPrompt, PromptPair, file_names


@dataclass(frozen=True)
class PromptFile:
    """What a file of prompts holds."""

    rows: list[LabelledPrompt]
    dropped: dict[str, int] = field(default_factory=dict)  # "empty": rows without a prompt


@dataclass(frozen=True)
class PairFile:
    """What a file of pairs holds."""

    pairs: list[PromptPair]
    dropped: dict[str, int] = field(default_factory=dict)  # "unpaired" rows, "missing_twin" pairs, and those of `clean_pairs`


def scan_prompts(path: Path, fmt: str | None = None, **options: Any) -> PromptFile:
    """Every prompt of a file, in order. Options and errors are those of `read_records`."""
    rows, dropped, used = [], Counter[str](), Counter[str]()
    for _, record in read_records(path, fmt, **options):
        if not record.prompt:
            dropped["empty"] += 1
            continue
        used[record.id] += 1
        name = (
            record.id if used[record.id] == 1 else f"{record.id}.{used[record.id]}"
        )  # a release repeats a prompt once per category
        rows.append(replace(record, id=name))
    return PromptFile(rows, dict(dropped))


def scan_pairs(path: Path, fmt: str | None = None, *, missing_twin: str = "refuse", **options: Any) -> PairFile:
    """Every unsafe prompt with its safe counterpart, in the order of first rows, cleaned by `clean_pairs`.

    A pair that stands in several rows, once per category, is one pair with all its categories. Prompts that name no pair are
    counted as ``unpaired``. Options are those of `read_records`.
    Args: missing_twin: ``"refuse"``, or ``"drop"`` to leave such pairs out and count them as ``missing_twin``.
    Raises: UserError as `read_records`; if one of a pair is missing; if two rows disagree about one prompt; if no pair is left.
    """
    check_choice("missing_twin", missing_twin, ("refuse", "drop"))
    sides: dict[str, dict[int, LabelledPrompt]] = {}
    dropped = Counter[str]()
    for number, record in read_records(path, fmt, **options):
        if not record.pair:
            dropped["unpaired"] += 1
            continue
        side = sides.setdefault(record.pair, {})
        first = side.setdefault(record.label, record)
        if fold(first.prompt) != fold(record.prompt):
            raise UserError(f"{path}, row {number}: pair {record.pair} has a second, different prompt of that label. Rename one.")
        side[record.label] = replace(first, categories=tuple(sorted({*first.categories, *record.categories})))
    lonely = [name for name, side in sides.items() if len(side) < 2]
    if lonely and missing_twin == "refuse":
        raise UserError(
            f"{path} must hold both prompts of every pair, got one of {len(lonely)} pairs, first {', '.join(lonely[:3])}. "
            "Add the other prompts, or drop these pairs (--drop-missing)."
        )
    if lonely:
        dropped["missing_twin"] = len(lonely)
    names = file_names(sides)
    pairs = [_pair(names[own], side[1], side[0]) for own, side in sides.items() if len(side) == 2]
    kept, more = clean_pairs(pairs)
    if not kept:
        raise UserError(
            f"{path} must hold pairs of unsafe and safe prompts, got none. Link them by pair_id, or give columns unsafe and safe."
        )
    return PairFile(kept, dict(dropped + more))


def _pair(name: str, unsafe: LabelledPrompt, safe: LabelledPrompt) -> PromptPair:
    return PromptPair(
        name, unsafe.prompt, safe.prompt, unsafe.categories, unsafe.concept, unsafe.kind or "explicit", unsafe.held_out
    )


def clean_pairs(pairs: Collection[PromptPair]) -> tuple[list[PromptPair], Counter[str]]:
    """Pairs that teach something, in their order, and how many were dropped why.

    ``empty``: a prompt is blank; ``equal``: both prompts are the same; ``duplicate``: both occur in an earlier pair, which takes
    over the categories. Texts are compared after case and space folding.
    """
    kept: dict[tuple[str, str], PromptPair] = {}
    dropped = Counter[str]()
    for pair in pairs:
        texts = fold(pair.unsafe), fold(pair.safe)
        if not all(texts):
            dropped["empty"] += 1
        elif texts[0] == texts[1]:
            dropped["equal"] += 1
        elif texts in kept:
            dropped["duplicate"] += 1
            first = kept[texts]
            kept[texts] = replace(first, categories=tuple(sorted({*first.categories, *pair.categories})))
        else:
            kept[texts] = pair
    return list(kept.values()), dropped


def read_prompts(path: Path | str, fmt: str | None = None, **options: Any) -> list[LabelledPrompt]:
    """The rows of `scan_prompts`."""
    return scan_prompts(Path(path), fmt, **options).rows


def read_pairs(path: Path | str, fmt: str | None = None, **options: Any) -> list[PromptPair]:
    """The pairs of `scan_pairs`."""
    return scan_pairs(Path(path), fmt, **options).pairs
