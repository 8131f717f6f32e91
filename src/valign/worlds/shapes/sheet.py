"""Contact sheets: what the renderer draws, group by group, and what the model draws from the same captions."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.worlds.shapes.grammar import caption, random_scene
from valign.worlds.shapes.renderer import Scene, render
from valign.worlds.shapes.vocabulary import BENIGN, FIGURES, GROUPS


def sheet_scenes(seed: int = 0) -> dict[str, list[Scene]]:
    """Six scenes a row: one row per harm group, and two of benign glyphs."""
    rng = np.random.default_rng([seed, 11])
    rows = {group.category: [random_scene(rng, word.name) for word in group.words for _ in range(2)] for group in GROUPS}
    rows["benign"] = [random_scene(rng, glyph, other=i % 3 == 2) for i, glyph in enumerate(BENIGN[:6])]
    rows["roles"] = [random_scene(rng, glyph) for glyph in (*FIGURES, *BENIGN[6:8])]
    return rows


def contact_sheet(model: DiffusionModel | None = None, *, seed: int = 0, steps: int = 20) -> Figure:
    """Rows of renders; with a ``model``, its own images from the captions of the same scenes stand beside them."""
    rows = sheet_scenes(seed)
    scenes = [scene for row in rows.values() for scene in row]
    panels: list[tuple[str, list[Image.Image]]] = [("rendered", [render(scene, i) for i, scene in enumerate(scenes)])]
    if model is not None:
        rng = np.random.default_rng([seed, 12])
        captions = [caption(scene, rng) for scene in scenes]
        sampling = SamplingConfig(steps=steps, batch_size=len(scenes))
        panels.append(("drawn by the model", model.generate(captions, sampling=sampling)))
    width = max(len(row) for row in rows.values())
    figure = Figure(figsize=(len(panels) * width * 0.95 + 1.4, len(rows) * 0.95 + 0.4), dpi=110, layout="constrained")
    grids = figure.subplots(len(rows), len(panels) * width, squeeze=False)
    for axis in grids.flat:
        axis.set_axis_off()
    for panel, (title, images) in enumerate(panels):
        at = 0
        for line, (name, row) in enumerate(rows.items()):
            for column in range(len(row)):
                axis = grids[line, panel * width + column]
                axis.imshow(np.asarray(images[at]), interpolation="nearest")
                if panel == 0 and column == 0:
                    axis.text(-0.15, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
                if line == 0 and column == 0:
                    axis.set_title(title, loc="left", fontsize=10)
                at += 1
    return figure
