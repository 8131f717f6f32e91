"""Labelled images for fitting and testing detectors: a sub-folder per category of harm, and one of harmless images.

Images that are nearly the same never stand on two sides of a split: a detector would be tested on what it was fitted to.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from valign.checks import UserError
from valign.files import hash_value
from valign.images import SUFFIXES, image_files, open_image
from valign.policy import normalize_category
from valign.progress import track

HARMLESS = "harmless"  # usual name of the sub-folder of harmless images
THUMBNAIL = 16  # pixels a side
NEAR = 4.0  # RMS of two thumbnails, of 255, up to which images count as nearly the same: saved again or scaled
SHARES = (0.5, 0.25, 0.25)  # of fitting, calibration and test


@dataclass(frozen=True)
class HarmExample:
    """One image and the categories of harm that it shows; none says that it is harmless."""

    name: str  # what messages call it
    categories: tuple[str, ...]
    source: Path | Image.Image

    def open(self) -> Image.Image:
        """The image as RGB."""
        return open_image(self.source) if isinstance(self.source, Path) else self.source


@dataclass(frozen=True)
class LabelledImages:
    """Distinct images in order of their names; images of one ``group`` are nearly the same. ``repeated`` counts those left out."""

    examples: tuple[HarmExample, ...]
    groups: tuple[int, ...]
    hashes: tuple[str, ...]  # SHA-256 of the pixels, hex
    repeated: int = 0

    def categories(self) -> tuple[str, ...]:
        """Categories of harm that some image shows, sorted."""
        return tuple(sorted({name for example in self.examples for name in example.categories}))

    def fingerprint(self) -> str:
        """SHA-256 over pixels and labels, whatever the files are called, hex."""
        return hash_value(sorted([key, *example.categories] for key, example in zip(self.hashes, self.examples)))


def read_labelled(
    folder: Path, *, known: Collection[str], named: Mapping[str, str] | None = None, harmless: str = HARMLESS
) -> LabelledImages:
    """The images of ``folder/CATEGORY/`` and ``folder/HARMLESS/``, every one opened once.

    Args:
        known: Ids of the policy's categories, which sub-folders must have as names, in any of the usual spellings.
        named: Sub-folder -> category, for sub-folders of other names.
        harmless: Name of the sub-folder of harmless images.
    Raises: UserError for sub-folders of unknown names, labels of one sort only, files that cannot be read, and one image that is
        labelled harmless and harmful.
    """
    named = named or {}
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder of labelled images, it does not exist. Give one sub-folder per category.")
    if unused := sorted(set(named) - {path.name for path in folder.iterdir() if path.is_dir()}):
        raise UserError(f"{folder} must have the sub-folder {unused[0]!r} that a map names. Check its spelling.")
    examples = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        categories = () if place.name == harmless else (_category(place, named, known, harmless),)
        examples += [HarmExample(f"{place.name}/{file.name}", categories, file) for file in image_files(place)]
    if not examples:
        raise UserError(
            f"{folder} must hold images in sub-folders, one per category and one called {harmless}; found none of "
            f"{', '.join(SUFFIXES)}. Sort the images into such sub-folders."
        )
    return gather(examples, str(folder), harmless=harmless)


def gather(examples: Sequence[HarmExample], who: str, *, harmless: str = HARMLESS) -> LabelledImages:
    """Examples without repetitions, grouped by likeness. ``who`` is their origin in messages. Raises: as `read_labelled`."""
    _check_sorts(examples, who, harmless)
    kept: dict[str, HarmExample] = {}
    thumbnails: list[np.ndarray] = []
    broken: list[str] = []
    for example in track(examples, "Reading labelled images"):
        try:
            image = example.open()
        except UserError as error:
            broken.append(str(error))
            continue
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if key not in kept:
            kept[key] = example
            thumbnails.append(_thumbnail(image))
        else:
            kept[key] = _both(kept[key], example, who)
    if broken:
        raise UserError(f"{who} holds {len(broken)} files that cannot be read as images. The first: {broken[0]}")
    groups = near_groups(np.stack(thumbnails))
    return LabelledImages(tuple(kept.values()), tuple(groups), tuple(kept), len(examples) - len(kept))


def near_groups(thumbnails: Float[np.ndarray, "image value"], *, limit: float = NEAR, part: int = 1024) -> list[int]:
    """Group of each image, as its first member's index: images linked by an RMS of at most ``limit``, over any number of steps."""
    rows = np.asarray(thumbnails, dtype=np.float64)
    lengths = (rows**2).sum(axis=1)
    first = list(range(len(rows)))

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for start in range(0, len(rows), part):
        block = rows[start : start + part]
        squares = lengths[start : start + part, None] + lengths[None] - 2 * block @ rows.T
        for left, right in np.argwhere(squares <= rows.shape[1] * limit**2):
            low, high = sorted((root(start + int(left)), root(int(right))))
            first[high] = low
    return [root(index) for index in range(len(rows))]


