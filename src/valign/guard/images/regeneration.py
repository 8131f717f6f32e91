"""Generate, check, and generate again in a safer style: a flagged image is never returned (VALOR, arXiv 2511.11693, re-checked)."""

from collections.abc import Callable, Sequence

from PIL.Image import Image

from valign.guard.images.image_check import check_image
from valign.guard.records import GenerationAttempt
from valign.interfaces import Detector

GenerateImage = Callable[[str, int], Image]  # caption, seed -> image


def generate_checked(
    generate: GenerateImage,
    prompt: str,
    *,
    seed: int,
    styles: Sequence[str],
    tries: int,
    detector: Detector | None,
    passes: Callable[[str], bool],
    principle: Callable[[str, int], str] = lambda caption, seed: "",
) -> tuple[Image | None, tuple[GenerationAttempt, ...]]:
    """The first image that passes, or None; and what every attempt gave.

    Attempt 0 is the bare prompt; attempt i, at most ``tries``, puts ``styles[i - 1]`` behind it and has the seed ``seed + i``.
    Args:
        detector: None returns the first image unchecked.
        passes: Whether a styled caption passes the guard; a style that does not is left out.
        principle: Caption and seed -> the principle whose token ``generate`` gives it, for the record.
    """
    attempts: list[GenerationAttempt] = []
    for number, style in enumerate(["", *styles[:tries]]):
        caption = f"{prompt}, {style}" if style else prompt
        if style and not passes(caption):
            continue
        image = generate(caption, seed + number)
        verdict = None if detector is None else check_image(detector, image)
        named = principle(caption, seed + number)
        attempts.append(GenerationAttempt(style=style, seed=seed + number, verdict=verdict, principle=named))
        if verdict is None or not verdict.fired:
            return image, tuple(attempts)
    return None, tuple(attempts)
