"""What does a preference step cost, against the stock way of doing the same work? Prints one table.

    python benchmarks/dpo_step.py                        # the bundled miniature, else a random one, on what there is
    python benchmarks/dpo_step.py --model sd15 --pairs 4   # random weights in the sizes of Stable Diffusion 1.5; wants a GPU

Stock is what diffusers' research example for Diffusion-DPO does at every step, with its default settings: read the images (in
the training process), encode them (8 at a time) and the text, one forward with the LoRA and one without, AdamW. Ours reads the
cache of `valign data build`; with stored reference errors it is timed as it runs once they are there. Each variant runs in a
process of its own, in turns, so that peaks of memory do not mix and drift of the machine hits all alike; the fastest median counts.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import log
from pathlib import Path
from typing import Any

VARIANTS = ("stock", "ours", "ours, stored reference", "ours, stored, compiled", "ours, split pairs")


def main() -> None:
    """Make the data once, run every variant in turns, print the table."""
    options = read_options(__doc__, VARIANTS, pairs=16)
    if options.variant:
        print(json.dumps(measure(options.variant, options.model, options.data, options.pairs, options.steps)))
    else:
        compare(__file__, VARIANTS, make_data, options)


def read_options(about: str | None, variants: Sequence[str], *, pairs: int) -> argparse.Namespace:
    """The command line of a benchmark of steps; ``--variant`` and ``--data`` are for its own processes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="pipeline folder, or sd15; the bundled miniature if left out")
    parser.add_argument("--pairs", type=int, default=pairs, help="pairs per step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round, after two that are not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variant", choices=variants, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(
    script: str, variants: Sequence[str], make_data: Callable[[Path, Path, int], None], options: argparse.Namespace
) -> None:
    """Make the data once, run every variant in a process of its own, in turns, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.model, Path(folder))
        make_data(model, Path(folder) / "data", options.pairs)
        results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(options.rounds):
            for variant in variants:
                command = [sys.executable, script, "--variant", variant, "--model", str(model), "--data", f"{folder}/data"]
                command += ["--pairs", str(options.pairs), "--steps", str(options.steps)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    report(results, options)


def make_model(name: str, folder: Path) -> Path:
    """The folder of the model that is measured."""
    if name == "sd15":
        return build_sd15(folder / "model")
    if name:
        return Path(name)
    from valign.worlds import shapes

    bundled = Path(shapes.__file__).parent / "assets" / "model"
    if bundled.is_dir():
        return bundled
    from valign.models.diffusion.miniature import build_miniature

    return build_miniature(folder / "model", width=64)


def build_sd15(folder: Path) -> Path:
    """Random weights in the published sizes: U-Net 860 M, CLIP ViT-L/14 text 123 M, autoencoder 84 M parameters; half precision."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from valign.models.diffusion.miniature import SD_NOISE, build_tokenizer

    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=AutoencoderKL(
            down_block_types=blocks[0],
            up_block_types=blocks[1],
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=build_tokenizer(),
        scheduler=PNDMScheduler(skip_prk_steps=True, **SD_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


def make_data(model: Path, folder: Path, pairs: int) -> None:
    """Pairs of noise images with their cache; what they show does not change what a step costs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from valign.data.images.latents import write_latents
    from valign.data.prompts.pairs import PromptPair
    from valign.models.diffusion.loading import load_model

    loaded, random = load_model(str(model)), np.random.default_rng(0)
    rows = [PromptPair(f"p{i}", f"a red circle, number {i}", f"a blue square, number {i}", ("violence",)) for i in range(pairs)]
    (folder / "images").mkdir(parents=True)
    for row in rows:
        for name in ("safe", "unsafe"):
            pixels = random.integers(0, 256, (loaded.image_size, loaded.image_size, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / "images" / f"{row.id}_{name}.png")
    pq.write_table(pa.table({"id": [row.id for row in rows]}), folder / "images" / "images.parquet")
    write_latents(loaded, rows, folder / "images", folder / "latents", flip=False, batch_size=4)


def measure(variant: str, model: str, data: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step and the peak of memory, in this process."""
    imported = settle()
    one_step = stock(model, data, pairs) if variant == "stock" else ours(variant, model, data, pairs, steps)
    first, found = timed(one_step, steps, imported)
    assert abs(first - log(2)) < 1e-3, f"{variant} must start at ln 2, got {first}"
    return found


def settle() -> int:
    """As many threads as the process has cores, or as it was told; all libraries of all variants awake. Bytes resident then."""
    import accelerate  # noqa: F401
    import psutil
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from diffusers import StableDiffusionPipeline  # noqa: F401

    import valign.training.tasks.preference.train
    import valign.training.tasks.preference.values  # noqa: F401

    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["p0"]}), file)
    pq.read_table(pa.BufferReader(file.getvalue()))  # Arrow takes 50 MB when it is first used, however small the table
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    return psutil.Process().memory_info().rss


def timed(one_step: Callable[[], float], steps: int, imported: int) -> tuple[float, dict[str, Any]]:
    """The first loss; median seconds after two steps, and the peak of memory beyond the ``imported`` libraries' own."""
    import torch

    losses, seconds = [], []
    for _ in range(2 + steps):
        start = time.perf_counter()
        losses.append(one_step())
        seconds.append(time.perf_counter() - start)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    return losses[0], {
        "seconds": statistics.median(seconds[2:]),
        "peak_mb": peak / 2**20,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }


