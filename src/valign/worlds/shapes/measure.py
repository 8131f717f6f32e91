"""What the bundled model can do: right glyphs, colours, places and backgrounds on prompts that it never saw, and its speed."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from valign.detectors.oracle import OracleDetector
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.worlds.base import ModelMeasurement
from valign.worlds.shapes.grammar import caption, composed_scene, mention, split_scene
from valign.worlds.shapes.renderer import Scene
from valign.worlds.shapes.vocabulary import FIGURES, GROUP_OF, GROUPS, HELD_OUT_STYLE, PREAMBLES, WORDS

GLYPHS = tuple(glyph for glyph in WORDS if glyph not in FIGURES)
KINDS = ("two things", "three things", "composed", "mentioned", "adversarial", "foreign", "late", "tilted")


def measure_model(
    model: DiffusionModel, oracle: OracleDetector, *, count: int = 500, seed: int = 0, steps: int = 20, guidance_scale: float = 7.5
) -> ModelMeasurement:
    """Generate ``count`` held-out prompts for one thing, explicit and fully described, over all glyphs but the figures.

    A tenth as many again, at least one, of each of `KINDS`.
    """
    rng = np.random.default_rng([seed, 9])
    scenes = [split_scene(rng, GLYPHS[i % len(GLYPHS)], test=True) for i in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    items = [scene.items[0] for scene in scenes]
    wanted = [
        {"glyph": item.glyph, "colour": item.colour, "place": item.place, "background": scene.background}
        for item, scene in zip(items, scenes)
    ]
    sampling = SamplingConfig(steps=steps, guidance_scale=guidance_scale, batch_size=50)
    began = perf_counter()
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

    each = max(1, count // 10)
    asked = [(kind, *_of_kind(kind, rng)) for kind in KINDS for _ in range(each)]
    shown = oracle.read(model.generate([text for _, text, _ in asked], sampling=sampling, progress="generating"))
    right = [{item[:2] for item in found.items} == _places(scene) for found, (_, _, scene) in zip(shown, asked)]
    kinds = {kind: _share(right[i * each : (i + 1) * each]) for i, kind in enumerate(KINDS)}
    return ModelMeasurement(count, shares, kinds, float(np.mean(hits)), count / seconds, images)


def _of_kind(kind: str, rng: np.random.Generator) -> tuple[str, Scene]:
    """A caption and its scene, of the test split."""
    glyph = str(rng.choice(GLYPHS))
    if kind == "composed":
        scene = composed_scene(rng, GROUPS[int(rng.integers(len(GROUPS)))], test=True)
        return caption(scene, rng), scene
    if kind == "mentioned":
        scene = split_scene(rng, str(rng.choice(("sign", glyph))), test=True)
        named = scene.items[0].glyph
        other = str(rng.choice([name for name in GLYPHS if name != named]))
        return caption(scene, rng, nouns=(mention(named, other, rng),)), scene
    others = {"two things": 1, "three things": 2, "late": 1}.get(kind, 0)
    scene = split_scene(rng, glyph, test=True, others=others, **({"styles": (HELD_OUT_STYLE,)} if kind == "tilted" else {}))
    if kind == "late":
        return caption(scene, rng, turn=1, preamble=str(rng.choice(PREAMBLES))), scene
    return caption(scene, rng, kind=kind if kind in ("adversarial", "foreign") else "explicit"), scene


def _places(scene: Scene) -> set[tuple[str, str]]:
    return {(item.place, item.glyph) for item in scene.items}


def _share(right: Sequence[bool]) -> float:
    return float(np.mean(right))
