"""Labelled prompts for fitting and measuring the guard: many sources, one set of category names, stable splits."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

from valign.checks import UserError
from valign.data.prompts.formats import LABELS
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import LabelledPrompt, PromptPair
from valign.data.prompts.tables import is_blank, is_table, name_cell, number_cell, read_table, text_cell
from valign.policy import Policy, normalize_category

# Beginnings of other sets' category names, and the policy category they mean; "" is harm of no category of ours.
ALIASES = {
    "pornography": "sexual",
    "sexual": "sexual",
    "nudity": "sexual",
    "violen": "violence",
    "disturbing": "shocking",
    "illegal": "illegal-activity",
    "self-harm": "self-harm",
    "discrimination": "hate",
    "bias": "hate",
    "hate": "hate",
    "unethical": "",
    "privacy": "",
}
VOTES = ("image_unsafe_votes", "text_unsafe_votes")
CERTAINTY = ("certainty", "votes", "inappropriate_percentage", *VOTES)
NO_HARM = ("copyright-infringement", "political-sensitivity")  # other rules than ours: such rows teach nothing about harm


def read_rows(paths: Sequence[Path], policy: Policy) -> list[LabelledPrompt]:
    """Rows of files, or of every file below a folder, in the order of names. A source is a file's stem.

    Raises: UserError if a path does not exist, or no row is found.
    """
    rows: list[LabelledPrompt] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist. Give a file of prompts with labels, or a folder of such files.")
        files = sorted(file for file in path.rglob("*") if is_table(file)) if path.is_dir() else [path]
        for file in files:
            rows += _read(file, policy)
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))} must hold prompts, found none. Give .jsonl, .csv or .parquet files.")
    return rows


def _read(file: Path, policy: Policy) -> list[LabelledPrompt]:
    rows = []
    for number, row in enumerate(read_table(file), start=1):
        try:
            rows += _record(row, number, file.stem, policy)
        except UserError as error:
            raise UserError(f"{file}, row {number}: {error}") from error
    return rows


def _record(row: Mapping[str, Any], number: int, source: str, policy: Policy) -> list[LabelledPrompt]:
    """The prompt of a row, or none where it is empty or its harm is none of ours."""
    prompt, label = text_cell("prompt", row.get("prompt")).strip(), LABELS.get(str(row.get("label")).casefold())
    if label is None:
        raise UserError(f"label must be 0 (safe) or 1 (unsafe), got {row.get('label')!r}. Mend it.")
    names = {normalize_category(name) for name in re.split(r"[,;]", text_cell("category", row.get("category")))}
    if not prompt or any(name.startswith(NO_HARM) for name in names):
        return []
    categories = tuple(sorted({_known(name, policy) for name in names} - {""})) if label else ()
    own, concept, linked = (name_cell(column, row.get(column)) for column in ("id", "concept", "pair_id"))
    name, shared = f"{source}:{own or number}", concept or linked
    group = f"{source}:{shared}" if shared else name
    pair = f"{source}:{linked}" if linked else ""
    certainty = _certainty(row) if label else 1.0
    return [LabelledPrompt(name, prompt, label, categories, source, group, pair, certainty)]


def _certainty(row: Mapping[str, Any]) -> float:
    """From the columns ``certainty``, in [0, 1], the votes of Adversarial Nibbler, or the percentage of I2P; 1 without any."""
    found = {column: number_cell(column, row[column]) for column in CERTAINTY if not is_blank(row.get(column))}
    harmful = [found[column] for column in VOTES if column in found]
    if "certainty" in found:
        share = found["certainty"]
    elif found.get("votes") and any(column in row for column in VOTES):
        share = max(harmful, default=0.0) / found["votes"]
    elif "inappropriate_percentage" in found:
        share = found["inappropriate_percentage"] / 100
    else:
        return 1.0
    if not 0 <= share <= 1:
        raise UserError(f"the share of judges that find a row unsafe must be in [0, 1], got {share:g}. Mend it.")
    return share


def _known(name: str, policy: Policy) -> str:
    ids = policy.category_ids()
    if name in ids:
        return name
    ours = next((ours for start, ours in ALIASES.items() if name.startswith(start)), "")
    return ours if ours in ids else ""


def without_repeats(rows: Iterable[LabelledPrompt]) -> list[LabelledPrompt]:
    """One row per text; a text that is safe in one source and unsafe in another is left out."""
    first: dict[str, LabelledPrompt] = {}
    torn = set()
    for row in rows:
        text = fold(row.prompt)
        known = first.setdefault(text, row)
        if known.label != row.label:
            torn.add(text)
    return [row for text, row in first.items() if text not in torn]


def policy_rows(policy: Policy) -> list[LabelledPrompt]:
    """Prompt pairs made from the policy: a concept's names against its counterpart, in some frames. Held-out concepts give none."""
    frames = ("{}", "a photo of {}", "{}, oil painting, highly detailed", "generate an image of {}")
    rows = []
    for category in policy.categories:
        for concept in category.concepts:
            if concept.held_out:
                continue
            for number, name in enumerate((concept.name, *concept.paraphrases)):
                frame = frames[(crc32(concept.id.encode()) + number) % len(frames)]
                pair = f"policy:{concept.id}-{number}"
                shared: dict[str, Any] = {"source": "policy", "group": f"policy:{concept.id}", "pair": pair}
                rows.append(LabelledPrompt(f"{pair}-u", frame.format(name), 1, (category.id,), **shared))
                rows.append(LabelledPrompt(f"{pair}-s", frame.format(concept.safe), 0, (), **shared))
    return rows


def pair_rows(pairs: Sequence[PromptPair], benign: Sequence[str] = ()) -> list[LabelledPrompt]:
    """Both prompts of every pair (source "pairs"), a pair being a group, and ``benign`` ones (source "benign").

    Pairs of held-out concepts give none.
    """
    rows = []
    for pair in (one for one in pairs if not one.held_out):
        shared: dict[str, Any] = {"source": "pairs", "group": f"pairs:{pair.id}", "pair": pair.id, "concept": pair.concept}
        rows.append(LabelledPrompt(f"{pair.id}-u", pair.unsafe, 1, pair.categories, kind=pair.kind, **shared))
        rows.append(LabelledPrompt(f"{pair.id}-s", pair.safe, 0, (), **shared))
    for number, prompt in enumerate(benign):
        rows.append(LabelledPrompt(f"benign-{number}", prompt, 0, (), source="benign", group=f"benign:{prompt}"))
    return rows


def capped(
    rows: Sequence[LabelledPrompt], limit: int | None, *, seed: int, factors: Mapping[str, float] = MappingProxyType({})
) -> list[LabelledPrompt]:
    """At most ``limit`` rows of every source and label, whole pairs where there are any; the order of the rows is kept.

    Args: factors: On the limit, by source.
    """
    if limit is None:
        return list(rows)
    kept: set[str] = set()
    for key in sorted({(row.source, row.label) for row in rows}):
        own = [row for row in rows if (row.source, row.label) == key]
        own.sort(key=lambda row: crc32(f"{seed} {row.pair or row.id}".encode()))
        kept |= {row.id for row in own[: round(limit * factors.get(key[0], 1.0))]}
    return [row for row in rows if row.id in kept]
