"""D1 and D2 of every system on prompts that name a role, with paired intervals; a part of `bench_methods`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from valign.detectors.oracle import OracleDetector
from valign.evaluation.images.bias import Bias, bias_interval, mean_bias
from valign.evaluation.images.folder import make_images
from valign.evaluation.report.sections import Section
from valign.evaluation.statistics import Interval
from valign.evaluation.suite import Suite
from valign.evaluation.systems import System
from valign.interfaces import SamplingConfig
from valign.worlds.shapes import heads
from valign.worlds.shapes.vocabulary import HEADS


@dataclass(frozen=True)
class RoleBias:
    """One system on all role prompts; None where no image shows a head. ``readable``: share of images that do."""

    name: str
    readable: float
    bias: Bias | None
    d1: Interval | None
    versus: Interval | None  # D1 minus the base's, at the same seeds


def role_bias(
    systems: Sequence[System], suite: Suite, oracle: OracleDetector, out: Path, sampling: SamplingConfig, *, seed: int = 0
) -> list[RoleBias]:
    """Generate ``suite`` with every system into ``out`` and count heads; the first system is the base.

    Args:
        suite: Equal texts of one run in a row, equally many of each.
    """
    found: list[RoleBias] = []
    base: Int[np.ndarray, "prompt image"] | None = None
    for system in systems:
        settings: dict[str, object] = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
        folder = make_images(system, suite, suite.seeds(seed), out / system.name, settings=settings, batch_size=sampling.batch_size)
        images = [folder.open(prompt.id) for prompt in suite.prompts]
        shown_images = [image for image in images if image is not None]
        readings = iter(oracle.read(shown_images) if shown_images else [])
        shown = np.array([-1 if image is None else heads(next(readings)) for image in images])
        shown = shown.reshape(len({_prompt(prompt.id) for prompt in suite.prompts}), -1)
        base = shown if base is None else base
        found.append(_summary(system.name, shown, base, seed))
    return found


def _summary(name: str, shown: Int[np.ndarray, "prompt image"], base: Int[np.ndarray, "prompt image"], seed: int) -> RoleBias:
    counts = np.stack([(shown == head).sum(axis=1) for head in range(len(HEADS))], axis=1)
    known = {str(row): list(map(int, count)) for row, count in enumerate(counts) if count.sum()}
    return RoleBias(
        name,
        float((shown >= 0).mean()),
        mean_bias(known) if known else None,
        bias_interval(shown, len(HEADS), seed=seed),
        None if base is shown else bias_interval(shown, len(HEADS), base=base, seed=seed),
    )


def _prompt(image_id: str) -> str:
    """``r0-captain-1-023`` is of prompt ``r0-captain-1``."""
    return image_id.rpartition("-")[0]


def bias_section(found: Sequence[RoleBias]) -> Section:
    """The table of the report."""
    rows = []
    for one in found:
        if one.bias is None or one.d1 is None:
            rows.append((one.name, "–", "–", "–", f"{one.readable:.0%}"))
            continue
        change = "" if one.versus is None else f"{one.versus.value:+.2f} [{one.versus.low:+.2f}, {one.versus.high:+.2f}]"
        rows.append(
            (
                one.name,
                f"{one.bias.d1:.2f} ({one.d1.low:.2f}–{one.d1.high:.2f})",
                change,
                f"{one.bias.d2:.2f}",
                f"{one.readable:.0%}",
            )
        )
    return Section(
        title="Social bias",
        text="Prompts name a role and leave the head open; the training images favoured one. 0 is balance.",
        header=("D1 ↓", "against the base", "D2 ↓", "images with a head"),
        rows=tuple(rows),
        note="D1 and D2 as in arXiv 2410.12700, averaged over prompts; 95 % intervals over resampled images, paired where two are "
        "compared. The number after livo is the share of images that get the token.",
    )
