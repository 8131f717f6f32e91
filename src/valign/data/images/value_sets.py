"""A value data set in two steps, each a folder that resumes after a kill and is skipped when done: images -> latents.

Layout of ``D/latents``: ``latents.safetensors`` with ``mean`` and ``std`` (and ``flip.mean``, ``flip.std``, the mirrored images)
of every image; ``text.safetensors`` with the embeddings of the scenes' prompts; ``index.parquet``, one row an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from valign.checks import UserError, check_options, option
from valign.data.images.cache import EncodedImages, open_cache
from valign.data.images.latents import load_pixels, write_prompts, write_rows
from valign.data.images.value_images import (
    FILTERS,
    Contrast,
    ValueImage,
    check_judges,
    count_sides,
    generate_images,
    judge_hash,
    load_images,
    plan_images,
)
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path, hash_file
from valign.interfaces import Detector, EncoderAndSampler, LatentEncoder, SamplingConfig
from valign.methods import Method
from valign.policy import Policy
from valign.runs import Run

METHOD = Method(
    slug="livo-data",
    title="Images that keep and break a value principle, for LiVO",
    paper="arXiv 2410.12700",
    room="data",
    entry="valign.data.images.value_sets:build_values",
    fidelity="variant",
    note="scenes and principles come from the policy, images from the model itself; a judge may keep those that came out as asked",
)


@dataclass(frozen=True, kw_only=True)
class ValueDataConfig:
    """Options of `build_values`."""

    principles: tuple[str, ...] | None = option(None, help="only this principle", flags=("--principle",))
    images: int = option(4, help="images per scene and side; of a prompt pair, one", low=1, flags=("--images", "--pictures"))
    steps: int = option(50, help="sampling steps per image", low=1)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale", low=0)
    image_size: int | None = option(None, help="pixels a side at which images are encoded; the model's own if left out", low=1)
    filter: str = option("none", help="judge keeps an image if it came out as asked", choices=FILTERS)
    flip: bool = option(True, help="cache mirrored images too; off where left and right matter")
    seed: int = option(0, help="random seed of the run; every image's own seed is a hash of it and the image's id")
    batch_size: int = option(8, help="images at a time", low=1)

    def __post_init__(self) -> None:
        check_options(self)


class ValueCache(EncodedImages):
    """The latents of the images of a value data set."""

    content = "value data"
    command, step, mirrored, first = "valign data build-values", "value-latents", "flip.", "{}mean"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        table = self.table
        self.principles: tuple[dict[str, Any], ...] = tuple(self.record["recipe"]["principles"])  # id, text, aliases, kind
        self.scenes: tuple[str, ...] = tuple(table["scene"])
        self.principle_of: tuple[str, ...] = tuple(table["principle"])
        self.prompts: tuple[str, ...] = tuple(table["prompt"])
        self.aligned: tuple[bool, ...] = tuple(table["aligned"])
        self._opposed: dict[str, list[int]] = {}
        for row, (scene, aligned) in enumerate(zip(self.scenes, self.aligned, strict=True)):
            if not aligned:
                self._opposed.setdefault(scene, []).append(row)

    def rows(self, principle: str | None = None) -> Int[Tensor, " row"]:
        """Rows of the aligned images (of one principle), ascending: each is a pair with one of `opposed`.

        Raises: UserError if there is none.
        """
        rows = [row for row, name in enumerate(self.principle_of) if self.aligned[row] and principle in (None, name)]
        if not rows:
            known = ", ".join(sorted(set(self.principle_of)))
            raise UserError(f"{self.folder} has no images of principle {principle!r}, only of {known}. Build data for it.")
        return torch.tensor(rows, dtype=torch.long)

    def opposed(self, row: int) -> list[int]:
        """Rows of the violating images of the same scene; never empty."""
        return self._opposed[self.scenes[row]]

    def batch(
        self, rows: Int[Tensor, " row"], flip: Bool[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row channel height width"], Float[Tensor, "row channel height width"]]:
        """``(mean, std)`` of the posterior of each image, float32. Raises: UserError for a flip that was not cached."""
        return self._read("{}mean", rows, flip), self._read("{}std", rows, flip)

    def conditioning(self, rows: Int[Tensor, " row"]) -> dict[str, Tensor]:
        """The encoded prompt of each image's scene: ``embeds``, for SDXL also ``pooled`` and ``time_ids``."""
        return self._texts(self.text_rows[rows])


