"""What a preference training trains, beside what it has in common: a LoRA on the U-Net here, a value encoder elsewhere."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from valign.adapters import adapter_state, export_lora
from valign.data.images.latents import LatentCache
from valign.interfaces import PairCache, Sampler
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_off, attach_lora, unload_adapters
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.training.adapting.base import AdapterHandle
from valign.training.tasks.preference.adapter_start import start_adapter
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.pair_step import PairStep

ADAPTER = "expert"  # the name inside the U-Net while training


@runtime_checkable
class TrainableAdapter(Protocol):
    """How the loop reaches what is trained. The loop knows neither a U-Net's layers nor a text encoder's."""

    @property
    def model(self) -> DiffusionModel: ...  # the policy, as far as ``predict`` and ``generate`` go
    @property
    def sampler(self) -> Sampler: ...  # draws the policy's images, and inside `off` the reference's
    def attach(self) -> None: ...  # put it on the model, trainable
    def start(self, step: PairStep, source: PairSource) -> None: ...  # where the start depends on data; before `parameters`
    def detach(self) -> None: ...  # give the model back as it came
    def off(self, model: Any) -> AbstractContextManager[Any]: ...  # inside, exactly the reference
    def rules(self) -> AdapterHandle: ...  # what a step must do beside moving the parameters; once it has started
    def parameters(self) -> dict[str, nn.Parameter]: ...  # by name, in one order; may change from step to step
    def state(self) -> Mapping[str, Tensor]: ...  # what a checkpoint must hold: the parameters, and constants drawn from data
    def source(self, cache: PairCache, rows: Tensor, config: PreferenceConfig) -> PairSource: ...
    def result(self, out: Path) -> Path: ...  # where `save` writes in the run's folder
    def save(self, out: Path, metadata: Mapping[str, Any]) -> None: ...  # what the training was for


class Fixed(AdapterHandle):
    """Parameters that are the same from the first step to the last: nothing but the optimizer acts on them."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(network)
        self.parameters = parameters

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters.values()), "rate": 1.0}]


@dataclass
class UnetLora:
    """One LoRA on the U-Net; the reference is the same model with it switched off."""

    model: DiffusionModel
    config: PreferenceConfig
    name: ClassVar[str] = ADAPTER

    @property
    def sampler(self) -> Sampler:
        return self.model

    def attach(self) -> None:
        config = self.config
        attach_lora(self.model, rank=config.rank, alpha=config.alpha, targets=config.targets, name=self.name, seed=config.init_seed)

    def start(self, step: PairStep, source: PairSource) -> None:
        start_adapter(step, source, self.name)

    def detach(self) -> None:
        unload_adapters(self.model)

    def off(self, model: Any) -> AbstractContextManager[Any]:
        return adapter_off(model)

    def rules(self) -> AdapterHandle:
        return Fixed(self.model.denoiser, self.parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in sorted(self.model.denoiser.named_parameters()) if p.requires_grad}

    def state(self) -> Mapping[str, Tensor]:
        return adapter_state(self.model.denoiser, self.name)

    def source(self, cache: PairCache, rows: Tensor, config: PreferenceConfig) -> PairSource:
        assert isinstance(cache, LatentCache)  # what `train_preference` takes
        return PairSource(self.model, cache, rows, config)

    def result(self, out: Path) -> Path:
        return out / "adapter"

    def save(self, out: Path, metadata: Mapping[str, Any]) -> None:
        factors, prefix = lora_factors(self.model.denoiser, self.name), self.model.components["denoiser"]
        save_adapter(self.result(out), factors, metadata=metadata, prefix=prefix)


def lora_factors(unet: nn.Module, name: str | None = ADAPTER) -> dict[str, LoraFactors]:
    """The handle adapter as plain LoRA by module, on the CPU, however it started."""
    return {module: LoraFactors(lora.down.cpu(), lora.up.cpu(), lora.scale) for module, lora in export_lora(unet, name).items()}
