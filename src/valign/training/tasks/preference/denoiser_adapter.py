"""What a preference training trains on a diffusion model: one adapter on its denoiser, attached by its row in `ADAPTERS`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters import ADAPTERS, AdapterHandle, AttachContext, adapter_state, export_lora, halves
from valign.adapters.factors import only_adapter
from valign.adapters.lora_sb import FRACTION
from valign.checks import read_options
from valign.data.images.latents import LatentCache
from valign.interfaces import PairCache, Sampler
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_off, bare_denoiser, unload_adapters
from valign.models.files.adapter_files import save_adapter
from valign.objectives import PairErrors, denoising_error
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import PairBatch, PairSource
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.pair_step import PairStep, weigh
from valign.training.tasks.preference.trainable import Fixed


@dataclass(frozen=True, kw_only=True)
class ExpertContext(AttachContext):
    """What an adapter may know of a training on pairs. Policy and reference are the base model while it starts."""

    step: PairStep | None  # None: without data, for an adapter whose start needs none
    source: PairSource | None

    def first_learning_rate(self, learning_rate: float) -> float:
        assert self.step is not None
        return self.step.config.schedule().at(0)

    def first_losses(self, rows: int) -> Sequence[Callable[[], Tensor]]:
        """This process' share of max(rows, 0.1 %) pairs, in turn, each visit with its own draws, so a resumed run repeats it."""
        assert self.step is not None
        assert self.source is not None
        pairs, accelerator = len(self.source), self.step.accelerator
        places = [(index % pairs, index // pairs) for index in range(max(rows, ceil(FRACTION * pairs)))]
        mine = places[accelerator.process_index :: accelerator.num_processes]
        return [partial(first_loss, self.step, self.source, place) for place in mine]


@dataclass
class DenoiserAdapter:
    """The config's adapter on the model's denoiser; the reference is the same model with it switched off.

    Rank, alpha, targets and learning rate are the config's; everything else is the default of the method's options.
    """

    model: DiffusionModel
    config: PreferenceConfig
    handle: AdapterHandle | None = None

    @property
    def sampler(self) -> Sampler:
        return self.model

    def attach(self) -> None:
        bare_denoiser(self.model)

    def start(self, step: PairStep | None, source: PairSource | None) -> None:
        config, processes = self.config, 1 if step is None else step.accelerator.num_processes
        settings = {"rank": config.rank, "learning_rate": config.learning_rate}
        settings |= {} if config.alpha is None else {"alpha": config.alpha}
        context = ExpertContext(
            network=self.model.denoiser,
            head=(),
            targets=config.targets,
            steps=config.steps,
            batch_size=config.pairs_per_step // (processes * config.memory.micro_batches),
            first_rate=config.schedule().at(0) / config.learning_rate,
            seed=config.init_seed,
            loss=partial(batch_loss, step, source),
            expert=True,
            processes=processes,
            reduce=None if step is None else partial(reduce_sum, step.accelerator),
            step=step,
            source=source,
        )
        self.handle = read_options(ADAPTERS[config.adapter], settings, name=config.adapter).attach(context)

    def detach(self) -> None:
        unload_adapters(self.model)

    def off(self, model: Any) -> AbstractContextManager[Any]:
        return adapter_off(model)

    def rules(self) -> AdapterHandle:
        assert self.handle is not None  # `start` was called
        return self.handle if ADAPTERS[self.config.adapter].adaptive else Fixed(self.model.denoiser, self.parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in sorted(self.model.denoiser.named_parameters()) if p.requires_grad}

    def state(self) -> Mapping[str, Tensor]:
        return adapter_state(self.model.denoiser, only_adapter(self.model.denoiser, None))

    def source(self, cache: PairCache, rows: Tensor, config: PreferenceConfig) -> PairSource:
        assert isinstance(cache, LatentCache)  # what `train_preference` takes
        return PairSource(self.model, cache, rows, config)

    def result(self, out: Path) -> Path:
        return out / "adapter"

    def save(self, out: Path, metadata: Mapping[str, Any]) -> None:
        factors, prefix = export_lora(self.model.denoiser), self.model.components["denoiser"]
        save_adapter(self.result(out), factors, metadata=metadata, prefix=prefix)


def batch_loss(step: PairStep | None, source: PairSource | None, number: int, half: int | None) -> Tensor:
    """Mean of `graded` over this process' batch ``number`` of the pairs, or of one half of them."""
    assert step is not None  # only an adapter that needs data asks for it
    assert source is not None
    config = step.config
    parts = () if half is None else halves(len(source), generator=generator_for("halves", config.seed))
    known = range(len(source)) if half is None else parts[half]
    size = config.pairs_per_step // (step.accelerator.num_processes * config.memory.micro_batches)
    visits = Visits(len(known), size, config.seed).at(number)
    batch = source.visit([(known[place], visit) for place, visit in visits], safe_caption=False)
    return graded(step, batch, step.errors(batch, reference=True)) / size


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
