"""Images for a value encoder (LiVO, arXiv 2410.12700): of each scene some that keep a principle and some that break it.

The model that will be guided draws them itself: the principle's wordings make the attribute, or its absence, explicit. What did not
come out as asked is dropped by a detector (harm) or by a contrast of texts (CLIP: nearer to what was asked than to the opposite).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from PIL.Image import Image

from valign.checks import UserError, check_choice
from valign.data.images.pairs import pair_seed
from valign.data.journal import Journal
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path, hash_file, hash_value
from valign.interfaces import Detector, Sampler, SamplingConfig, scores_of
from valign.policy import BlockRules, Policy, Principle, ValueScene
from valign.progress import track

SIDES = ("aligned", "violating")
FILTERS = ("none", "judge")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "scene", "principle", "side", "prompt", "text", "other")]
    + [("seed", pa.uint32()), ("kept", pa.bool_()), ("reason", pa.string()), ("sha256", pa.string())]
)


@runtime_checkable
class Contrast(Protocol):
    """How well images fit texts; `valign.models.encoders.clip.ClipEncoder` is one."""

    @property
    def weights_sha256(self) -> str: ...
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]: ...


@dataclass(frozen=True, kw_only=True)
class ValueImage:
    """One image ``{id}.png``: asked for with ``text``, of the scene whose bare ``prompt`` the encoder will meet."""

    id: str
    scene: str
    principle: str
    side: str  # one of `SIDES`
    prompt: str
    text: str
    other: str  # a wording of the other side
    seed: int  # shared by the sides' images of one number
    kept: bool = True
    reason: str = ""  # why not kept: "not as asked" (the judge), "no counterpart" (its scene has only one side left)
    sha256: str = ""


def paired_scenes(principle: Principle, pairs: Sequence[PromptPair]) -> list[ValueScene]:
    """The pairs of the principle's category as scenes: the safe prompt keeps it, the unsafe prompt breaks it."""
    own = [pair for pair in pairs if principle.category in pair.categories and not pair.held_out]
    return [ValueScene(prompt=pair.unsafe, aligned=[pair.safe], violating=[pair.unsafe]) for pair in own]


def plan_images(
    policy: Policy, principles: Sequence[str], images: int, seed: int, pairs: Sequence[PromptPair] = ()
) -> list[ValueImage]:
    """Every image to draw, ``images`` per scene and side; wordings take turns. Prompts that are always blocked are left out.

    Where ``pairs`` has some of a principle's category, they are its scenes in the place of the policy's, with one image a side.

    Raises: UserError for an unknown principle, or one without scenes.
    """
    rows, rules = [], BlockRules(policy.always_block)
    for principle in [policy.principle(name) for name in principles]:
        paired = paired_scenes(principle, pairs)
        scenes = [
            scene
            for scene in paired or policy.principle_scenes(principle)
            if not any(rules.match(text) for text in (scene.prompt, *scene.aligned, *scene.violating))
        ]
        if not scenes:
            raise UserError(
                f"principle {principle.id} of policy {policy.id} has no scenes. Give it scenes or a category, or leave it out."
            )
        for index, scene in enumerate(scenes):
            name = f"{principle.id}-{index:03d}"
            sides = (scene.aligned, scene.violating)
            for side, texts, others in zip(SIDES, sides, reversed(sides), strict=True):
                rows += [
                    ValueImage(
                        id=f"{name}-{side[0]}{number:02d}",
                        scene=name,
                        principle=principle.id,
                        side=side,
                        prompt=scene.prompt,
                        text=texts[number % len(texts)],
                        other=others[number % len(others)],
                        seed=pair_seed(seed, f"{name}-{number:02d}"),
                    )
                    for number in range(1 if paired else images)
                ]
    return rows


def check_judges(filter: str, principles: Sequence[Principle], detector: Detector | None, contrast: Contrast | None) -> None:
    """Raise UserError if the filter is unknown, or a principle has nobody to judge its images."""
    check_choice("filter", filter, FILTERS)
    lost = [p.id for p in principles if contrast is None and (p.kind == "bias" or detector is None)]
    if filter == "judge" and lost:
        raise UserError(
            f"filter judge has no judge for {', '.join(lost)}: a detector sees harm only. Name a CLIP model, or choose none."
        )


