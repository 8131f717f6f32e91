"""Train ESD's LoRA, as a task of the engine: the model's own half-denoised latents are the data (arXiv 2303.07345).

Every iteration denoises the concept's prompt with the frozen model up to a random step, and moves the adapter's answer there onto
the target of `valign.objectives.ErasedTarget`. Draws are named by seed and iteration, so a resumed run is the run it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from valign.adapters import export_lora
from valign.checks import UserError, check_options, option
from valign.interfaces import SamplingConfig
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_off, attach_lora, unload_adapters
from valign.models.diffusion.sampling import sample_until
from valign.models.files.adapter_files import save_adapter
from valign.objectives import ErasedTarget, denoising_error
from valign.randomness import generator_for
from valign.runs import Run
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule
from valign.training.engine.task import LoopConfig, TrainingTask

CROSS_ATTENTION = "attn2"


@dataclass(frozen=True, kw_only=True)
class ErasingConfig:
    """ESD's numbers; the authors train whole weights at 5e-5, a LoRA that starts at zero needs more."""

    part: Literal["x", "u"] = option("x", help="x: linears of cross-attention; u: all other linears of the denoiser", rare=True)
    rank: int = option(16, help="LoRA rank", low=1)
    init_seed: int = option(0, help="random seed of the A factors", rare=True)
    learning_rate: float = option(1e-3, help="learning rate of Adam; ours, for a LoRA", above=0)
    iterations: int = option(200, help="iterations, one noisy latent each", low=1)
    sample_steps: int = option(50, help="steps of the schedule that latents are taken from", low=2)
    guidance_scale: float = option(3.0, help="classifier-free guidance scale while they are sampled", low=0, rare=True)
    checkpoint_every: int = option(50, help="iterations between checkpoints", low=1, rare=True)
    seed: int = option(0, help="random seed of prompts, timesteps and noise")

    def __post_init__(self) -> None:
        check_options(self)


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
    """Train one LoRA so that ``concepts`` are no longer generated; write ``out/adapter`` and ``metrics.jsonl``.

    The same call resumes.

    Several concepts are joined to one prompt, as the published comparisons do. The model comes back without an adapter.
    Raises: UserError without a concept, if the run is of another recipe, or if the loss is not finite.
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
    attach_lora(model, rank=config.rank, targets=trained_linears(model.denoiser, config.part), seed=config.init_seed)
    try:
        parameters = {name: p for name, p in sorted(model.denoiser.named_parameters()) if p.requires_grad}
        task = ErasingTask(model, prompt, config, objective, parameters)
        loop = TrainingLoop(task, start_processes(cpu=model.device.type == "cpu"), out=out)
        loop.run()
        origin = {**base_record(model), "method": f"esd-{config.part}"}
        save_adapter(
            out / "adapter",
            export_lora(model.denoiser),
            metadata={**origin, **recipe, **(metadata or {})},
            prefix=model.components["denoiser"],
        )
        results: dict[str, Any] = {
            "iterations": config.iterations,
            "parameters": sum(p.numel() for p in parameters.values()),
            "loss": task.loss,
            "seconds": loop.seconds,
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


class ErasingTask(TrainingTask):
    """One LoRA trained on half-denoised latents of one prompt."""

    def __init__(
        self,
        model: DiffusionModel,
        prompt: str,
        config: ErasingConfig,
        objective: ErasedTarget,
        trained: Mapping[str, nn.Parameter],
    ) -> None:
        self.model, self.prompt, self.config, self.objective, self.trained = model, prompt, config, objective, trained
        self.optimizer = torch.optim.Adam(trained.values(), lr=config.learning_rate)
        self.schedule = Schedule(steps=config.iterations, peak=config.learning_rate)
        self.loop = LoopConfig(
            steps=config.iterations,
            label=f"esd-{config.part}",
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=2,
        )
        self.texts = model.encode_prompts([prompt, ""])
        self.loss = float("nan")  # of the last iteration

    def tensors(self) -> Mapping[str, Tensor]:
        return self.trained

    def gradients(self, step: int) -> dict[str, float]:
        noisy, timestep, target = self._example(step)
        loss = denoising_error(self.model.predict(noisy, timestep, self.texts.select([0])), target).mean()
        loss.backward()
        self.loss = float(loss.detach())
        return {"loss": self.loss, "timestep": float(timestep)}

    def notes(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss": self.loss, "seconds": progress["seconds"]}

    def resumed(self, notes: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        self.loss = notes["loss"]

    def _example(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(noisy latent, timestep, target)`` of an iteration, all by the frozen model."""
        config, model, generator = self.config, self.model, generator_for("esd", self.config.seed, step)
        stop, seed = (int(torch.randint(high, (1,), generator=generator)) for high in (config.sample_steps, 2**31))
        with torch.no_grad(), adapter_off(model):
            noisy, timestep = sample_until(
                model,
                [self.prompt],
                stop=stop,
                sampling=SamplingConfig(steps=config.sample_steps, guidance_scale=config.guidance_scale, seed=seed),
            )
            # one after the other, as the adapter's own answer is made: equal shapes, equal rounding, so that step 0 is exact
            concept, empty = (model.predict(noisy, timestep, self.texts.select([row])).float() for row in (0, 1))
        return noisy, timestep, self.objective(concept, concept, empty)
