"""One row per system and prompt: all that the summary is computed from, and nothing that a reader should not see unasked."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valign.evaluation.suite import BENIGN_KINDS, EvalPrompt
from valign.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What was measured on one image. The prompt's text stays in the suite: prompt sets of this kind hold slurs.

    ``cluster`` is equal for equal texts. Where the system gave no image ``harmful`` is False, and the measures are None.
    ``harmful`` is None where it was not measured: the detector does not cover the category or came to no answer, or the image is
    ``blank``, which shows nothing, harmful or not, or ``unreadable``, an image of another tool whose file is broken.
    """

    system: str
    id: str
    cluster: str
    kind: str
    category: str
    concept: str
    held_out: bool
    seed: int
    blocked: bool = False
    harmful: bool | None = False
    blank: bool = False  # one colour all over
    unreadable: bool = False
    scores: dict[str, float] = field(default_factory=dict)  # detector class -> score in [0, 1]
    fidelity: dict[str, bool] = field(default_factory=dict)  # only what the prompt asked for
    counterpart: bool | None = None  # whether it shows the safe counterpart; None where nobody asked or nobody could tell
    clip: float | None = None  # 100 cos(image, prompt)
    drift: float | None = None  # 1 - cos of features against the base's image
    rmse: float | None = None  # pixels against the base's image, full scale = 1

    @property
    def benign(self) -> bool:
        return self.kind in BENIGN_KINDS


def prompt_columns(prompt: EvalPrompt, seed: int) -> dict[str, Any]:
    """The part of a row that the prompt decides."""
    cluster = hashlib.sha256(" ".join(prompt.prompt.split()).encode()).hexdigest()[:16]
    names = ("id", "kind", "category", "concept", "held_out")
    return {name: getattr(prompt, name) for name in names} | {"cluster": cluster, "seed": seed}


def write_results(path: Path, rows: list[ImageResult]) -> None:
    """Write rows as parquet, one flat column per score (``score:CLASS``) and per aspect (``fidelity:ASPECT``)."""
    classes = sorted({name for row in rows for name in row.scores})
    aspects = sorted({name for row in rows for name in row.fidelity})
    text, flag, number = pa.string(), pa.bool_(), pa.float64()
    kinds = {"str": text, "bool": flag, "int": pa.int64()}
    kinds["bool | None"] = flag
    schema = [(name, kinds.get(getattr(kind.type, "__name__", str(kind.type)), number)) for name, kind in _plain_fields().items()]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name, _ in schema}
    for prefix, names, kind in (("score", classes, number), ("fidelity", aspects, flag)):
        for name in names:
            schema.append((f"{prefix}:{name}", kind))
            columns[f"{prefix}:{name}"] = [(row.scores if prefix == "score" else row.fidelity).get(name) for row in rows]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=pa.schema(schema)), temporary, compression="zstd")


def read_results(path: Path) -> list[ImageResult]:
    """Read rows as `write_results` wrote them, in the same order."""
    rows = []
    for record in pq.read_table(path).to_pylist():
        nested: dict[str, dict[str, Any]] = {"score": {}, "fidelity": {}}
        for key in [key for key in record if ":" in key]:
            prefix, name = key.split(":", 1)
            value = record.pop(key)
            if value is not None:
                nested[prefix][name] = value
        rows.append(ImageResult(**record, scores=nested["score"], fidelity=nested["fidelity"]))
    return rows


def _plain_fields() -> dict[str, Any]:
    return {name: kind for name, kind in ImageResult.__dataclass_fields__.items() if name not in ("scores", "fidelity")}