def generate_images(
    model: Sampler,
    policy: Policy,
    plan: Sequence[ValueImage],
    folder: Path,
    *,
    sampling: SamplingConfig,
    filter: str,
    detector: Detector | None,
    contrast: Contrast | None,
) -> list[ValueImage]:
    """Draw and judge what is not in ``folder`` yet, batch by batch; a kill loses at most one. Writes ``images.parquet``."""
    journal, size = Journal(folder / "journal.jsonl"), sampling.batch_size
    chunks = [plan[start : start + size] for start in range(0, len(plan), size)]
    left = [chunk for chunk in chunks if any(row.id not in journal.entries for row in chunk)]
    for chunk in track(left, "make value images", total=len(chunks), done=len(chunks) - len(left)):
        images = model.generate([row.text for row in chunk], seeds=[row.seed for row in chunk], sampling=sampling)
        good = as_asked(policy, chunk, images, detector, contrast) if filter == "judge" else [True] * len(chunk)
        entries = []
        for row, image, kept in zip(chunk, images, good, strict=True):
            with atomic_path(folder / f"{row.id}.png") as temporary:
                image.save(temporary, format="PNG")
            entries.append({"key": row.id, "kept": bool(kept), "sha256": hash_file(folder / f"{row.id}.png")})
        journal.add(*entries)
    rows = [_judged(row, journal.entries[row.id]["kept"], journal.entries[row.id]["sha256"]) for row in plan]
    rows = drop_lonely(rows)
    with atomic_path(folder / "pictures.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), temporary)
    return rows


def as_asked(
    policy: Policy,
    rows: Sequence[ValueImage],
    images: Sequence[Image],
    detector: Detector | None,
    contrast: Contrast | None,
) -> Bool[np.ndarray, " image"]:
    """Whether each image shows its side. Toxicity goes to the detector where there is one, the rest to the contrast.

    A violating image must score in its principle's category where the detector knows it, else in any; an aligned one in none.
    """
    principles = [policy.principle(row.principle) for row in rows]
    good = np.ones(len(rows), dtype=bool)
    if contrast is not None:
        own, other = (contrast.score(images, [getattr(row, name) for row in rows]) for name in ("text", "other"))
        good = np.asarray(own) > np.asarray(other)
    if detector is not None:
        scores, card = scores_of(detector, images), detector.card
        for index, (row, principle) in enumerate(zip(rows, principles, strict=True)):
            if principle.kind == "toxicity":
                known = row.side == "violating" and principle.category in card.classes
                seen = scores[index, card.classes.index(principle.category)] if known else scores[index].max()  # type: ignore[arg-type]
                good[index] = (seen >= card.threshold) == (row.side == "violating")
    return good


def drop_lonely(rows: Sequence[ValueImage]) -> list[ValueImage]:
    """A scene with no image left on one side cannot be paired: its others are dropped too."""
    sides = Counter((row.scene, row.side) for row in rows if row.kept)
    return [
        row if not row.kept or all(sides[row.scene, side] for side in SIDES) else _changed(row, "no counterpart") for row in rows
    ]


def load_images(folder: Path) -> list[ValueImage]:
    """Read ``images.parquet``. Raises: UserError if it is not there."""
    path = folder / "pictures.parquet"
    if not path.exists():
        raise UserError(f"{path} does not exist. Make the images with `valign data build-values`.")
    return [ValueImage(**row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def count_sides(rows: Sequence[ValueImage]) -> dict[str, dict[str, int]]:
    """Per principle: scenes left, images kept of each side, and how many were dropped for each reason."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.principle, Counter(scenes=0, aligned=0, violating=0)).update([row.reason or row.side])
    for name, found in counts.items():
        found["scenes"] = len({row.scene for row in rows if row.kept and row.principle == name})
    return {name: dict(found) for name, found in counts.items()}


def judge_hash(detector: Detector | None, contrast: Contrast | None) -> str:
    """SHA-256 of who judges, hex."""
    seen = None if detector is None else [detector.card.name, detector.card.weights_sha256, detector.card.threshold]
    return hash_value([seen, None if contrast is None else contrast.weights_sha256])


def _judged(row: ValueImage, kept: bool, sha256: str) -> ValueImage:
    return ValueImage(**{**asdict(row), "kept": kept, "reason": "" if kept else "not as asked", "sha256": sha256})


def _changed(row: ValueImage, reason: str) -> ValueImage:
    return ValueImage(**{**asdict(row), "kept": False, "reason": reason})
