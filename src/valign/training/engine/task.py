"""What the engine asks of a training: a task computes gradients, hooks act beside the optimizer, and the loop does all else."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from valign.training.engine.schedule import Schedule
from valign.training.engine.selection import Selection


class Hook(Protocol):
    """What acts on a training beside the optimizer. An adapter's handle is one; a preserving penalty with a state is another.

    Order in a step: gradients of the task, `penalty` and its gradient, clipping, the optimizer's step, `after_step`.
    """

    @property
    def spent(self) -> int: ...  # steps of the budget that are used up before the first
    @property
    def settled(self) -> bool: ...  # whether a step may be kept as the best
    def penalty(self) -> Tensor | None: ...  # a scalar added to the mean loss of a step; the same on every process
    def after_step(self, step: int) -> None: ...  # step ``step`` (from 0) is over; gradients are still there
    def extra(self) -> dict[str, Any]: ...  # its state: nested, JSON-able but for tensors
    def restore(self, extra: Mapping[str, Any]) -> None: ...  # undo `extra`; the task's tensors are written back after it


@dataclass(frozen=True)
class Validation:
    """One validation."""

    score: float  # lower is better
    record: Mapping[str, float]  # for the log; entry "drift" is what `Selection.max_drift` limits


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """When the loop does what; 0 is never."""

    steps: int
    label: str  # what the progress bar says
    checkpoint_every: int = 0  # steps
    keep_checkpoints: int = 1  # latest ones, besides the best
    validate_every: int = 0  # steps
    sample_every: int = 0  # steps between image grids
    trackers: tuple[str, ...] = ()  # names that accelerate knows
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what the trackers are told


class TrainingTask(ABC):
    """One kind of training. A subclass sets the attributes before the loop starts."""

    loop: LoopConfig
    optimizer: torch.optim.Optimizer  # or accelerate's around it
    schedule: Schedule
    selection: Selection | None = None  # None: nothing is validated and the last step is the result
    max_norm: float | None = None  # of all gradients together; None: neither norm nor learning rate are in the log
    hooks: Mapping[str, Hook] = {}

    @abstractmethod
    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of step ``step`` (from 0); return finite numbers for the log, "loss" first."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds, by name; `Checkpoints.load` writes into them."""

    def parameters(self) -> Sequence[Tensor]:
        """Those whose gradients are clipped together."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def suspects(self) -> str:
        """Which data gave a loss that is not finite, as ``" at NAMES"``; "" if that is unknown. Called on every process."""
        return ""

    def inspect(self, number: int, record: Mapping[str, float]) -> str:
        """Look at the record of step ``number`` (from 1); return the reason to stop the training, or ""."""
        return ""

    def may_keep(self) -> bool:
        """Without validation: whether the step just taken may be kept as the best. If none is, the last step is the result."""
        return False

    def validate(self, number: int) -> Validation:
        """Called every ``loop.validate_every`` steps and at the end."""
        raise NotImplementedError  # abstract: for tasks with a selection

    def notes(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON-able state of a checkpoint; ``progress`` is the loop's: ``selection``, ``stopped``, ``seconds``."""
        return dict(progress)

    def extra(self) -> dict[str, Any]:
        """The nested state of a checkpoint, JSON-able but for tensors."""
        return {name: hook.extra() for name, hook in self.hooks.items()}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Undo `extra`, before the tensors are written back."""
        for name, hook in self.hooks.items():
            hook.restore(extra[name])

    def resumed(self, notes: Mapping[str, Any], extra: Mapping[str, Any]) -> None:  # noqa: B027  # most tasks add nothing
        """Undo what `notes` added, once tensors and optimizer are written back."""


def changing_tensors(model: nn.Module, frozen: Collection[int]) -> dict[str, Tensor]:
    """Every tensor of ``model`` that trains or is not the base model's own; of several with equal storage only one.

    Args: frozen: ``id`` of each of the base model's own tensors that does not train.
    """
    found, seen = {}, set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        place = (tensor.data_ptr(), tensor.numel())
        if id(tensor) not in frozen and (tensor.numel() == 0 or place not in seen):
            seen.add(place)
            found[name] = tensor
    return found