def ours(variant: str, model: str, data: Path, pairs: int, steps: int) -> Callable[[], float]:
    """The step of `valign.training`, from the cache to the optimizer."""
    import torch

    from valign.data.images.latents import open_latents
    from valign.memory import MemoryConfig
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import attach_lora
    from valign.objectives import DiffusionDPO
    from valign.optimizers import OPTIMIZERS
    from valign.training import PreferenceConfig
    from valign.training.engine.offload import encoders_offloaded
    from valign.training.engine.processes import start_processes
    from valign.training.tasks.preference.batches import PairSource
    from valign.training.tasks.preference.compiling import compiled_step
    from valign.training.tasks.preference.pair_step import PairStep
    from valign.training.tasks.preference.reference import reference_table

    loaded, cache = load_model(model), open_latents(data)
    encoders_offloaded(loaded).__enter__()
    draws = 1 if "stored" in variant else 0
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(loaded.dtype, "no")
    memory = MemoryConfig(split_pairs="split" in variant)
    config = PreferenceConfig(flip=False, memory=memory, precompute_ref_draws=draws, empty_prompt_prob=0.0)
    source = PairSource(loaded, cache, cache.rows(), config)
    attach_lora(loaded, rank=4)
    step = PairStep(loaded, DiffusionDPO(beta=500.0), config, start_processes(mixed_precision=precision))
    parameters = [p for p in loaded.denoiser.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["adamw"](weight_decay=config.weight_decay).build([{"params": parameters}], [], config.learning_rate)
    table = reference_table(step, source, data, safe_caption=False, batch=pairs) if draws else None
    visits = iter([(pair, visit) for pair in range(pairs)] for visit in range(2 + steps))
    first = source.visit([(pair, 0) for pair in range(pairs)])
    fast = compiled_step(step, first, parameters) if "compiled" in variant else nullcontext

    def one_step() -> float:
        places = next(visits)
        batch = source.visit(places)
        reference = table.at(places) if table else step.errors(batch, reference=True)
        with fast():
            sums = step.backward(batch, reference, share=1 / pairs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sums[0]) / pairs

    return one_step


def stock(model: str, data: Path, pairs: int, dtype: str = "auto") -> Callable[[], float]:
    """The step of the research example, on the same weights, images, prompts and LoRA."""
    import torch
    from PIL import Image
    from torch.nn import functional

    from valign.data.images.latents import image_tensor
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import attach_lora

    loaded = load_model(model, dtype=dtype)
    attach_lora(loaded, rank=4)
    pipe, device, dtype = loaded.pipe, loaded.device, loaded.pipe.text_encoder.dtype
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    names = [data / "images" / f"p{i}_{who}.png" for who in ("safe", "unsafe") for i in range(pairs)]
    pipe.vae.to(dtype)
    prompts = [f"a red circle, number {i}" for i in range(pairs)]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def one_step() -> float:
        pixels = torch.stack([image_tensor(Image.open(name), loaded.image_size) for name in names]).to(device, dtype)
        with torch.no_grad():
            chunks = [pipe.vae.encode(pixels[i : i + 8]).latent_dist.sample() for i in range(0, 2 * pairs, 8)]
            latents = torch.cat(chunks) * pipe.vae.config.scaling_factor
            ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            text = pipe.text_encoder(ids.to(device))[0].repeat(2, 1, 1)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, loaded.schedule.num_timesteps, (pairs,), device=device).repeat(2)
        noisy, target = loaded.schedule.add_noise(latents, noise, timesteps), loaded.schedule.target(latents, noise, timesteps)
        with autocast:
            policy = pipe.unet(noisy.to(dtype), timesteps, text).sample
        policy_w, policy_l = functional.mse_loss(policy.float(), target, reduction="none").mean((1, 2, 3)).chunk(2)
        pipe.unet.disable_adapters()
        with torch.no_grad(), autocast:
            reference = pipe.unet(noisy.to(dtype), timesteps, text).sample
        ref_w, ref_l = functional.mse_loss(reference.float(), target, reduction="none").mean((1, 2, 3)).chunk(2)
        pipe.unet.enable_adapters()
        loss = -functional.logsigmoid(-250.0 * ((policy_w - policy_l) - (ref_w - ref_l))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return one_step


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The table, against the first variant, with all that a number needs beside it."""
    import diffusers
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    first = next(iter(results))
    print(
        f"{options.pairs} pairs per step, {options.rounds} x {options.steps} steps; {results[first][0]['device']}, "
        f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"commit {commit}"
    )
    best = {name: min(run["seconds"] for run in runs) for name, runs in results.items()}
    peaks = {name: max(run["peak_mb"] for run in runs) for name, runs in results.items()}
    print(f"{'variant':<24}{'ms/step':>10}{'pairs/s':>10}{'speed':>8}{'peak MB':>10}{'memory':>8}")
    for name, seconds in best.items():
        speed, memory = best[first] / seconds, peaks[name] / peaks[first]
        print(f"{name:<24}{1000 * seconds:>10.0f}{options.pairs / seconds:>10.1f}{speed:>7.2f}x{peaks[name]:>10.0f}{memory:>7.2f}x")


if __name__ == "__main__":
    main()
