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
from valign.data.prompts.pairs import LabelledPrompt
from valign.data.prompts.tables import SUFFIXES, read_table
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
NO_HARM = ("copyright-infringement", "political-sensitivity")  # other rules than ours: such rows teach nothing about harm


def read_rows(paths: Sequence[Path], policy: Policy) -> list[LabelledPrompt]:
    """Rows of files, or of every file below a folder, in the order of names. A source is a file's stem.

    Raises: UserError if a path does not exist, or no row is found.
    """
    rows: list[LabelledPrompt] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist. Give a file of prompts with labels, or a folder of such files.")
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        for file in files:
            rows += _read(file, policy)
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))} must hold prompts, found none. Give .jsonl, .csv or .parquet files.")
    return rows


def _read(file: Path, policy: Policy) -> list[LabelledPrompt]:
    rows = []
    for number, row in enumerate(read_table(file), start=1):
        prompt, label = str(row.get("prompt") or "").strip(), LABELS.get(str(row.get("label")).casefold())
        if label is None:
            raise UserError(f"{file}, row {number}: label must be 0 (safe) or 1 (unsafe), got {row.get('label')!r}. Mend it.")
        names = {normalize_category(name) for name in re.split(r"[,;]", str(row.get("category") or ""))}
        if not prompt or any(name.startswith(NO_HARM) for name in names):
            continue
        categories = tuple(sorted({_known(name, policy) for name in names} - {""})) if label else ()
        name, shared = f"{file.stem}:{row.get('id') or number}", row.get("concept") or row.get("pair_id")
        group = f"{file.stem}:{shared}" if shared else name
        pair = f"{file.stem}:{row['pair_id']}" if row.get("pair_id") else ""
        certainty = _certainty(row, f"{file}, row {number}") if label else 1.0
        rows.append(LabelledPrompt(name, prompt, label, categories, file.stem, group, pair, certainty))
    return rows


def _certainty(row: Mapping[str, Any], where: str) -> float:
    """From the columns ``certainty``, in [0, 1], the votes of Adversarial Nibbler, or the percentage of I2P; 1 without any."""
    try:
        if row.get("certainty") is not None:
            share = float(row["certainty"])
        elif row.get("votes") and any(f"{kind}_unsafe_votes" in row for kind in ("image", "text")):
            share = max(float(row.get(f"{kind}_unsafe_votes") or 0) for kind in ("image", "text")) / float(row["votes"])
        elif row.get("inappropriate_percentage") is not None:
            share = float(row["inappropriate_percentage"]) / 100
        else:
            return 1.0
    except ValueError as error:
        raise UserError(f"{where}: certainty, votes and percentages must be numbers: {error}. Mend it.") from None
    if not 0 <= share <= 1:
        raise UserError(f"{where}: the share of judges that find a row unsafe must be in [0, 1], got {share:g}. Mend it.")
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
