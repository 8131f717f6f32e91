"""Train on preference pairs: the checks, the run record, and the model given back as it came."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from valign.checks import UserError
from valign.data.images.latents import LatentCache
from valign.files import hash_value
from valign.interfaces import PairCache
from valign.models.diffusion.base import DiffusionModel
from valign.objectives import PairObjective
from valign.runs import Run
from valign.training.engine.offload import encoders_offloaded
from valign.training.engine.processes import on_main, start_processes
from valign.training.tasks.preference.adaptive import unet_adapter
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.loop import PreferenceLoop, TrainResult
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.trainable import TrainableAdapter


def train_preference(
    model: DiffusionModel,
    cache: LatentCache,
    rows: Int[Tensor, " row"],
    out: Path,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    metadata: Mapping[str, Any] | None = None,
    validate: Callable[[int], float] | None = None,
    label: str = "train",
) -> TrainResult:
    """Train one LoRA on the pairs ``rows`` of ``cache``; write ``out/adapter``, ``metrics.jsonl``, ``checkpoints`` and ``samples``.

    A finished run is returned as it is, an interrupted one goes on from its last checkpoint, with the same bytes on a CPU as if
    it had never stopped. The model comes back without an adapter.

    Args:
        metadata: JSON-able provenance for the adapter, e.g. its category.
        validate: ``step -> score``, lower is better, called on the first process; replaces the validation loss as the
            measure of the best step. The drift limit holds beside it.
        label: What the progress bar says.
    Raises: UserError if the run is of another recipe, a batch cannot be shared out, pairs and model do not fit, or the loss is
        not finite (with step, timesteps and pair ids; checkpoints stay).
    """
    trainable = unet_adapter(model, config)
    return run_training(trainable, cache, rows, out, config, objective, metadata=metadata, validate=validate, label=label)


def run_training(
    trainable: TrainableAdapter,
    cache: PairCache,
    rows: Int[Tensor, " row"],
    out: Path,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    metadata: Mapping[str, Any] | None = None,
    validate: Callable[[int], float] | None = None,
    label: str = "train",
) -> TrainResult:
    """`train_preference` for whatever the trainable trains, on whatever cache its source reads."""
    model = trainable.model
    accelerator = start_processes(
        mixed_precision=config.mixed_precision, trackers=config.trackers, folder=out, cpu=model.device.type == "cpu"
    )
    if model.device != accelerator.device:
        model.pipe.to(accelerator.device)
    named = {"name": type(objective).__name__, **asdict(objective)}  # type: ignore[call-overload]
    recipe = {
        "config": config.recipe(),
        "objective": named,
        "pairs": hash_value([cache.ids[int(row)] for row in rows]),
        "metadata": dict(metadata or {}),
    }
    inputs = {"model": model.fingerprint(), "data": cache.fingerprint()}
    run = on_main(accelerator, lambda: Run.open(out, step="train", recipe=recipe, inputs=inputs, seed=config.seed))
    if run.done:
        return TrainResult(adapter=trainable.result(out), **run.results)
    _check(cache, rows, config, inputs["model"], accelerator.num_processes)
    trainable.attach()
    try:
        step = PairStep(model, objective, config, accelerator, trainable.off)
        loop = PreferenceLoop(step, cache, rows, out, validate, label, trainable)
        idle = not config.sample_every and validate is None  # nothing is drawn before the end
        with encoders_offloaded(model) if idle else nullcontext():
            stopped = loop.run()
        origin = {"base": model.folder, "base_fingerprint": inputs["model"], "family": model.family, "data": inputs["data"]}
        return loop.finish(run, stopped, {**origin, "objective": named, "training": config.recipe(), **(metadata or {})})
    finally:
        trainable.detach()
        model.pipe.unet.disable_gradient_checkpointing()


def _check(cache: PairCache, rows: Tensor, config: PreferenceConfig, base: str, processes: int) -> None:
    if len(rows) == 0:
        raise UserError("train_preference.rows must hold at least one pair, got 0. Choose a category that has data.")
    if cache.base_fingerprint != base:
        raise UserError(f"{cache.folder} was encoded by another base model. Build the data again with the model to train.")
    parts = processes * config.accumulation
    if config.pairs_per_step % parts:
        raise UserError(
            f"pairs_per_step must be a multiple of processes x accumulation = {parts}, got {config.pairs_per_step}. "
            "Change one of them."
        )
    if config.flip and not cache.has_flip:
        raise UserError(f"{cache.folder} holds no mirrored latents. Build the data with flip on, or train with flip off.")
    if config.sample_every and not config.sample_prompts:
        raise UserError("sample_prompts must not be empty when sample_every is set. Name some prompts, or set sample_every 0.")
