"""Train ESD's LoRA: no images, the model's own half-denoised latents are the data (arXiv 2303.07345).

Every iteration denoises the concept's prompt with the frozen model up to a random step, and moves the adapter's answer there onto
the target of `valign.objectives.ErasedTarget`. Draws are named by seed and iteration, so a resumed run is the run it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from valign.checks import UserError, check_choice, check_range
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_off, attach_lora, unload_adapters
from valign.models.diffusion.sampling import sample_until
from valign.models.files.adapter_files import save_adapter
from valign.objectives import ErasedTarget, denoising_error
from valign.progress import track
from valign.randomness import generator_for
from valign.runs import Run
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.metrics import MetricsLog
from valign.training.tasks.preference.trainable import ADAPTER, lora_factors

CROSS_ATTENTION = "attn2"


@dataclass(frozen=True, kw_only=True)
class ErasingConfig:
    """ESD's numbers; the authors train whole weights at 5e-5, a LoRA that starts at zero needs more."""

    part: Literal["x", "u"] = "x"  # "x": linears of cross-attention; "u": all other linears of the U-Net
    rank: int = 16
    init_seed: int = 0
    learning_rate: float = 1e-3  # Adam; ours, for a LoRA
    iterations: int = 200  # one noisy latent each
    sample_steps: int = 50  # of the schedule that the latents are taken from
    guidance_scale: float = 3.0  # while sampling them
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("ErasingConfig.part", self.part, ("x", "u"))
        for name in ("rank", "iterations", "checkpoint_every"):
            check_range(f"ErasingConfig.{name}", float(getattr(self, name)), low=1.0)
        check_range("ErasingConfig.sample_steps", float(self.sample_steps), low=2.0)
        check_range("ErasingConfig.guidance_scale", self.guidance_scale, low=0.0)
        check_range("ErasingConfig.learning_rate", self.learning_rate, above=0.0)


@dataclass(frozen=True)
class ErasingResult:
    """What an erasing run left behind."""

    adapter: Path
    iterations: int
    parameters: int  # trained
    loss: float  # of the last iteration, mean squared error
    seconds: float = field(default=0.0, compare=False)  # over all calls of the run


def train_erasing(
    model: DiffusionModel,
    concepts: Sequence[str],
    out: Path,
    config: ErasingConfig | None = None,
    objective: ErasedTarget | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> ErasingResult:
    """Train one LoRA that no longer draws ``concepts``; write ``out/adapter`` and ``metrics.jsonl``. The same call resumes.

    Several concepts are joined to one prompt, as the published comparisons do. The model comes back without an adapter.
    Raises: UserError without a concept, if the run is of another recipe, or if the loss is no number.
    """
    config, objective = config or ErasingConfig(), objective or ErasedTarget()
    prompt = ", ".join(text.strip() for text in concepts)
    if not concepts or not all(text.strip() for text in concepts):
        raise UserError(f"train_erasing.concepts must be texts, got {list(concepts)}. Name at least one concept to erase.")
    numbers = {name: value for name, value in asdict(config).items() if name != "checkpoint_every"}
    recipe = {"config": numbers, "eta": objective.eta, "concepts": list(concepts), "metadata": dict(metadata or {})}
    base = model.fingerprint()
    run = Run.open(out, step=f"esd-{config.part}", recipe=recipe, inputs={"model": base}, seed=config.seed)
    if run.done:
        return ErasingResult(out / "adapter", **run.results)
    attach_lora(model, rank=config.rank, targets=trained_linears(model.unet, config.part), name=ADAPTER, seed=config.init_seed)
    try:
        parameters = {name: p for name, p in sorted(model.unet.named_parameters()) if p.requires_grad}
        loss, seconds = _train(model, prompt, out, config, objective, parameters)
        origin = {"base": model.folder, "base_fingerprint": base, "family": model.family, "method": f"esd-{config.part}"}
        save_adapter(out / "adapter", lora_factors(model.unet), metadata={**origin, **recipe, **(metadata or {})})
        results: dict[str, Any] = {
            "iterations": config.iterations,
            "parameters": sum(p.numel() for p in parameters.values()),
            "loss": loss,
            "seconds": seconds,
        }
        run.finish(**results)
        return ErasingResult(out / "adapter", **results)
    finally:
        unload_adapters(model)


def trained_linears(unet: nn.Module, part: str) -> list[str]:
    """Names of the linear layers inside (``"x"``) or outside (``"u"``) cross-attention, sorted. Convolutions are left alone."""
    inside = part == "x"
    return sorted(
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and (CROSS_ATTENTION in name.split(".")) == inside
    )


def _train(
    model: DiffusionModel,
    prompt: str,
    out: Path,
    config: ErasingConfig,
    objective: ErasedTarget,
    parameters: dict[str, nn.Parameter],
) -> tuple[float, float]:
    """All iterations from the last checkpoint on; the loss of the last, and the seconds of all."""
    optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
    checkpoints, log = Checkpoints(out / "checkpoints"), MetricsLog(out / "metrics.jsonl")
    steps = checkpoints.steps()
    done = steps[-1] if steps else 0
    state = checkpoints.load(done, parameters, optimizer) if done else {}
    value, seconds = state.get("loss", float("nan")), state.get("seconds", 0.0)
    log.rewind(done)
    texts = model.encode_prompts([prompt, ""])
    for step in track(range(done, config.iterations), f"esd-{config.part}", total=config.iterations, done=done):
        started = perf_counter()
        noisy, timestep, target = _example(model, prompt, config, objective, texts, step)
        loss = denoising_error(model.predict(noisy, timestep, texts.select([0])), target).mean()
        value = float(loss.detach())
        if value != value or value == float("inf"):
            raise UserError(f"The loss of iteration {step + 1} must be finite, got {value}. Lower the learning rate or eta.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += perf_counter() - started
        log.append({"step": step + 1, "loss": value, "timestep": float(timestep)})
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.iterations:
            checkpoints.save(step + 1, parameters, optimizer, {"loss": value, "seconds": seconds})
            checkpoints.prune(2, also=0)
    return value, seconds


def _example(
    model: DiffusionModel, prompt: str, config: ErasingConfig, objective: ErasedTarget, texts: Any, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(noisy latent, timestep, target)`` of an iteration, all by the frozen model."""
    generator = generator_for("esd", config.seed, step)
    stop, seed = (int(torch.randint(high, (1,), generator=generator)) for high in (config.sample_steps, 2**31))
    with torch.no_grad(), adapter_off(model):
        noisy, timestep = sample_until(
            model,  # type: ignore[arg-type]  # every model that is loaded is a pipeline's
            [prompt],
            seeds=[seed],
            steps=config.sample_steps,
            stop=stop,
            guidance_scale=config.guidance_scale,
        )
        # one after the other, as the adapter's own answer is made: equal shapes, equal rounding, so that step 0 is exact
        concept, empty = (model.predict(noisy, timestep, texts.select([row])).float() for row in (0, 1))
    return noisy, timestep, objective(concept, concept, empty)
