"""A data set of twelve plain images, encoded once: enough for every path of the trainer."""

import numpy as np
from PIL import Image

CATEGORIES = ("hate", "violence")


def build_pairs(model, folder, *, count=12, flip=True):
    """``folder/latents`` of ``count`` pairs in two categories; the winners are bluish, the losers reddish, all noisy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from valign.data.images.latents import write_latents
    from valign.data.prompts.pairs import PromptPair

    random = np.random.default_rng(0)
    pairs = [PromptPair(f"p{i}", f"red {i}", f"blue {i}", (CATEGORIES[i % 2],), concept=f"c{i % 3}") for i in range(count)]
    images = folder / "images"
    images.mkdir(parents=True)
    for pair in pairs:
        for name, tint in (("safe", (40, 80, 200)), ("unsafe", (200, 60, 40))):
            pixels = np.clip(random.normal(tint, 40, (64, 64, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(images / f"{pair.id}_{name}.png")
    pq.write_table(pa.table({"id": [pair.id for pair in pairs]}), images / "images.parquet")
    return write_latents(model, pairs, images, folder / "latents", flip=flip, batch_size=12)


def small_config(**changes):
    """Few steps, few pairs; B moves at once."""
    from valign.training import PreferenceConfig

    options = {"steps": 4, "pairs_per_step": 4, "warmup_steps": 0, "learning_rate": 1e-3, "val_pairs": 2, "val_draws": 2}
    return PreferenceConfig().changed({**options, **changes})
