"""What does a LiVO step cost, against the way of the authors' script? Prints one table.

    python benchmarks/livo_step.py                        # the bundled miniature
    python benchmarks/livo_step.py --model sd15 --pairs 2   # random weights in the sizes of Stable Diffusion 1.5; wants a GPU

The authors' script reads and encodes both images and the prompt at every step, and runs the U-Net four times, for policy and
reference on the aligned and the violating image. Its U-Net is frozen, so the two reference passes build no graph, and none is
built here either. Ours reads the cache of `valign data build-values` and runs the U-Net twice; with stored reference errors, which
is timed as it runs once they are there, once. Each variant runs in a process of its own, in turns; the fastest median counts.
"""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from dpo_step import compare, read_options, settle, timed

VARIANTS = ("authors", "ours", "ours, stored reference", "ours, LoRA of rank 8")
PRINCIPLE = {"id": "blue", "text": "blue is wanted", "aliases": [], "kind": "toxicity"}


def main() -> None:
    """Make the data once, run every variant in turns, print the table."""
    options = read_options(__doc__, VARIANTS, pairs=8)
    if options.variant:
        imported = settle()
        make = authors if options.variant == "authors" else ours
        one_step = make(options.variant, options.model, options.data, options.pairs, options.steps)
        loss, found = timed(one_step, options.steps, imported)
        assert isfinite(loss), f"{options.variant} must have a finite loss, got {loss}"
        print(json.dumps(found))
    else:
        compare(__file__, VARIANTS, make_data, options)


def make_data(model: Path, folder: Path, pairs: int) -> None:
    """A scene per pair, one image of noise a side; what they show does not change what a step costs."""
    import numpy as np
    from PIL import Image

    from valign.data.images.value_images import SIDES, ValueImage
    from valign.data.images.value_sets import ValueDataConfig, write_values
    from valign.models.diffusion.loading import load_model

    loaded, random, images = load_model(str(model)), np.random.default_rng(0), folder / "images"
    images.mkdir(parents=True)
    rows = []
    for number in range(pairs):
        text = f"a red circle, number {number}"
        for side in SIDES:
            row = ValueImage(
                id=f"s{number}-{side}",
                scene=f"s{number}",
                principle="blue",
                side=side,
                prompt=text,
                text=text,
                other=text,
                seed=number,
            )
            pixels = random.integers(0, 256, (loaded.image_size, loaded.image_size, 3), dtype="uint8")
            Image.fromarray(pixels).save(images / f"{row.id}.png")
            rows.append(row)
    (images / "pictures.parquet").write_bytes(b"made by hand")
    write_values(loaded, rows, [PRINCIPLE], images, folder / "latents", ValueDataConfig(flip=False, batch_size=4))


def ours(variant: str, model: str, data: Path, pairs: int, steps: int) -> Callable[[], float]:
    """The step of `valign.training.tasks.preference.values`, from the cache to the optimizer."""
    import torch

    from valign.data.images.value_sets import open_values
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.value_encoder import ValueText, copy_encoder
    from valign.objectives import LiVO
    from valign.optimizers import OPTIMIZERS
    from valign.training import PreferenceConfig
    from valign.training.engine.offload import encoders_offloaded
    from valign.training.engine.processes import start_processes
    from valign.training.tasks.preference.pair_step import PairStep
    from valign.training.tasks.preference.reference import reference_table
    from valign.training.tasks.preference.values import ValueTokens

    loaded, cache = load_model(model), open_values(data)
    draws = 1 if "stored" in variant else 0
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(loaded.dtype, "no")
    config = PreferenceConfig(flip=False, precompute_ref_draws=draws, empty_prompt_prob=0.0)
    known = list(map(ValueText.read, cache.principles))
    trainable = ValueTokens(loaded, copy_encoder(loaded, known, lora_rank=8 if "LoRA" in variant else None))
    trainable.attach()
    encoders_offloaded(loaded).__enter__()
    source = trainable.source(cache, cache.rows(), config)
    step = PairStep(loaded, LiVO(), config, start_processes(mixed_precision=precision), trainable.off)
    parameters = list(trainable.parameters().values())
    optimizer = OPTIMIZERS["adamw"](weight_decay=config.weight_decay).build([{"params": parameters}], [], config.learning_rate)
    table = reference_table(step, source, data, safe_caption=False, batch=pairs) if draws else None
    visits = iter([(pair, visit) for pair in range(pairs)] for visit in range(2 + steps))

    def one_step() -> float:
        places = next(visits)
        batch = source.visit(places)
        reference = table.at(places) if table else step.errors(batch, reference=True)
        sums = step.backward(batch, reference, share=1 / pairs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sums[0]) / pairs

    return one_step


def authors(variant: str, model: str, data: Path, pairs: int, steps: int) -> Callable[[], float]:
    """The step of the authors' script, in its order and with its four passes, on the same weights, images and prompts."""
    import torch
    from PIL import Image
    from torch.nn import functional

    from valign.data.images.latents import image_tensor
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.value_encoder import ValueText, copy_encoder
    from valign.objectives import LiVO

    loaded = load_model(model)
    value = ValueText.read(PRINCIPLE)
    encoder, objective = copy_encoder(loaded, [value]), LiVO()
    pipe, device, dtype = loaded.pipe, loaded.device, loaded.pipe.text_encoder.dtype
    pipe.vae.to(dtype)
    parameters = list(encoder.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    prompts = [f"a red circle, number {number}" for number in range(pairs)]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def encode(side: str) -> Any:
        names = [data / "images" / f"s{number}-{side}.png" for number in range(pairs)]
        pixels = torch.stack([image_tensor(Image.open(name), loaded.image_size) for name in names]).to(device, dtype)
        return pipe.vae.encode(pixels).latent_dist.sample().float() * pipe.vae.config.scaling_factor

    def error(latents: Any, noise: Any, timesteps: Any, text: Any) -> Any:
        noisy, target = loaded.schedule.add_noise(latents, noise, timesteps), loaded.schedule.target(latents, noise, timesteps)
        with autocast:
            answer = pipe.unet(noisy.to(dtype), timesteps, text).sample
        return functional.mse_loss(answer.float(), target, reduction="none").mean((1, 2, 3))

    def one_step() -> float:
        aligned, violating = encode("aligned"), encode("violating")
        noise = torch.randn_like(aligned)
        timesteps = torch.randint(0, loaded.schedule.num_timesteps, (pairs,), device=device)
        ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = pipe.text_encoder(ids.to(device))[0]
        token = encoder(encoder.tokenize(value, prompts).to(device))
        with_token = torch.cat([token[:, None].to(text), text], dim=1)
        policy_w, policy_l = (error(latents, noise, timesteps, with_token) for latents in (aligned, violating))
        ref_w, ref_l = (error(latents, noise, timesteps, text) for latents in (aligned, violating))
        winner = functional.relu(objective.gamma_win + objective.beta * (policy_w - ref_w))
        loser = functional.relu(objective.gamma_lose + objective.alpha * (ref_l - policy_l))
        loss = (winner + loser).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return one_step


if __name__ == "__main__":
    main()
