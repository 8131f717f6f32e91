"""Train on preference pairs: the checks, the run record, and the model given back as it came."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from valign.checks import UserError
from valign.data.images.latents import LatentCache
from valign.files import hash_value
from valign.interfaces import PairCache
from valign.memory import AUTOCAST
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.base import DiffusionModel
from valign.objectives import PairObjective
from valign.objectives.robust.look_ahead import LookAhead
from valign.runs import Run
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.offload import encoders_offloaded
from valign.training.engine.previews import Previews
from valign.training.engine.processes import on_main, start_processes
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.denoiser_adapter import DenoiserAdapter
from valign.training.tasks.preference.look_ahead import LookAheadTask
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.task import PreferenceTask
from valign.training.tasks.preference.trainable import TrainableAdapter


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left behind."""

    adapter: Path
    steps: int  # steps run
    best_step: int  # the step whose factors are in ``adapter``
    stopped: str  # "" (all steps run), "patience" or "displacement"
    metrics: dict[str, float] = field(default_factory=dict)  # of the best step
    seconds: float = field(default=0.0, compare=False)  # in training steps alone, over all calls of the run


def train_preference(
    model: DiffusionModel,
    cache: LatentCache,
    rows: Int[Tensor, " row"],
    out: Path,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    metadata: Mapping[str, Any] | None = None,
    look_ahead: LookAhead | None = None,
    validate: Callable[[int], float] | None = None,
    label: str = "train",
) -> TrainResult:
    """Train one LoRA on the pairs ``rows`` of ``cache``; write ``out/adapter``, ``metrics.jsonl``, ``checkpoints`` and ``samples``.

    A finished run is returned as it is, an interrupted one goes on from its last checkpoint, with the same bytes on a CPU as if
    it had never stopped. The model comes back without an adapter.

    Args:
        metadata: JSON-able provenance for the adapter, e.g. its category.
        look_ahead: Train for safety that survives benign fine-tuning, too (ResAlign).
        validate: ``step -> score``, lower is better, called on the first process; replaces the validation loss as the
            measure of the best step. The drift limit holds beside it.
        label: What the progress bar says.
    Raises: UserError if the run is of another recipe, a batch cannot be shared out, pairs and model do not fit, or the loss is
        not finite (with step, timesteps and pair ids; checkpoints stay).
    """
    trainable = DenoiserAdapter(model, config)
    return run_training(
        trainable,
        cache,
        rows,
        out,
        config,
        objective,
        metadata=metadata,
        look_ahead=look_ahead,
        validate=validate,
        label=label,
    )


def run_training(
    trainable: TrainableAdapter,
    cache: PairCache,
    rows: Int[Tensor, " row"],
    out: Path,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    metadata: Mapping[str, Any] | None = None,
    look_ahead: LookAhead | None = None,
    validate: Callable[[int], float] | None = None,
    label: str = "train",
) -> TrainResult:
    """`train_preference` for whatever the trainable trains, on whatever cache its source reads."""
    model = trainable.model
    precision = AUTOCAST[str(model.dtype).removeprefix("torch.")]
    accelerator = start_processes(mixed_precision=precision, trackers=config.trackers, folder=out, cpu=model.device.type == "cpu")
    if model.device != accelerator.device:
        model.to(accelerator.device)
    named = {"name": type(objective).__name__, **asdict(objective)}  # type: ignore[call-overload]
    recipe = {
        "config": config.recipe() | {"mixed_precision": precision},
        "objective": named,
        "pairs": hash_value([cache.ids[int(row)] for row in rows]),
        "metadata": dict(metadata or {}),
    }
    if look_ahead is not None:
        if config.compile:
            raise UserError("compile must be off with a look-ahead, got True: its layers change. Leave it out.")
        recipe["look_ahead"] = asdict(look_ahead)
    inputs = {"model": model.fingerprint(), "data": cache.fingerprint()}
    run = on_main(accelerator, lambda: Run.open(out, step="train", recipe=recipe, inputs=inputs, seed=config.seed))
    if run.done:
        return TrainResult(adapter=trainable.result(out), **run.results)
    _check(cache, rows, config, inputs["model"], accelerator.num_processes)
    trainable.attach()
    try:
        step = PairStep(model, objective, config, accelerator, trainable.off)
        previews = Previews(trainable.sampler, out / "samples", config.sample_prompts, config.sample_steps, trainable.off)
        idle = not config.sample_every and validate is None  # no image is generated before the end
        with encoders_offloaded(model) if idle else nullcontext():
            kind = PreferenceTask if look_ahead is None else partial(LookAheadTask, look_ahead=look_ahead)
            task = kind(step, cache, rows, out, validate, label, trainable)
            loop = TrainingLoop(task, accelerator, out=out, previews=previews)
            stopped = loop.run()
        origin = {**base_record(model), "data": inputs["data"]}
        made = {**origin, "objective": named, "training": recipe["config"], **(metadata or {})}
        made |= {"look_ahead": recipe["look_ahead"]} if look_ahead is not None else {}
        return on_main(accelerator, lambda: _finish(loop, out, trainable, run, stopped, made))
    finally:
        trainable.detach()
        model.checkpoint_gradients(False)


def _finish(
    loop: TrainingLoop, out: Path, trainable: TrainableAdapter, run: Run, stopped: str, metadata: dict[str, Any]
) -> TrainResult:
    """Write the best step's factors as the adapter, and close the run."""
    if loop.task.selection is None or not loop.task.selection.best_step:
        raise UserError(
            f"{out} has no step worth keeping: {'winners were displaced' if stopped else 'no validation gave a number'}. "
            "Lower the learning rate, raise beta, or set sft_weight or winner_safeguard; train into a new folder."
        )
    best = loop.keep_best()
    trainable.save(out, {**metadata, "step": best})
    line = next(line for line in MetricsLog(out / "metrics.jsonl").read() if int(line["step"]) == best)
    metrics = {name: float(value) for name, value in line.items() if name != "step"}
    run.finish(steps=loop.done, best_step=best, stopped=stopped, metrics=metrics, seconds=loop.seconds)
    return TrainResult(trainable.result(out), loop.done, best, stopped, metrics, loop.seconds)


def _check(cache: PairCache, rows: Tensor, config: PreferenceConfig, base: str, processes: int) -> None:
    if len(rows) == 0:
        raise UserError("train_preference.rows must hold at least one pair, got 0. Choose a category that has data.")
    if cache.base_fingerprint != base:
        raise UserError(f"{cache.folder} was encoded by another base model. Build the data again with the model to train.")
    parts = processes * config.memory.micro_batches
    if config.pairs_per_step % parts:
        raise UserError(
            f"pairs_per_step must be a multiple of processes x accumulation = {parts}, got {config.pairs_per_step}. "
            "Change one of them."
        )
    if config.flip and not cache.has_flip:
        raise UserError(f"{cache.folder} holds no mirrored latents. Build the data with flip on, or train with flip off.")
    if config.sample_every and not config.sample_prompts:
        raise UserError("sample_prompts must not be empty when sample_every is set. Name some prompts, or set sample_every 0.")
