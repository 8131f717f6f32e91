"""How the trained LoRA starts: plain, or by one of `valign.adapters`; all of them leave the base weights alone, as the
reference wants. Those whose ranks change while they train are in `adaptive_trainee`."""

from math import ceil

from jaxtyping import Float
from torch import Tensor

from valign.adapters import InitReport, initialize
from valign.adapters.lora_sb import FLOOR, FRACTION
from valign.objectives import PairErrors, denoising_error
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import PairBatch, PairSource
from valign.training.tasks.preference.pair_step import PairStep, weigh


def start_adapter(step: PairStep, source: PairSource, adapter: str) -> InitReport | None:
    """Give the U-Net's new LoRA called ``adapter`` the start that the config names; None if that is LoRA's own.

    LoRA-SB takes its gradient on the training pairs (max(32, 0.1 %), pairs in turn, each visit its own draws), so it repeats to the
    same bytes on a CPU when a run resumes.
    """
    kind, unet = step.config.adapter, step.model.denoiser
    if kind == "lora":
        return None
    if kind == "ailora":
        return initialize(unet, kind, adapter=adapter, preserve_base=True)
    if kind == "comp-lora":
        return initialize(unet, kind, adapter=adapter)
    accelerator, count = step.accelerator, max(FLOOR, ceil(FRACTION * len(source)))
    places = [(index % len(source), index // len(source)) for index in range(count)]
    mine = places[accelerator.process_index :: accelerator.num_processes]
    return initialize(
        unet,
        kind,
        adapter=adapter,
        samples=mine,
        count=len(mine),
        loss=lambda _, place: first_loss(step, source, place),
        learning_rate=step.config.schedule().at(0),
        allow_scale=True,
        reduce=lambda gradient: reduce_sum(accelerator, gradient),
    )


def first_loss(step: PairStep, source: PairSource, place: tuple[int, int]) -> Tensor:
    """`graded` of one pair where policy and reference are the base model: the gradient of training's first step."""
    return graded(step, source.visit([place], safe_caption=False))


def graded(step: PairStep, batch: PairBatch, reference: Float[Tensor, " image"] | None = None) -> Tensor:
    """A number whose gradient is that of the pairs' summed loss; without ``reference`` the policy is its own."""
    (images,) = batch.pieces(split=False)
    with step.accelerator.autocast():
        prediction = step.model.predict(images.noisy, images.timesteps, images.conditioning)
    policy = denoising_error(prediction, images.target)
    errors = PairErrors.split(policy.detach(), policy.detach() if reference is None else reference)
    _, gradient = weigh(errors, step.objective, weight=batch.weight, sft_weight=step.config.sft_weight)
    return (policy * gradient).sum()
