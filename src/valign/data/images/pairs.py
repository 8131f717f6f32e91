"""Images of prompt pairs: made by the model that will be aligned, or taken from a folder; then filtered.

How the safe image is tied to the unsafe one beyond the paired prompt is not known of the published sets (AlignGuard,
arXiv 2412.10493), so it is a choice: ``pairing="seed"`` starts both from one initial latent, which keeps the layout; ``"img2img"``
starts the safe one from the unsafe image; ``"free"`` starts them from different latents.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from valign.checks import UserError, check_choice
from valign.data.images.filters import check_filter, drop_reason, score_pairs
from valign.data.images.rows import ImageRow, write_image_rows
from valign.data.journal import Journal
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path, hash_file
from valign.images import count_frames, image_files, open_image
from valign.interfaces import Detector, Sampler, SamplingConfig
from valign.progress import console, track

PAIRINGS = ("seed", "img2img", "free")


def pair_seed(run_seed: int, pair_id: str, side: str = "") -> int:
    """Seed of a pair's initial latent, ``[0, 2^32)``: a hash, so it depends neither on the order nor on the number of pairs."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{pair_id}{side}".encode()).digest()[:4], "big")


def make_images(
    model: Sampler,
    pairs: Sequence[PromptPair],
    folder: Path,
    *,
    pairing: str = "seed",
    sampling: SamplingConfig = SamplingConfig(),
    strength: float = 0.7,
    filter: str = "none",
    detector: Detector | None = None,
) -> list[ImageRow]:
    """Generate both images of every pair into ``folder`` and judge them. A kill loses at most one batch.

    Args:
        sampling: Its seed is that of every pair's own seed.
        strength: How far ``"img2img"`` may leave the unsafe image, (0, 1]; 1 ignores it.
        filter: ``"detector"`` keeps a pair only if the detector flags the unsafe image and not the safe one.
        detector: Scores every image, also when the filter is ``"none"``.
    Returns: one row a pair, in the order of ``pairs``; also written to ``images.parquet``.
    """
    check_choice("make_images.pairing", pairing, PAIRINGS)
    check_filter(filter, detector)
    journal = Journal(folder / "journal.jsonl")
    for chunk in _open_chunks(pairs, journal, sampling.batch_size, "make image pairs"):
        seeds = [pair_seed(sampling.seed, pair.id) for pair in chunk]
        safe_seeds = [pair_seed(sampling.seed, pair.id, ":safe") for pair in chunk] if pairing == "free" else seeds
        unsafe = model.generate([pair.unsafe for pair in chunk], seeds=seeds, sampling=sampling)
        start = unsafe if pairing == "img2img" else None
        safe = model.generate([pair.safe for pair in chunk], seeds=safe_seeds, sampling=sampling, start=start, strength=strength)
        _remember(journal, _record(chunk, unsafe, safe, seeds, folder, filter, detector))
    return _finish(pairs, folder, journal)


def import_images(
    pairs: Sequence[PromptPair],
    source: Path,
    folder: Path,
    *,
    batch_size: int = 8,
    filter: str = "none",
    detector: Detector | None = None,
) -> list[ImageRow]:
    """Copy the images of a published set into ``folder`` as PNG and judge them, as `make_images` does.

    In ``source`` they are called ``u_{id}.*`` and ``s_{id}.*`` (CoProV2) or ``{id}_unsafe.*`` and ``{id}_safe.*``; only files with
    the ending of an image count. An unreadable one drops its pair; of an animated one the first frame is taken; both are said.
    Raises: UserError if an image is missing, or there are two of one name.
    """
    check_filter(filter, detector)
    check_folder(source)
    by_stem: dict[str, Path] = {}
    wanted = {f"{side}_{pair.id}" for pair in pairs for side in "us"} | {
        f"{pair.id}_{word}" for pair in pairs for word in ("unsafe", "safe")
    }
    for path in image_files(source):
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in by_stem and stem in wanted:
            raise UserError(f"{source} must hold one image of each name, got {by_stem[stem].name} and {path.name}. Remove one.")
        by_stem[stem] = path
    names = {
        pair.id: [(f"{side}_{pair.id}", f"{pair.id}_{word}") for side, word in (("u", "unsafe"), ("s", "safe"))] for pair in pairs
    }
    missing = [stems[0] for both in names.values() for stems in both if not any(stem in by_stem for stem in stems)]
    if missing:
        raise UserError(
            f"{source} must hold both images of every pair, {len(missing)} are missing, first {missing[0]}. "
            "Add them, or take those pairs out of the prompt file."
        )
    journal = Journal(folder / "journal.jsonl")
    for chunk in _open_chunks(pairs, journal, batch_size, "copy image pairs"):
        found = [
            [_readable(next(by_stem[stem] for stem in stems if stem in by_stem)) for stems in names[pair.id]] for pair in chunk
        ]
        unsafe, safe = ([both[side] for both in found] for side in (0, 1))
        _remember(journal, _record(chunk, unsafe, safe, [0] * len(chunk), folder, filter, detector))
    return _finish(pairs, folder, journal)


