"""What does a training step with each tuner and each start of LoRA cost, against peft's LoRA? Prints one table of ratios.

    python benchmarks/adapters.py                     # twelve CLIP text blocks of width 768, random weights
    python benchmarks/adapters.py --layers 2 --steps 3
    python benchmarks/adapters.py --batch 32 --only Comp-LoRA,AILoRA   # 32 texts per step, and these two only

Each variant adapts q_proj and v_proj of the same model, in a process of its own, so that peaks of memory do not mix. Its steps are
timed in turns with those of a LoRA of rank 8 beside it; the median of the ratios counts, the quartiles show the noise.
"Factors alone": where they are made anew at each step (Comp-LoRA projects them), what that takes for all layers, with gradients,
timed by itself, since it is below the noise of a step.
Start is what making the adapter takes, once: factorizing weights, drawing bases, gradients of 32 texts for LoRA-SB.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TARGETS = ["q_proj", "v_proj"]
LORA = "LoRA r=8"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # label -> slug, options
    LORA: ("lora", {"r": 8}),
    "SVFit r=64": ("svfit", {"r": 64}),
    "SVFit r=768": ("svfit", {}),
    "CLIP-SVD": ("clip-svd", {}),
    "LoLDU r=64": ("loldu", {"r": 64}),
    "NOLA k=64": ("nola", {"r": 8, "num_basis_a": 64, "num_basis_b": 64}),
    "NOLA k=64, kept": ("nola", {"r": 8, "num_basis_a": 64, "num_basis_b": 64, "materialize": True}),
    "LoCA K=1000": ("loca", {}),
    "RandLoRA r=32": ("randlora", {"r": 32}),
    "PiSSA r=8": ("lora", {"r": 8, "init_lora_weights": "pissa"}),
    "AILoRA r=8": ("ailora", {}),
    "Comp-LoRA r=8": ("comp-lora", {}),
    "Comp-LoRA r=8, random": ("comp-lora", {"directions": 64, "niter": 4}),
    "LoRA-SB r=8": ("lora-sb", {}),
    "LoRA-SB r=8, random": ("lora-sb", {"niter": 10}),
}
RATIO = ("low", "ratio", "high")  # quartiles of a step's time by LoRA's
WARM = 2  # steps that are not timed
FACTORS = 30  # times that factors are made by themselves
SAMPLES = 8  # batches of four texts for LoRA-SB's gradient


def main() -> None:
    """Run every variant in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=77, help="per text")
    parser.add_argument("--batch", type=int, default=4, help="texts per step")
    parser.add_argument("--steps", type=int, default=12, help="timed pairs of steps, after two that are not")
    parser.add_argument("--only", default="", help="beginnings of variants' names, joined by commas; LoRA is always there")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    chosen = [name for name in VARIANTS if name == LORA or name.startswith(tuple(options.only.split(",")))]
    if len(chosen) == 1:
        parser.error(f"--only must begin the name of a variant, got {options.only!r}. Known: {', '.join(VARIANTS)}")
    results: dict[str, dict[str, float]] = {}
    for variant in chosen:
        command = [sys.executable, __file__, "--variant", variant]
        for name in ("layers", "tokens", "batch", "steps"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[variant] = json.loads(done.stdout.splitlines()[-1])
    report(results, options)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to start, peak memory above the loaded model, trained numbers, and steps timed in turns with LoRA's."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "max_position_embeddings": options.tokens}
    shape = CLIPTextConfig(vocab_size=1000, bos_token_id=0, eos_token_id=1, num_hidden_layers=options.layers, **sizes)
    ids = torch.randint(1000, (options.batch, options.tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def loaded() -> Any:
        torch.manual_seed(0)
        return CLIPTextModel(shape).to(device).train()

    model = loaded()
    before = peak(device)
    began = time.perf_counter()
    model = adapt(model, *VARIANTS[options.variant], ids)
    started = time.perf_counter() - began
    ours, trained = stepper(model, ids, device)
    for _ in range(WARM):
        ours()
    memory = peak(device) - before  # before LoRA's model is there
    lora, _ = stepper(adapt(loaded(), *VARIANTS[LORA], ids), ids, device)
    for _ in range(WARM):
        lora()
    pairs = [(ours(), lora()) if number % 2 else (lora(), ours())[::-1] for number in range(options.steps)]
    ratios = [one / other for one, other in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    seconds = statistics.median(one for one, _ in pairs)
    found = {"start": started, "step": seconds, "memory": memory, "trained": trained, "factors": factors_alone(model, device)}
    return found | dict(zip(RATIO, quartiles, strict=True))


def stepper(model: Any, ids: Any, device: str) -> tuple[Callable[[], float], int]:
    """A function that takes a step and says how many seconds it took, and how many numbers it trains."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step, sum(parameter.numel() for parameter in parameters)


def factors_alone(model: Any, device: str) -> float:
    """Seconds that making the factors of all layers takes, with gradients; 0 where peft's own are used."""
    import torch

    from valign.adapters.factors import FactorVariant

    own = [
        (variant, layer, name)
        for layer in model.modules()
        for name, variant in getattr(layer, "lora_variant", {}).items()
        if isinstance(variant, FactorVariant)
    ]
    times = []
    for _ in range(FACTORS if own else 0):
        began = time.perf_counter()
        pairs = [variant.factors(layer, name) for variant, layer, name in own]
        made = [factor for pair in pairs for factor in (pair.down, pair.up) if factor.grad_fn is not None]
        torch.autograd.backward(made, [torch.ones_like(factor) for factor in made])
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times) if times else 0.0


def adapt(model: Any, slug: str, extra: dict[str, Any], ids: Any) -> Any:
    """The model with its adapter, started."""
    import torch
    from peft import LoraConfig, get_peft_model

    from valign.adapters import INITIALIZERS, TUNERS, initialize

    if slug not in INITIALIZERS:
        return get_peft_model(model, {"lora": LoraConfig, **TUNERS}[slug](target_modules=TARGETS, **extra))
    model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    if "niter" in extra:
        extra = {**extra, "generator": torch.Generator(ids.device).manual_seed(0)}
    if slug == "lora-sb":
        texts = [ids.roll(shift, 1) for shift in range(SAMPLES)]
        extra = {**extra, "samples": texts, "learning_rate": 1e-3, "allow_scale": True}
        extra["loss"] = lambda network, text: network(text).last_hidden_state.square().mean()
    initialize(model, slug, **extra)
    return model


def peak(device: str) -> float:
    """MiB: of the GPU's allocator, or the process's peak resident set."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(results: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """Print the table, and where it was measured."""
    import torch

    lora = results[LORA]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"{options.layers} blocks of 768, {options.batch} x {options.tokens} tokens, float32, "
        f"{options.steps} pairs of steps; {where}; torch {torch.__version__}, commit {commit}\n"
    )
    step, memory = f"step, LoRA = 1 (= {1000 * lora['step']:.0f} ms)", f"memory, LoRA = 1 (= {lora['memory']:.0f} MiB)"
    print(f"| tuner | trained | {step} | quartiles | factors alone | {memory} | start, s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for variant, row in results.items():
        low, middle, high = (row[name] for name in RATIO)
        factors = f"{1000 * row['factors']:.1f} ms, {row['factors'] / lora['step']:.1%}" if row["factors"] else "-"
        cells = f"{middle:.3f} | {low:.2f} to {high:.2f} | {factors} | {row['memory'] / lora['memory']:.2f} | {row['start']:.2f}"
        print(f"| {variant} | {row['trained']:,.0f} | {cells} |")


if __name__ == "__main__":
    main()
