"""An expert whose ranks, or modules, are found while it trains: `valign.training.adapting` on the U-Net; it ends as plain LoRA."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from valign.adapters.adaptive import halves
from valign.checks import UserError
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import bare_denoiser
from valign.randomness import generator_for
from valign.training.adapting import AdapterHandle, AttachContext, parse_tuning
from valign.training.engine.draws import Visits
from valign.training.tasks.preference.adapter_start import graded
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.config import ADAPTIVE, PreferenceConfig
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.trainable import UnetLora


@dataclass
class AdaptiveLora(UnetLora):
    """SoRA, CoDyRA, IncreLoRA or DiffoRA on the U-Net, with the phases and defaults of ``valign finetune``.

    Rank, alpha, targets and learning rate are the config's. DiffoRA's search takes a quarter of the steps.
    """

    name: ClassVar[str] = "default"  # peft's, for it is peft that attaches
    handle: AdapterHandle | None = None

    def attach(self) -> None:
        bare_denoiser(self.model)  # all else needs the data, see `start`

    def start(self, step: PairStep, source: PairSource) -> None:
        """Raises: UserError for DiffoRA on several processes, whose searches could end differently."""
        config, processes = self.config, step.accelerator.num_processes
        if config.adapter == "diffora" and processes > 1:
            raise UserError(f"diffora must search on one process, got {processes}. Start the training without `accelerate launch`.")
        settings = {"rank": config.rank, "learning_rate": config.learning_rate}
        settings |= {} if config.alpha is None else {"alpha": config.alpha}
        size = config.pairs_per_step // (processes * config.accumulation)
        parts = halves(len(source), generator=generator_for("halves", config.seed)) if config.adapter == "diffora" else ()

        def loss(number: int, half: int | None) -> Tensor:
            known = range(len(source)) if half is None else parts[half]
            visits = Visits(len(known), size, config.seed).at(number)
            batch = source.visit([(known[place], visit) for place, visit in visits], safe_caption=False)
            return graded(step, batch, step.errors(batch, reference=True)) / size

        context = AttachContext(
            network=self.model.denoiser,
            head=(),
            targets=config.targets,
            steps=config.steps,
            batch_size=size,
            first_rate=config.schedule().at(0) / config.learning_rate,
            seed=config.init_seed,
            loss=loss,
        )
        self.handle = parse_tuning(config.adapter, settings).adapter.attach(context)

    def rules(self) -> AdapterHandle:
        assert self.handle is not None  # `start` was called
        return self.handle


def unet_adapter(model: DiffusionModel, config: PreferenceConfig) -> UnetLora:
    """What trains the config's adapter on the model's U-Net."""
    return (AdaptiveLora if config.adapter in ADAPTIVE else UnetLora)(model, config)
