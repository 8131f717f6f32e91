"""Labelled prompts for fitting and measuring the guard: many sources, one set of category names, stable splits."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

from valign.checks import UserError
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import LabelledPrompt, PromptPair
from valign.data.prompts.records import nameless, prompt_records, say_left_out, why_not
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_table, table_stem
from valign.policy import Policy


def read_rows(
    paths: Sequence[Path], policy: Policy, layout: str | None = None, reading: TableReading = AS_IT_IS
) -> list[LabelledPrompt]:
    """Rows of files, or of every table below a folder, in the order of names. A source is a file's stem. Says what is left out.

    Options are those of `prompt_records`; a category that is none of ours leaves an unsafe prompt without one.
    Raises: UserError if a path does not exist, or no row is found.
    """
    rows: list[LabelledPrompt] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist. Give a file of prompts with labels, or a folder of such files.")
        for file in sorted(file for file in path.rglob("*") if is_table(file)) if path.is_dir() else [path]:
            left_out = Counter[str]()
            rows += _read(file, policy, layout, reading, left_out)
            say_left_out(f"prompts of {file.name}", left_out)
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))} must hold labelled prompts, found none. Give tables of prompts with labels.")
    return rows


def _read(
    file: Path, policy: Policy, layout: str | None, reading: TableReading, left_out: Counter[str]
) -> Iterator[LabelledPrompt]:
    """The prompts of a file, named after it: what must not be split is its concept, else its pair, else itself."""
    source = table_stem(file)
    for number, record in prompt_records(file, layout, reading=reading, known=policy.category_ids(), unknown="drop"):
        if reason := why_not(record):
            left_out[reason] += 1
            continue
        assert isinstance(record, LabelledPrompt)
        own = str(number) if record.id == nameless(file, number) else record.id
        name, shared = f"{source}:{own}", record.concept or record.pair
        yield replace(
            record,
            id=name,
            categories=record.categories if record.label else (),
            source=source,
            group=f"{source}:{shared}" if shared else name,
            pair=f"{source}:{record.pair}" if record.pair else "",
        )


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
