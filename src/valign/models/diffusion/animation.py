"""Short animations from an image model: frames of one prompt along a path of noise."""

from collections.abc import Sequence

from PIL.Image import Image

from valign.checks import check_range
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.sampling import generate


def animate(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    frames: int,
    seeds: Sequence[int] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
) -> list[list[Image]]:
    """``frames`` images per prompt. Between neighbours the noise turns by the same angle, from the seed's to that of the seed + 1.

    Nothing ties the frames together but prompt and noise: what a prompt leaves open may jump from one to the next.

    Args:
        frames: At least 2; the first is the image of the prompt's seed, the last that of the next seed.
        seeds: One per prompt; those of ``sampling`` where not given.
    Raises: ValueError as `generate`, or for fewer than 2 frames.
    """
    check_range("animate.frames", frames, low=2)
    first = sampling.seeds(len(prompts)) if seeds is None else seeds
    shares = [number / (frames - 1) for number in range(frames)]
    images = generate(
        model,
        [prompt for prompt in prompts for _ in shares],
        seeds=[seed for seed in first for _ in shares],
        sampling=sampling,
        toward=[(seed + 1, share) for seed in first for share in shares],
    )
    return [images[start : start + frames] for start in range(0, len(images), frames)]
