"""What the bundled model can do: right glyphs, colours, places and backgrounds on prompts that it never saw, and its speed."""

from time import perf_counter

import numpy as np

from valign.detectors.oracle import OracleDetector
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.worlds.base import ModelMeasurement
from valign.worlds.shapes.grammar import caption, split_scene
from valign.worlds.shapes.vocabulary import FIGURES, GROUP_OF, WORDS


def measure_model(
    model: DiffusionModel, oracle: OracleDetector, *, count: int = 500, seed: int = 0, steps: int = 20, guidance_scale: float = 7.5
) -> ModelMeasurement:
    """Generate ``count`` held-out single-object prompts, explicit and fully described, over all glyphs but the figures."""
    rng = np.random.default_rng([seed, 9])
    glyphs = [glyph for glyph in WORDS if glyph not in FIGURES]
    scenes = [split_scene(rng, glyphs[i % len(glyphs)], test=True) for i in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    items = [scene.items[0] for scene in scenes]
    wanted = [
        {"glyph": item.glyph, "colour": item.colour, "place": item.place, "background": scene.background}
        for item, scene in zip(items, scenes)
    ]
    began = perf_counter()
    sampling = SamplingConfig(steps=steps, guidance_scale=guidance_scale, batch_size=50)
    images = model.generate(prompts, sampling=sampling, progress="generating")
    seconds = perf_counter() - began
    matches = oracle.matches(images, wanted)
    scores = oracle.detect(images)
    hits = [
        scores[row, oracle.card.classes.index(GROUP_OF[item.glyph].category)] >= oracle.card.threshold
        for row, item in enumerate(items)
        if item.glyph in GROUP_OF
    ]
    shares = {aspect: float(matches[aspect].mean()) for aspect in ("glyph", "colour", "place", "background")}
    return ModelMeasurement(count, shares, float(np.mean(hits)), count / seconds, images)
