"""Cached latents and text embeddings of the image pairs: encode once, train many times.

Layout of ``D/latents`` (see `write_latents`):

- ``latents.safetensors``: ``winner.mean``, ``winner.std``, ``loser.mean``, ``loser.std``, each ``[pair, channel, height, width]``,
  float32, already shifted and scaled; the winner is the safe image, the loser the unsafe one. With ``flip`` also
  ``winner_flip.mean`` and so on: the same images mirrored left to right *before* encoding (an autoencoder does not commute
  with mirroring, so flipping the latents would not do). Mean and standard deviation, not one sample: the trainer draws the
  posterior anew at every step, exactly as if it encoded.
- ``text.safetensors``: ``embeds [text, tokens, dim]`` in the text encoder's dtype; for SDXL also ``pooled`` and the model's own
  ``time_ids``. Row 0 is the empty prompt (caption dropout).
- ``index.parquet``: one row a pair: id, row, text_row (unsafe prompt), safe_text_row, categories, concept, kind.
- ``retained.parquet``: one row a benign prompt that training should leave alone: prompt, text_row. May have no rows.
- ``run.json``: fingerprint of the model that encoded, and the hash of this cache.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from valign.checks import UserError
from valign.data.images.cache import EncodedImages, open_cache
from valign.data.images.row_store import RowWriter
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path, hash_file, hash_value, read_json, write_json
from valign.images import image_tensor, open_image
from valign.interfaces import LatentEncoder
from valign.progress import track
from valign.runs import Run

EMPTY_PROMPT_ROW = 0


@dataclass(frozen=True, kw_only=True)
class PairLatents:
    """Posterior of winner (safe) and loser (unsafe) images, scaled latents, float32. ``mean + std * noise`` is one sample."""

    winner_mean: Float[Tensor, "pair channel height width"]
    winner_std: Float[Tensor, "pair channel height width"]
    loser_mean: Float[Tensor, "pair channel height width"]
    loser_std: Float[Tensor, "pair channel height width"]


class LatentCache(EncodedImages):
    """The latents of image pairs."""

    content = "cached latents"
    command, step, mirrored, first = "valign data build", "latents", "_flip", "winner{}.mean"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        table = self.table  # `text_rows` are those of the unsafe prompts: the captions
        self.categories: tuple[tuple[str, ...], ...] = tuple(map(tuple, table["categories"]))
        self.concepts: tuple[str, ...] = tuple(table["concept"])
        self.kinds: tuple[str, ...] = tuple(table["kind"])
        self.safe_text_rows: Int[Tensor, " pair"] = torch.tensor(table["safe_text_row"], dtype=torch.long)
        retained = pq.read_table(folder / "retained.parquet").to_pydict()
        self.retained_rows: Int[Tensor, " text"] = torch.tensor(retained["text_row"], dtype=torch.long)
        self.retained_prompts: tuple[str, ...] = tuple(retained["prompt"])
        if not self.retained_prompts:  # the safe prompts stand in
            self.retained_rows = self.safe_text_rows.unique()

    def rows(self, category: str | None = None, concepts: Collection[str] | None = None) -> Int[Tensor, " row"]:
        """Rows of the pairs of a category (a pair of several categories is in each) and of the named concepts, ascending.

        ``None`` does not filter. Raises: UserError if no pair is left.
        """
        rows = [
            row
            for row, (has, concept) in enumerate(zip(self.categories, self.concepts, strict=True))
            if (category is None or category in has) and (concepts is None or concept in concepts)
        ]
        if not rows:
            known = ", ".join(sorted({name for has in self.categories for name in has}))
            raise UserError(
                f"{self.folder} has no pair of category {category!r}, only of {known}. Build data for it, or leave it out."
            )
        return torch.tensor(rows, dtype=torch.long)

    def batch(self, rows: Int[Tensor, " row"], flip: Bool[Tensor, " row"] | None = None) -> PairLatents:
        """Latents of ``rows``, in that order. ``flip`` picks the mirrored state, of both images of a pair alike.

        Raises: UserError if a flip is asked for that was not cached.
        """
        flip = torch.zeros(len(rows), dtype=torch.bool) if flip is None else flip
        return PairLatents(
            **{
                f"{who}_{what}": self._read(f"{who}{{}}.{what}", rows, flip)
                for who in ("winner", "loser")
                for what in ("mean", "std")
            }
        )

    def conditioning(self, text_rows: Int[Tensor, " text"]) -> dict[str, Tensor]:
        """Keyword arguments of a model's conditioning: ``embeds [text, tokens, dim]``, for SDXL also ``pooled`` and ``time_ids``.

        ``text_rows`` are values of `text_rows`, `safe_text_rows`, `retained_rows`, or `EMPTY_PROMPT_ROW`.
        """
        return self._texts(text_rows)


def open_latents(data: Path, *, base: str | None = None) -> LatentCache:
    """The latent cache of data set ``data`` (the folder with ``latents/``, or ``latents/`` itself).

    Args:
        base: Fingerprint of the model that will be trained, if known.
    Raises: UserError if the cache is missing, unfinished, or was encoded by another base model.
    """
    folder = data if (data / "index.parquet").exists() else data / "latents"
    return open_cache(LatentCache, folder, data, base)


def retained_prompts(data: Path) -> list[str]:
    """The benign prompts that data set ``data`` holds the model to; [] if it has none, or no latents yet."""
    path = data / "latents" / "retained.parquet"
    return [str(prompt) for prompt in pq.read_table(path)["prompt"].to_pylist()] if path.exists() else []


def write_latents(
    model: LatentEncoder,
    pairs: Sequence[PromptPair],
    images: Path,
    out: Path,
    *,
    retain: Sequence[str] = (),
    flip: bool = True,
    image_size: int | None = None,
    batch_size: int = 8,
) -> LatentCache:
    """Encode the images ``{id}_safe.png`` and ``{id}_unsafe.png`` of ``images``, and every distinct prompt, into ``out``.

    A kill loses at most one batch; the next call resumes there. A finished cache of the same model, images and prompts
    is returned as it is. Memory is bounded by one batch.
    Args:
        pairs: The pairs to encode, in this order; at least one.
        images: Folder with the images and their ``images.parquet`` (whose hash stands for the images).
        retain: Benign prompts on which training should leave the model as it is.
        image_size: Pixels a side at which images are encoded; None is the model's own.
    Raises: UserError if ``out`` was made from something else, or an image is missing.
    """
    if not pairs:
        raise UserError(
            "write_latents.pairs must not be empty, got 0 pairs. No pair survived the filter: use another filter or more prompts."
        )
    size = image_size or model.image_size
    recipe = {"flip": flip, "dtype": str(model.dtype), "image_size": size, "pairs": [pair.id for pair in pairs]}
    recipe |= {"retain": hash_value(list(retain))}
    run = Run.open(
        out, step="latents", recipe=recipe, inputs={"model": model.fingerprint(), "images": hash_file(images / "images.parquet")}
    )
    if not run.done:
        texts = list(dict.fromkeys(["", *(prompt for pair in pairs for prompt in (pair.unsafe, pair.safe)), *retain]))
        write_prompts(model, texts, out, batch_size)
        _write_images(model, pairs, images, out, flip, size, batch_size)
        _write_index(pairs, texts, out / "index.parquet")
        _write_retained(list(dict.fromkeys(retain)), texts, out / "retained.parquet")
        (out / "progress.json").unlink(missing_ok=True)
        run.finish(pairs=len(pairs), texts=len(texts), retained=len(set(retain)))
    return LatentCache(out)


def write_prompts(model: LatentEncoder, texts: Sequence[str], out: Path, batch_size: int) -> None:
    def encode(chunk: slice) -> dict[str, Tensor]:
        made = model.encode_prompts(texts[chunk])
        named = {"embeds": made.embeds, "pooled": made.pooled, "time_ids": made.time_ids}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    write_rows(out / "text.safetensors", len(texts), batch_size, "encode prompts", encode)


def _write_images(
    model: LatentEncoder, pairs: Sequence[PromptPair], images: Path, out: Path, flip: bool, size: int, batch_size: int
) -> None:
    def encode(chunk: slice) -> dict[str, Tensor]:
        block: dict[str, Tensor] = {}
        for who, suffix in (("winner", "safe"), ("loser", "unsafe")):
            pixels = torch.stack([load_pixels(images / f"{pair.id}_{suffix}.png", size) for pair in pairs[chunk]])
            for state, seen in (("", pixels), ("_flip", pixels.flip(-1)))[: 2 if flip else 1]:
                made = model.encode_images(seen)
                block |= {f"{who}{state}.mean": made.mean.float(), f"{who}{state}.std": made.std.float()}
        return block

    write_rows(out / "latents.safetensors", len(pairs), batch_size, "encode images", encode)


def write_rows(path: Path, rows: int, batch_size: int, what: str, encode: Callable[[slice], dict[str, Tensor]]) -> None:
    """Fill ``path`` batch by batch from ``encode(slice)``; start behind the last batch that ``progress.json`` knows."""
    if path.exists():
        return
    progress_file, partial = path.parent / "progress.json", path.with_name(path.name + ".partial")
    done = read_json(progress_file).get(path.name, 0) if progress_file.exists() and partial.exists() else 0
    writer: RowWriter | None = None
    for start in track(range(done, rows, batch_size), what, total=-(-rows // batch_size), done=done // batch_size):
        with torch.no_grad():
            block = encode(slice(start, start + batch_size))
        writer = writer or RowWriter(path, rows, block)
        writer.write(start, block)
        write_json(progress_file, {path.name: min(start + batch_size, rows)})
    if writer is None:  # killed between the last batch and the renaming
        partial.replace(path)
    else:
        writer.close()


def load_pixels(path: Path, size: int) -> Float[Tensor, "3 {size} {size}"]:
    try:
        return image_tensor(open_image(path), size)
    except UserError as error:
        raise UserError(f"{error} Delete {path.parent} and run `valign data build` again.") from None


def _write_index(pairs: Sequence[PromptPair], texts: Sequence[str], path: Path) -> None:
    row_of = {text: row for row, text in enumerate(texts)}
    table = pa.table(
        {
            "id": [pair.id for pair in pairs],
            "row": list(range(len(pairs))),
            "text_row": [row_of[pair.unsafe] for pair in pairs],
            "safe_text_row": [row_of[pair.safe] for pair in pairs],
            "categories": pa.array([list(pair.categories) for pair in pairs], pa.list_(pa.string())),
            "concept": [pair.concept for pair in pairs],
            "kind": [pair.kind for pair in pairs],
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def _write_retained(prompts: Sequence[str], texts: Sequence[str], path: Path) -> None:
    row_of = {text: row for row, text in enumerate(texts)}
    table = pa.table(
        {
            "prompt": pa.array(prompts, pa.string()),
            "text_row": pa.array([row_of[prompt] for prompt in prompts], pa.int64()),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