def check_folder(source: Path) -> None:
    """Raises: UserError if ``source`` is not a folder."""
    if not source.is_dir():
        raise UserError(
            f"{source} must be a folder of images, got {'a file' if source.exists() else 'nothing there'}. Check the path."
        )


def _open_chunks(pairs: Sequence[PromptPair], journal: Journal, size: int, what: str) -> Iterator[Sequence[PromptPair]]:
    """Batches whose pairs are not all in the journal. Borders do not move, so that a resumed batch is the batch it was."""
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    left = [chunk for chunk in chunks if any(pair.id not in journal.entries for pair in chunk)]
    return track(left, what, total=len(chunks), done=len(chunks) - len(left))


def _readable(path: Path) -> Image.Image | None:
    """The image, or None, and why, if it cannot be read."""
    try:
        if (frames := count_frames(path)) > 1:
            console.print(f"{path} is animated: the first of {frames} frames is taken", style="yellow")
        return open_image(path)
    except UserError as error:
        console.print(f"left out: {error}", style="yellow")
        return None


def _record(
    pairs: Sequence[PromptPair],
    unsafe: Sequence[Image.Image | None],
    safe: Sequence[Image.Image | None],
    seeds: Sequence[int],
    folder: Path,
    filter: str,
    detector: Detector | None,
) -> list[ImageRow]:
    """Write a batch's images and say what became of each pair, in the order of ``pairs``."""
    rows = {
        pair.id: ImageRow(id=pair.id, seed=seed, kept=False, reason="unreadable") for pair, seed in zip(pairs, seeds, strict=True)
    }
    good = [(pair, bad, well) for pair, bad, well in zip(pairs, unsafe, safe, strict=True) if bad is not None and well is not None]
    scores = score_pairs(detector, [pair for pair, _, _ in good], [bad for _, bad, _ in good], [well for _, _, well in good])
    for (pair, bad, well), (harm_unsafe, harm_safe) in zip(good, scores, strict=True):
        hashes = _save(bad, folder / f"{pair.id}_unsafe.png") + _save(well, folder / f"{pair.id}_safe.png")
        reason = ""
        if filter == "detector" and detector is not None:
            reason = drop_reason(harm_unsafe, harm_safe, detector.card.threshold)
        reason = reason or ("equal" if bad.tobytes() == well.tobytes() else "")
        rows[pair.id] = ImageRow(
            id=pair.id,
            seed=rows[pair.id].seed,
            kept=not reason,
            reason=reason,
            harm_unsafe=harm_unsafe,
            harm_safe=harm_safe,
            sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        )
    return list(rows.values())


def _save(image: Image.Image, path: Path) -> str:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return hash_file(path)


def _remember(journal: Journal, rows: Sequence[ImageRow]) -> None:
    """A line of the journal says that both images are on disk."""
    journal.add(*({"key": row.id, **asdict(row)} for row in rows))


def _finish(pairs: Sequence[PromptPair], folder: Path, journal: Journal) -> list[ImageRow]:
    rows = [ImageRow(**{name: value for name, value in journal.entries[pair.id].items() if name != "key"}) for pair in pairs]
    write_image_rows(folder, rows)
    return rows
