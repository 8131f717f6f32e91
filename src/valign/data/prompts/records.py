"""Any table of prompts -> `LabelledPrompt`: the layout told by its columns, categories in our names, every row checked."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from valign.checks import SEEDS, UserError, check_choice, close_to
from valign.data.prompts.layouts import FILE, LAYOUTS, Raw, Row, detect_layout
from valign.data.prompts.pairs import LabelledPrompt
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, read_table, table_stem, text_cell, whole_cell
from valign.policy import CATEGORY_IDS, normalize_category
from valign.progress import console

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "safe": 0, "unsafe": 1}
ALIASES = {  # beginnings of other sets' category names, and the policy category they mean; "" is harm of no category of ours
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
NO_HARM = (
    "copyright-infringement",
    "political-sensitivity",
    "public-figures",
)  # other rules than ours: such rows teach nothing about harm


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A file's own names of the fields of a plain table, as `TableReading` takes them; kept in the record of a data set."""

    id: str = "id"
    prompt: str = "prompt"
    label: str = "label"
    category: str = "category"
    pair_id: str = "pair_id"
    kind: str = "kind"
    concept: str = "concept"
    seed: str = "seed"
    held_out: str = "held_out"
    unsafe: str = "unsafe"
    safe: str = "safe"

    def renamed(self) -> dict[str, str]:
        """Only those that differ from the field's name."""
        return {name: theirs for name, theirs in vars(self).items() if theirs != name}


def named_columns(columns: Mapping[str, str]) -> Columns:
    """Raises: UserError for a name that is not a field."""
    known = [entry.name for entry in fields(Columns)]
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise UserError(f"--column must name one of {', '.join(known)}; got {', '.join(unknown)}.{close_to(unknown[0], known)}")
    return Columns(**columns)


@dataclass(frozen=True)
class Unlabelled:
    """A prompt of which the set does not say whether it is safe."""

    prompt: str


@dataclass(frozen=True)
class OtherHarm:
    """A prompt that breaks other rules than those about harm, such as copyright."""

    prompt: str


Record = LabelledPrompt | Unlabelled | OtherHarm


def why_not(record: Record) -> str:
    """Why a record is not used; "" if it is."""
    if not record.prompt:
        return "empty"
    return "unlabelled" if isinstance(record, Unlabelled) else "other harm" if isinstance(record, OtherHarm) else ""


def say_left_out(what: str, dropped: Mapping[str, int]) -> None:
    """Tell the user, by reason, what is not used."""
    for reason, count in dropped.items():
        if count:
            console.print(f"left out: {count} {what}, {reason.replace('_', ' ')}", style="yellow", soft_wrap=True)


def nameless(path: Path, number: int) -> str:
    """The id of a row that has none."""
    return f"{path.name.split('.')[0]}-{number:05d}"


def prompt_records(
    path: Path,
    layout: str | None = None,
    *,
    reading: TableReading = AS_IT_IS,
    known: Collection[str] = CATEGORY_IDS,
    unknown: str = "refuse",
) -> Iterator[tuple[int, Record]]:
    """Row number (from 1) and checked record of every prompt in the file.

    Args:
        layout: A name in `LAYOUTS`; None looks at the columns.
        reading: The file's own names of the columns, and values for what it lacks or does not say, e.g. ``label=1``.
        known: Category ids that an unsafe prompt may have. A safe prompt keeps a category only if it is known.
        unknown: ``"refuse"`` a category of an unsafe prompt that is neither known nor another set's name, or ``"drop"`` its name.
    Raises: UserError with the row, for an unknown category, a label that is not 0 or 1, or a missing column.
    """
    rows = read_table(path, replace(reading, fill={}))  # what is filled in must not tell the layout
    name = choose_layout(rows, layout, path)
    unknown = unknown if LAYOUTS[name].ours else "drop"
    for number, raw in _raw(path, [reading.filled(row) for row in rows], name):
        with _placed(path, number):
            yield number, _check(_filled(raw, reading.fill), known, unknown, said=name != "plain")


def prompt_texts(path: Path, layout: str | None = None, reading: TableReading = AS_IT_IS) -> list[str]:
    """The texts of every prompt in the file, whatever its labels and categories are.

    Raises: UserError, with the row, for a missing column, or a cell that is not text.
    """
    rows = read_table(path, replace(reading, fill={}))
    return [raw.prompt for _, raw in _raw(path, rows, choose_layout(rows, layout, path))]


def choose_layout(rows: Collection[Row], layout: str | None, path: Path | None = None) -> str:
    """A name in `LAYOUTS`: ``layout``, or what the columns of the file tell. Raises: ValueError if there is no such layout."""
    if layout is None:
        return detect_layout(rows, path)
    check_choice("format", layout, LAYOUTS)
    return layout


def _raw(path: Path, rows: Sequence[Row], name: str) -> Iterator[tuple[int, Raw]]:
    file = {FILE: table_stem(path)} if LAYOUTS[name].file else {}
    for number, row in enumerate(rows, start=1):
        given = {"id": nameless(path, number), **file} | {key: row[key] for key in row if key != "id" or not is_blank(row[key])}
        with _placed(path, number):
            try:
                found = list(LAYOUTS[name].read(given))
            except KeyError as error:
                raise UserError(f"must have column {error} in layout {name}. Choose another format.") from error
        yield from ((number, raw) for raw in found)


@contextmanager
def _placed(path: Path, number: int) -> Iterator[None]:
    """Mistakes within name the file and the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, row {number}: {error}") from error


def _filled(raw: Raw, fill: Mapping[str, object]) -> Raw:
    """What the set does not say, filled in; a category only where the prompt is unsafe."""
    raw = replace(raw, label=fill["label"]) if raw.label is None and "label" in fill else raw
    unsafe = LABELS.get(str(raw.label).casefold()) == 1
    return replace(raw, category=fill["category"]) if unsafe and not raw.category and "category" in fill else raw


def _check(raw: Raw, known: Collection[str], unknown: str, *, said: bool) -> Record:
    """``said``: the layout is one that may leave a label out."""
    label = LABELS.get(str(raw.label).strip().casefold())
    if label is None:
        if said and raw.label is None:
            return Unlabelled(raw.prompt.strip())
        raise UserError(f"label must be 0 (safe) or 1 (unsafe), got {raw.label!r}. Name its column label=NAME, or fill label=1.")
    several = raw.category if isinstance(raw.category, list) else re.split(r"[,;]", text_cell("category", raw.category))
    listed = [text_cell("category", name) for name in several]
    slugs = {normalize_category(name) for name in listed}
    if label and any(name.startswith(NO_HARM) and name not in known for name in slugs):
        return OtherHarm(raw.prompt.strip())
    names = {_ours(name, known, unknown if label else "drop") for name in listed}
    seed = None if is_blank(raw.seed) else whole_cell("seed", raw.seed, *SEEDS)
    return LabelledPrompt(
        raw.id,
        raw.prompt.strip(),
        label,
        tuple(sorted(names - {""})),
        pair=raw.pair_id,
        certainty=raw.certainty if label else 1.0,
        kind=raw.kind,
        concept=raw.concept,
        seed=seed,
        held_out=raw.held_out,
    )


def _ours(name: str, known: Collection[str], unknown: str) -> str:
    """The known category that another set's name means; "" for harm of no category of ours."""
    slug = normalize_category(name)
    if slug in known or not slug:
        return slug
    meant = next((ours for start, ours in ALIASES.items() if slug.startswith(start)), None)
    if meant is None and unknown == "refuse":
        normalize_category(name, known)
    return meant if meant is not None and meant in known else ""