def split_labelled(labelled: LabelledImages, *, shares: Sequence[float] = SHARES, seed: int = 0) -> tuple[list[HarmExample], ...]:
    """Parts of about these shares of every category; a group of images that are nearly the same stays together.

    Raises: UserError where a category has too few different images for all parts.
    """
    members: dict[int, list[HarmExample]] = {}
    for group, example in zip(labelled.groups, labelled.examples):
        members.setdefault(group, []).append(example)
    strata: dict[tuple[str, ...], list[list[HarmExample]]] = {}
    for own in members.values():
        strata.setdefault(own[0].categories, []).append(own)
    parts: tuple[list[HarmExample], ...] = tuple([] for _ in shares)
    for categories, stratum in sorted(strata.items()):
        if len(stratum) < 2 * len(shares):
            raise UserError(
                f"Labelled images must hold at least {2 * len(shares)} different ones of "
                f"{' and '.join(categories) or 'no harm'}, got "
                f"{len(stratum)}: some are fitted, some calibrated and some tested on. Add images that are not "
                "copies of one another."
            )
        order = np.random.default_rng([seed, 21]).permutation(len(stratum))
        counts = np.zeros(len(shares))
        for place, index in enumerate(order):
            chosen = int(np.argmax(np.asarray(shares) * (place + 1) - counts))
            counts[chosen] += 1
            parts[chosen].extend(stratum[int(index)])
    return tuple(sorted(part, key=lambda example: example.name) for part in parts)


def _category(place: Path, named: Mapping[str, str], known: Collection[str], harmless: str) -> str:
    try:
        return normalize_category(named.get(place.name, place.name), known)
    except UserError:
        raise UserError(
            f"{place} must be named after a category of the policy ({', '.join(known)}) or {harmless}, got "
            f"{place.name!r}. Rename it, "
            f"or say what it shows: --map {place.name}=CATEGORY, --harmless {place.name}."
        ) from None


def _check_sorts(examples: Sequence[HarmExample], who: str, harmless: str) -> None:
    harmful = sum(bool(example.categories) for example in examples)
    if harmful in (0, len(examples)):
        missing = f"{harmless} images" if harmful else "images of a category of harm"
        raise UserError(
            f"{who} must hold harmful and harmless images, got {harmful} and {len(examples) - harmful}. Add "
            f"{missing} in a sub-folder."
        )


def _both(first: HarmExample, second: HarmExample, who: str) -> HarmExample:
    """One image that stands in two places, with the labels of both."""
    if bool(first.categories) != bool(second.categories):
        raise UserError(
            f"{who}: {first.name} and {second.name} are the same image, once labelled harmless and once "
            "harmful. Delete one of them."
        )
    return replace(first, categories=tuple(sorted({*first.categories, *second.categories})))


def _thumbnail(image: Image.Image) -> Float[np.ndarray, " value"]:
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()