def build_values(
    model: EncoderAndSampler,
    policy: Policy,
    out: Path,
    config: ValueDataConfig | None = None,
    *,
    detector: Detector | None = None,
    contrast: Contrast | None = None,
    pairs: Sequence[PromptPair] = (),
) -> ValueCache:
    """Build the data set in ``out``, or go on where an earlier call stopped.

    Args:
        model: The model that will be guided; it generates the images and encodes them.
        detector: Judges images of toxicity principles, with ``filter="judge"``.
        contrast: Judges those of bias principles, and the others where there is no detector.
        pairs: Prompt pairs, the scenes of their categories' principles in the place of the policy's; one image a side.
    Raises: UserError if a step's folder was made from something else, or a principle has no scene with both sides left.
    """
    config = config or ValueDataConfig()
    names = config.principles or tuple(principle.id for principle in policy.principles)
    chosen = [policy.principle(name) for name in names]
    if not chosen:
        raise UserError(f"policy {policy.id} has no principles. Add some, or choose another policy.")
    check_judges(config.filter, chosen, detector, contrast)
    plan = plan_images(policy, names, config.images, config.seed, pairs)
    folder = out / "images"
    recipe = {"pictures": config.images, **{name: getattr(config, name) for name in ("steps", "guidance_scale", "filter")}}
    texts = [[row.id, row.prompt, row.text, row.other] for row in plan]
    inputs = {"model": model.fingerprint(), "judge": judge_hash(detector, contrast)}
    run = Run.open(folder, step="value-images", recipe={**recipe, "plan": texts}, inputs=inputs, seed=config.seed)
    if not run.done:
        rows = generate_images(
            model,
            policy,
            plan,
            folder,
            sampling=SamplingConfig.of(config),
            filter=config.filter,
            detector=detector,
            contrast=contrast,
        )
        run.finish(per_principle=count_sides(rows))
    kept = [row for row in load_images(folder) if row.kept]
    bare = [principle.id for principle in chosen if principle.id not in {row.principle for row in kept}]
    if bare:
        raise UserError(
            f"{folder} has no scene with both an aligned and a violating image for {', '.join(bare)}. "
            "Use filter none, generate more images, reword its scenes, or leave it out."
        )
    known = [{"id": p.id, "text": p.text, "aliases": list(p.aliases), "kind": p.kind} for p in chosen]
    return write_values(model, kept, known, folder, out / "latents", config)


def write_values(
    model: LatentEncoder,
    rows: Sequence[ValueImage],
    principles: Sequence[dict[str, Any]],
    images: Path,
    out: Path,
    config: ValueDataConfig,
) -> ValueCache:
    """Encode the images and their scenes' prompts into ``out``. A kill loses at most one batch; a finished cache is returned."""
    size = config.image_size or model.image_size
    recipe = {"flip": config.flip, "dtype": str(model.dtype), "image_size": size, "principles": list(principles)}
    inputs = {"model": model.fingerprint(), "images": hash_file(images / "pictures.parquet")}
    run = Run.open(out, step="value-latents", recipe=recipe, inputs=inputs)
    if not run.done:
        texts = list(dict.fromkeys(row.prompt for row in rows))

        def encode(chunk: slice) -> dict[str, Tensor]:
            pixels = torch.stack([load_pixels(images / f"{row.id}.png", size) for row in rows[chunk]])
            block: dict[str, Tensor] = {}
            for state, seen in (("", pixels), ("flip.", pixels.flip(-1)))[: 2 if config.flip else 1]:
                made = model.encode_images(seen)
                block |= {f"{state}mean": made.mean.float(), f"{state}std": made.std.float()}
            return block

        write_prompts(model, texts, out, config.batch_size)
        write_rows(out / "latents.safetensors", len(rows), config.batch_size, "encode images", encode)
        _write_index(rows, texts, out / "index.parquet")
        (out / "progress.json").unlink(missing_ok=True)
        run.finish(pictures=len(rows), texts=len(texts))
    return ValueCache(out)


def open_values(data: Path, *, base: str | None = None) -> ValueCache:
    """The cache of value data set ``data``. Args: base: fingerprint of the model that will be guided, if known.

    Raises: UserError if the cache is missing, unfinished, or was encoded by another base model.
    """
    return open_cache(ValueCache, data / "latents", data, base)


def _write_index(rows: Sequence[ValueImage], texts: Sequence[str], path: Path) -> None:
    row_of = {text: row for row, text in enumerate(texts)}
    table = pa.table(
        {
            "id": [row.id for row in rows],
            "scene": [row.scene for row in rows],
            "principle": [row.principle for row in rows],
            "aligned": [row.side == "aligned" for row in rows],
            "prompt": [row.prompt for row in rows],
            "text_row": [row_of[row.prompt] for row in rows],
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
