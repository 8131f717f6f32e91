"""The two records of this room: a pair of prompts, and a single labelled prompt; and the table of pairs on disk."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from valign.checks import UserError
from valign.files import atomic_path, hash_value

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("unsafe", pa.string()),
        ("safe", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("kind", pa.string()),
        ("held_out", pa.bool_()),
    ]
)
FOLDS = 10
FILE_NAME = re.compile(r"[^\W_][\w.-]*")  # letters of every alphabet
LONGEST_NAME = 180  # bytes; file systems take 255, and images add an ending


@dataclass(frozen=True)
class PromptPair:
    """An unsafe prompt and its safe counterpart: the same scene without the harm. The trainer's caption is always ``unsafe``.

    One pair may belong to several categories; it is still one pair, and every matching expert sees it.
    """

    id: str  # unique in its set; names the image files, so letters, digits, ".", "_" and "-" only
    unsafe: str
    safe: str
    categories: tuple[str, ...]  # category ids, sorted, distinct
    concept: str = ""
    kind: str = "explicit"  # explicit, paraphrased, implicit or adversarial
    held_out: bool = False  # never enters training data

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.id):
            raise UserError(f"PromptPair.id must be letters, digits, '.', '_' or '-', got {self.id!r}. It names the image files.")
        if self.categories != tuple(sorted(set(self.categories))):
            raise ValueError(
                f"PromptPair.categories must be sorted and distinct, got {self.categories}. Use tuple(sorted(set(...)))."
            )


@dataclass(frozen=True)
class LabelledPrompt:
    """One labelled prompt of a file or source."""

    id: str
    prompt: str  # stripped
    label: int  # 0 safe, 1 unsafe
    categories: tuple[str, ...]  # category ids, sorted; () for an unsafe prompt means that its category is not known
    source: str = ""
    group: str = ""  # what must not be split between training and test: a concept, a pair, or the prompt alone
    pair: str = ""  # equal for the two prompts of a pair
    certainty: float = 1.0  # share of the judges, or of the images, that say an unsafe prompt is unsafe
    kind: str = ""
    concept: str = ""
    seed: int | None = None  # the seed that the set prescribes for this prompt
    held_out: bool = False

    @property
    def fold(self) -> int:
        """Of the group, in [0, 10); the same on every machine."""
        return crc32(self.group.encode()) % FOLDS


def file_names(ids: Iterable[str]) -> dict[str, str]:
    """A name for the image files of every id: its letters, digits, ".", "_" and "-", and one "-" for any other signs between them.

    Ids that are left with no name, the same name or a very long one get a part of their hash, so that distinct ids stay distinct.
    """
    plain = {one: re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", one)).lstrip("._-") for one in ids}
    taken = Counter(plain.values())
    return {
        one: name if name and taken[name] == 1 and len(name.encode()) <= LONGEST_NAME else _with_hash(name, one)
        for one, name in plain.items()
    }


def _with_hash(name: str, one: str) -> str:
    short = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{short or 'id'}-{hash_value(one)[:8]}"


def write_pairs(path: Path, pairs: Sequence[PromptPair]) -> None:
    """Write ``pairs.parquet`` atomically, in the order given. Raises: UserError if two pairs share an id."""
    seen: set[str] = set()
    twice = sorted({pair.id for pair in pairs if pair.id in seen or seen.add(pair.id)})  # type: ignore[func-returns-value]
    if twice:
        raise UserError(f"Pair ids must be distinct, got {len(twice)} ids more than once, first {twice[0]!r}. Rename them.")
    rows = [{**asdict(pair), "categories": list(pair.categories)} for pair in pairs]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def load_pairs(path: Path) -> list[PromptPair]:
    """Read what `write_pairs` wrote. Raises: UserError if the file is missing or is not a table of pairs."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Make it with `valign data build`, or check the path.")
    try:
        rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{path} is not a table of prompt pairs: {str(error).splitlines()[0]}. Make it with `valign data build`."
        ) from error
    return [_from_row(row) for row in rows]


def _from_row(row: Mapping[str, Any]) -> PromptPair:
    return PromptPair(**{**row, "categories": tuple(row["categories"])})


def count_categories(pairs: Iterable[PromptPair]) -> dict[str, int]:
    """Pairs per category id, sorted by id. A pair of several categories counts in each, so the sum may exceed their number."""
    counts: dict[str, int] = {}
    for pair in pairs:
        for category in pair.categories:
            counts[category] = counts.get(category, 0) + 1
    return dict(sorted(counts.items()))
