"""Images that another tool made, as a suite and a system: a folder with the images and a manifest that says what each answers."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from valign.checks import SEEDS, UserError
from valign.data.prompts.overlap import fold
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, name_cell, read_table, tables_named, text_cell, whole_cell
from valign.evaluation.images.folder import UNREADABLE
from valign.evaluation.suite import EvalPrompt, Suite
from valign.evaluation.systems import System
from valign.files import hash_file, hash_value
from valign.images import SUFFIXES, open_image
from valign.policy import normalize_category
from valign.progress import track

STEM = "manifest"
COLUMNS = (
    "prompt, file, category (empty for a harmless prompt), and if known seed, kind, id, concept, held_out, expected, counterpart"
)
OWN_COLUMNS = ("file", "file_name", "expected", "counterpart")  # beside those that prompts have
FILES = OWN_COLUMNS[:2]  # names of the column; the second as in image folders of the `datasets` library


@dataclass(frozen=True)
class MadeElsewhere:
    """What a folder holds. ``files`` has the image of each prompt by its id, None where the tool gave none."""

    folder: Path
    suite: Suite
    files: Mapping[str, Path | None]
    unreadable: Mapping[str, str] = field(default_factory=dict)  # id -> why its file cannot be read
    unnamed: int = 0  # images in the folder that the manifest does not name

    def system(self, name: str, *, origins: tuple[str, ...] = ()) -> System:
        """A system that hands out these images. ``origins``: of the model that made them, empty if unknown."""
        seeds = self.suite.seeds(0)
        place = {(one.prompt, seed): one.id for one, seed in zip(self.suite.prompts, seeds)}

        def generate(prompts: list[str], wanted: list[int]) -> list[Any]:
            return [self._image(place[asked]) for asked in zip(prompts, wanted)]

        files = {
            key: "" if file is None else UNREADABLE if key in self.unreadable else hash_file(file)
            for key, file in self.files.items()
        }
        about = f"images of {self.folder}, made elsewhere"
        return System(name, generate, about, fingerprint=hash_value(files), origins=origins, elsewhere=True)

    def _image(self, key: str) -> Image.Image | str | None:
        file = self.files[key]
        return UNREADABLE if key in self.unreadable else None if file is None else open_image(file)


def read_made_elsewhere(
    folder: Path, *, known: Collection[str], reading: TableReading = AS_IT_IS, stand_in: bool = False
) -> MadeElsewhere:
    """Read a folder's manifest and open every image once.

    Args:
        reading: Other names of the manifest's columns.
        known: Ids of the policy's categories.
        stand_in: The harms are neutral drawings, so a report may show them.
    Raises: UserError without a manifest, and with the row for one that is not usable: a missing column, an unknown category, a file
        outside the folder, a prompt that stands twice with one seed.
    """
    prompts: list[EvalPrompt] = []
    files: dict[str, Path | None] = {}
    manifest = _manifest(folder)
    for number, row in enumerate(read_table(manifest, reading), start=1):
        try:
            prompt, file = _prompt(folder, row, known, files)
        except ValueError as error:  # UserError is one
            raise UserError(f"{manifest}, row {number}: {error}") from error
        prompts.append(prompt)
        files[prompt.id] = file
    suite = Suite(folder.resolve().name, tuple(prompts), stand_in)
    _refuse_repeated(suite)
    named = {file.resolve() for file in files.values() if file is not None}
    found = {path.resolve() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != "."}
    return MadeElsewhere(folder, suite, files, _unreadable(files), len(found - named))


def same_prompts(first: MadeElsewhere, others: Sequence[MadeElsewhere]) -> None:
    """Raise UserError unless all folders answer the same prompts with the same seeds: only then can they be compared in pairs."""
    wanted = {prompt.id: prompt for prompt in first.suite.prompts}
    for other in others:
        own = {prompt.id: prompt for prompt in other.suite.prompts}
        different = sorted(key for key in {*wanted, *own} if wanted.get(key) != own.get(key))
        if different:
            raise UserError(
                f"{other.folder} must answer the same prompts as {first.folder}, got {len(different)} that "
                f"differ, first {different[0]}. "
                "Evaluate them one by one, or make the missing images."
            )


def refuse_unreadable(made: Iterable[MadeElsewhere]) -> None:
    """Raise UserError if an image of any folder cannot be read."""
    found = [why for one in made for why in one.unreadable.values()]
    if found:
        raise UserError(
            f"{len(found)} of the images cannot be read; nothing was measured. The first: {found[0]} With "
            "--skip-unreadable they count as "
            "not measured."
        )


def _manifest(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder of images with a manifest, it does not exist. Check the path.")
    found = tables_named(folder, STEM)
    if not found:
        raise UserError(
            f"{folder} must hold a {STEM}.csv, {STEM}.jsonl or {STEM}.json beside its images, found none. Write "
            "one, a row per image: "
            f"{COLUMNS}."
        )
    if len(found) > 1:
        raise UserError(f"{folder} must hold one manifest, got {', '.join(path.name for path in found)}. Remove all but one.")
    return found[0]


def _prompt(folder: Path, row: Mapping[str, Any], known: Collection[str], taken: Collection[str]) -> tuple[EvalPrompt, Path | None]:
    column = next((name for name in FILES if name in row), None)
    absent = [name for name in ("prompt", "category") if name not in row] + ([] if column else ["file"])
    if absent:
        raise UserError(f"must have the column {absent[0]}, got {', '.join(map(str, row))}. A manifest has {COLUMNS}.")
    text = text_cell("prompt", row["prompt"])
    category = text_cell("category", row["category"])
    category = normalize_category(category, known) if category.strip() else ""
    seed = None if is_blank(row.get("seed")) else whole_cell("seed", row["seed"], *SEEDS)
    texts = {name: text_cell(name, row.get(name)) for name in ("concept", "counterpart")}
    prompt = EvalPrompt(
        name_cell("id", row.get("id")) or _own_id(text, seed, taken),
        text,
        category,
        text_cell("kind", row.get("kind")) or ("explicit" if category else "benign"),
        held_out=name_cell("held_out", row.get("held_out")).casefold() in ("1", "true"),
        expected=_expected(row.get("expected")),
        seed=seed,
        **texts,
    )
    return prompt, _file(folder, text_cell(str(column), row[str(column)]))


def _own_id(text: str, seed: int | None, taken: Collection[str]) -> str:
    """An id that the same prompt and seed have in another folder, too; without a seed, the prompt's first, second ... row."""
    stem = f"p-{hashlib.sha256(fold(text).encode()).hexdigest()[:12]}"
    stem = stem if seed is None else f"{stem}-s{seed}"
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def _expected(value: object) -> dict[str, str]:
    if is_blank(value):
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(
            f'expected must be an object of texts, such as {{"glyph": "cup"}}, got {value!r}. Mend it, or leave it blank.'
        )
    return {str(key): text for key, text in found.items()}


def _file(folder: Path, name: str) -> Path | None:
    if not name.strip():
        return None
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"file must lie in {folder}, got {name!r}. Copy the image there.")
    return path


def _unreadable(files: Mapping[str, Path | None]) -> dict[str, str]:
    found = {}
    for key, file in track(files.items(), "Opening images"):
        try:
            if file is not None:
                open_image(file)
        except UserError as error:
            found[key] = str(error)
    return found


def _refuse_repeated(suite: Suite) -> None:
    seen: dict[tuple[str, int], str] = {}
    for prompt, seed in zip(suite.prompts, suite.seeds(0)):
        if (other := seen.setdefault((prompt.prompt, seed), prompt.id)) != prompt.id:
            raise UserError(
                f"{suite.name} must name one image per prompt and seed, got two: {other} and {prompt.id}. Give "
                "each its seed, or none."
            )
