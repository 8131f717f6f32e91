"""A value data set of plain images: two principles, two scenes each, three images a side."""

import numpy as np
from PIL import Image

PRINCIPLES = [
    {"id": "blue", "text": "blue is wanted", "aliases": ["bluish"]},
    {"id": "dark", "text": "bright light is considered inappropriate", "aliases": []},
]
TINTS = {"blue": ((40, 80, 200), (200, 60, 40)), "dark": ((30, 30, 30), (230, 230, 220))}


def build_value_data(model, folder, *, flip=True, count=3):
    """``folder/latents``; aligned count are bluish or dark, violating ones reddish or bright, all noisy."""
    from valign.data.images.value_images import SIDES, ValueImage, drop_lonely
    from valign.data.images.value_sets import ValueDataConfig, write_values

    random = np.random.default_rng(0)
    images, rows = folder / "images", []
    images.mkdir(parents=True)
    for principle, tints in TINTS.items():
        for scene in ("a cat", "a red tree"):
            for side, tint in zip(SIDES, tints, strict=True):
                for number in range(count):
                    name = f"{principle}-{scene[2:]}"
                    row = ValueImage(
                        id=f"{name}-{side[0]}{number:02d}",
                        scene=name,
                        principle=principle,
                        side=side,
                        prompt=scene,
                        text=f"{scene} {side}",
                        other=scene,
                        seed=number,
                    )
                    pixels = np.clip(random.normal(tint, 40, (64, 64, 3)), 0, 255).astype("uint8")
                    Image.fromarray(pixels).save(images / f"{row.id}.png")
                    rows.append(row)
    (images / "pictures.parquet").write_bytes(b"made by hand")
    config = ValueDataConfig(flip=flip, batch_size=8)
    return write_values(model, drop_lonely(rows), PRINCIPLES, images, folder / "latents", config)


def small_value_config(**changes):
    """Few steps, few pairs."""
    from valign.training import PreferenceConfig

    options = {"steps": 4, "pairs_per_step": 4, "warmup_steps": 0, "learning_rate": 1e-4, "val_pairs": 2, "val_draws": 2}
    options |= {"empty_prompt_prob": 0.0, "displacement_stop": 1e6, "displacement_warn": 1e6}
    return PreferenceConfig().changed({**options, **changes})
