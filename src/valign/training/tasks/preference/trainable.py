"""What a preference training trains, as its loop sees it: an adapter on the denoiser, or a value encoder."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from valign.adapters import AdapterHandle
from valign.interfaces import PairCache, Sampler
from valign.models.diffusion.base import DiffusionModel
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.pair_step import PairStep


@runtime_checkable
class TrainableAdapter(Protocol):
    """How the loop reaches what is trained. The loop knows neither a denoiser's layers nor a text encoder's."""

    @property
    def model(self) -> DiffusionModel: ...  # the policy, as far as ``predict`` and ``generate`` go
    @property
    def sampler(self) -> Sampler: ...  # generates the policy's images, and inside `off` the reference's
    def attach(self) -> None: ...  # check that the model can take it, and freeze the model
    def start(self, step: PairStep | None, source: PairSource | None) -> None:
        """Put it on the model, trainable; before `parameters`. ``None`` for what needs no data to start."""

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
