"""Train the oracle on renders and measure its error on scenes that it never saw."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from valign.detectors.oracle import OracleConfig, OracleDetector, OracleNet, save_oracle
from valign.worlds.shapes.build.examples import to_tensor
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.grammar import composed_scene, harms, is_test_scene, random_scene
from valign.worlds.shapes.renderer import BACKGROUNDS, COLOURS, PLACES, SIZE, STYLES, Scene, render, render_array
from valign.worlds.shapes.vocabulary import GLYPHS, GROUP_OF, GROUPS

BUDGET = Budget(steps=1200, batch=96, lr=2e-3)
FURTHER = Budget(steps=300, batch=32, lr=1e-3, warmup=20)  # from an earlier version's weights
OTHERS = (0.6, 0.2, 0.2)  # of scenes with one, two and three things
CONFIG = OracleConfig(
    image_size=SIZE,
    glyphs=GLYPHS,
    colours=tuple(COLOURS),
    places=PLACES,
    backgrounds=tuple(BACKGROUNDS),
    styles=STYLES,
    categories={glyph: group.category for glyph, group in GROUP_OF.items()},
    compositions={group.category: (group.composed,) for group in GROUPS},
)


def train_oracle(folder: Path, logs: Path, *, seed: int = 0, budget: Budget = BUDGET, start: Path | None = None) -> None:
    """Train and save to ``folder``; `oracle.json` holds the accuracies on 2,000 held-out renders.

    Args: start: An earlier version's oracle, whose weights are taken for all that both can name.
    """
    torch.manual_seed(seed)
    net = OracleNet(CONFIG)
    if start is not None:
        take_weights(net, OracleDetector(start, domain=()))

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, 1, step])
        scenes: list[Scene] = []
        while len(scenes) < budget.batch:
            scene = random_scene(rng, others=int(rng.choice(3, p=OTHERS)), styles=STYLES)
            if not is_test_scene(scene):
                scenes.append(scene)
        images = _roughen(to_tensor([render_array(scene, rng) for scene in scenes]), rng)
        logits, truth = net(images), labels(scenes)
        seen = truth["colour"] >= 0
        parts = {
            "glyph": F.cross_entropy(logits.glyph.flatten(0, 1), truth["glyph"].flatten()),
            "colour": F.cross_entropy(logits.colour[seen], truth["colour"][seen]),
            "background": F.cross_entropy(logits.background, truth["background"]),
            "style": F.cross_entropy(logits.style, truth["style"]),
        }
        return {"loss": 3 * parts["glyph"] + parts["colour"] + 0.3 * parts["background"] + 0.3 * parts["style"], **parts}

    fit(net, loss, budget, logs, "oracle")
    save_oracle(folder, net, CONFIG)
    measured = measure(OracleDetector(folder, domain=()), count=2000, seed=seed)
    save_oracle(folder, net, replace(CONFIG, measured=measured))


def measure(oracle: OracleDetector, *, count: int, seed: int) -> dict[str, float]:
    """Accuracy per aspect, and sensitivity and specificity of "harmful", on held-out scenes of one to three things.

    One scene in ten is a harmful composition of two benign things.
    """
    rng = np.random.default_rng([seed, 2])
    scenes: list[Scene] = []
    while len(scenes) < count:
        if rng.random() < 0.1:
            scenes.append(composed_scene(rng, GROUPS[int(rng.integers(len(GROUPS)))], test=True))
            continue
        scene = random_scene(rng, others=int(rng.choice(3, p=OTHERS)), styles=STYLES)
        if is_test_scene(scene):
            scenes.append(scene)
    images: list[Image.Image] = [render(scene, seed + i) for i, scene in enumerate(scenes)]
    readings = oracle.read(images)
    truth = [{(item.place, item.glyph, item.colour) for item in scene.items} for scene in scenes]
    harmful = np.array([bool(harms(item.glyph for item in scene.items)) for scene in scenes])
    flagged = np.any(oracle.detect(images) >= oracle.card.threshold, axis=1)

    def share(right: list[bool]) -> float:
        return round(float(np.mean(right)), 5)

    return {
        "renders": count,
        "whole_scene": share([set(r.items) == t and r.background == s.background for r, t, s in zip(readings, truth, scenes)]),
        "glyph": share([{i[:2] for i in r.items} == {i[:2] for i in t} for r, t in zip(readings, truth)]),
        "colour": share([{(i[0], i[2]) for i in r.items} == {(i[0], i[2]) for i in t} for r, t in zip(readings, truth)]),
        "background": share([r.background == s.background for r, s in zip(readings, scenes)]),
        "style": share([r.style == s.style for r, s in zip(readings, scenes)]),
        "sensitivity": round(float(flagged[harmful].mean()), 5),
        "specificity": round(float((~flagged[~harmful]).mean()), 5),
        "positives": int(harmful.sum()),
        "negatives": int((~harmful).sum()),
    }


def take_weights(net: OracleNet, earlier: OracleDetector) -> None:
    """Copy the earlier oracle's weights in place: whole layers, and of the heads the rows of names that both have."""
    old = earlier.net.state_dict()
    names = {"glyph": ((*earlier.config.glyphs, ""), (*CONFIG.glyphs, ""))}
    for head in ("colour", "background", "style"):
        names[head] = tuple(getattr(config, f"{head}s") for config in (earlier.config, CONFIG))
    with torch.no_grad():
        for name, value in net.state_dict().items():
            before, now = names.get(name.split(".")[0], ((), ()))
            if not now:
                value.copy_(old[name])
            for row, word in enumerate(now):
                if word in before:
                    value[row] = old[name][before.index(word)]


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices: glyph (or empty) and colour (or -1) at every place, background and style."""
    glyph = torch.full((len(scenes), len(PLACES)), len(GLYPHS))
    colour = torch.full((len(scenes), len(PLACES)), -1)
    places, colours = list(PLACES), list(COLOURS)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            glyph[row, places.index(item.place)] = GLYPHS.index(item.glyph)
            colour[row, places.index(item.place)] = colours.index(item.colour)
    backgrounds = list(BACKGROUNDS)
    return {
        "glyph": glyph,
        "colour": colour,
        "background": torch.tensor([backgrounds.index(scene.background) for scene in scenes]),
        "style": torch.tensor([STYLES.index(scene.style) for scene in scenes]),
    }


def _roughen(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise, contrast and a pixel's shift, so that a generated image's small faults do not mislead the oracle."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images.lerp(soft, uniform(-0.2, 0.9))
    images = images * uniform(0.88, 1.08) + uniform(-0.08, 0.08)
    images = images + uniform(0, 0.12) * torch.randn(images.shape, generator=generator)
    dx, dy = rng.integers(-2, 3, size=2)
    return torch.roll(images, (int(dy), int(dx)), dims=(2, 3)).clamp(-1.1, 1.1)
