"""Prompt files of any layout -> `LabelledPrompt` and `PromptPair`: pairs linked, useless pairs dropped, every drop counted."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_choice
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import LabelledPrompt, PromptPair, file_names
from valign.data.prompts.records import prompt_records, why_not


@dataclass(frozen=True)
class PromptFile:
    """What a file of prompts holds."""

    rows: list[LabelledPrompt]
    dropped: dict[str, int] = field(default_factory=dict)  # "empty" rows, "unlabelled" ones, those of "other_harm"


@dataclass(frozen=True)
class PairFile:
    """What a file of pairs holds."""

    pairs: list[PromptPair]
    dropped: dict[str, int] = field(default_factory=dict)  # "unpaired" rows, "missing_twin" pairs, and those of `clean_pairs`


def scan_prompts(path: Path, layout: str | None = None, **options: Any) -> PromptFile:
    """Every prompt of a file, in order. Options and errors are those of `prompt_records`.

    Raises: UserError also if the file says of no prompt whether it is safe.
    """
    rows: list[LabelledPrompt] = []
    dropped, used = Counter[str](), Counter[str]()
    for _, record in prompt_records(path, layout, **options):
        if reason := why_not(record):
            dropped[reason] += 1
            continue
        assert isinstance(record, LabelledPrompt)
        used[record.id] += 1
        again = used[record.id] > 1  # a release repeats a prompt once per category
        rows.append(replace(record, id=f"{record.id}.{used[record.id]}") if again else record)
    if not rows and dropped["unlabelled"]:
        raise UserError(
            f"{path} must say which prompts are safe, got {dropped['unlabelled']} without a label. "
            "Fill label=0 if all are, or label=1 if none is."
        )
    return PromptFile(rows, dict(dropped))


def scan_pairs(path: Path, layout: str | None = None, *, missing_twin: str = "refuse", **options: Any) -> PairFile:
    """Every unsafe prompt with its safe counterpart, in the order of first rows, cleaned by `clean_pairs`.

    A pair that stands in several rows, once per category, is one pair with all its categories. Prompts that name no pair are
    counted as ``unpaired``. Options are those of `prompt_records`.
    Args: missing_twin: ``"refuse"``, or ``"drop"`` to leave such pairs out and count them as ``missing_twin``.
    Raises: UserError as `prompt_records`; if one of a pair is missing; if two rows disagree about one prompt; if no pair is left.
    """
    check_choice("missing_twin", missing_twin, ("refuse", "drop"))
    sides: dict[str, dict[int, LabelledPrompt]] = {}
    dropped = Counter[str]()
    for number, record in prompt_records(path, layout, **options):
        if not isinstance(record, LabelledPrompt):
            dropped[why_not(record)] += 1
            continue
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


def read_prompts(path: Path | str, layout: str | None = None, **options: Any) -> list[LabelledPrompt]:
    """The rows of `scan_prompts`."""
    return scan_prompts(Path(path), layout, **options).rows


def read_pairs(path: Path | str, layout: str | None = None, **options: Any) -> list[PromptPair]:
    """The pairs of `scan_pairs`."""
    return scan_pairs(Path(path), layout, **options).pairs
