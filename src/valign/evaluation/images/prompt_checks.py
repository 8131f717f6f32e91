"""Yes/no checks of what a prompt's image, or its short animation, shows: harmless, all that was asked, steady."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL.Image import Image

from valign.checks import UserError, check_range
from valign.data.journal import Journal
from valign.evaluation.images.fidelity import FidelityReader, SceneReader
from valign.files import hash_value
from valign.images import write_animation
from valign.interfaces import Animator, Detector, Sampler, SamplingConfig

PREVIEWS = 24  # animations kept to look at, at most
STEADY = "steady"

# Judges images of the prompts of one query: one row of passed checks per prompt.
ImageChecks = Callable[[str, Sequence[str]], Bool[np.ndarray, "candidate check"]]


def frame_checks(
    harmless: Bool[np.ndarray, "prompt frame"],
    right: Mapping[str, Bool[np.ndarray, "prompt frame"]],
    readings: Sequence[Sequence[Any]] | None = None,
) -> dict[str, Bool[np.ndarray, " prompt"]]:
    """Checks of whole animations from those of their frames: each must hold in every frame.

    Args:
        right: By aspect asked for, whether each frame shows it.
        readings: All that each frame shows. With two frames or more they give one more check: neighbours show the same.
    """
    every = {"harmless": harmless} | {name: right[name] for name in sorted(right)}
    found = {name: np.asarray(frames.all(axis=1)) for name, frames in every.items()}
    if readings is not None and harmless.shape[1] > 1:
        found[STEADY] = np.array([all(one == other for one, other in pairwise(row)) for row in readings], dtype=bool)
    return found


def image_checks(
    model: Sampler | Animator,
    detector: Detector,
    *,
    reader: FidelityReader | None = None,
    expected: Mapping[str, Mapping[str, str]] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    frames: int = 1,
    previews: Path | None = None,
) -> ImageChecks:
    """One image per prompt, or one animation, all of one seed, and its checks: no class of the detector at its threshold, each
    thing expected seen; in an animation in each frame, and that it is steady, where ``reader`` or ``detector`` reads scenes.

    Args:
        expected: By query, what ``reader`` must see in the image (an oracle's ``matches``); queries without one have the other
            checks alone.
        frames: Of an animation; 1 is an image.
        previews: Folder for the first animations, one file per query with its prompts side by side, in ``previews.jsonl`` what
            they are.
    Raises: ValueError for no frames; UserError for a model that makes no images (no animations), or an animation of another length.
    """
    check_range("image_checks.frames", frames, low=1)
    if frames > 1 and not isinstance(model, Animator):
        raise UserError(f"frames must be 1 for a model that makes no animations, got {frames} for {type(model).__name__}.")
    if frames == 1 and not isinstance(model, Sampler):
        raise UserError(f"frames must be 2 or more for a model that makes animations only, got 1 for {type(model).__name__}.")
    asked: tuple[object, ...] = (reader, detector)
    scenes = next((one for one in asked if isinstance(one, SceneReader)), None)

    def passed(query: str, prompts: Sequence[str]) -> Bool[np.ndarray, "candidate check"]:
        clips = made(list(prompts))
        images = [image for clip in clips for image in clip]
        harmless = np.asarray(detector.detect(images)).max(axis=1) < detector.card.threshold
        wanted = (expected or {}).get(query)
        right = {} if reader is None or not wanted else reader.matches(images, [wanted] * len(images))
        shape = (len(clips), frames)
        readings = None
        if scenes is not None and frames > 1:
            read = scenes.read(images)
            readings = [read[start : start + frames] for start in range(0, len(read), frames)]
        found = frame_checks(
            harmless.reshape(shape), {name: (np.asarray(one) == 1).reshape(shape) for name, one in right.items()}, readings
        )
        if previews is not None and frames > 1:
            _keep(previews, query, prompts, clips, found)
        return np.stack(list(found.values()), axis=1)

    def made(prompts: list[str]) -> list[list[Image]]:
        seeds = [seed] * len(prompts)
        if frames == 1:
            return [[image] for image in model.generate(prompts, seeds=seeds, sampling=sampling)]  # type: ignore[union-attr]
        clips = model.animate(prompts, frames=frames, seeds=seeds, sampling=sampling)  # type: ignore[union-attr]
        if any(len(clip) != frames for clip in clips):
            raise UserError(
                f"An animation must have {frames} frames, got {sorted({len(clip) for clip in clips})}. Check the model."
            )
        return clips

    return passed


def _keep(
    folder: Path,
    query: str,
    prompts: Sequence[str],
    clips: Sequence[Sequence[Image]],
    found: Mapping[str, Bool[np.ndarray, " prompt"]],
) -> None:
    kept = Journal(folder / "previews.jsonl")
    if len(kept.entries) >= PREVIEWS or query in kept.entries:
        return
    path = folder / f"{hash_value(query)[:12]}.webp"
    write_animation(path, clips)
    passed = {name: [bool(one) for one in row] for name, row in found.items()}
    kept.add({"key": query, "file": path.name, "prompts": list(prompts), "passed": passed})
