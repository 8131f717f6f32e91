"""What GGPO and MGPO share: hooks on a LoRA's linear layers and on the optimizer that trains it. Nothing is added to the model."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.factors import lora_layers, only_adapter
from valign.checks import UserError


def row_norms(left: Float[Tensor, "row rank"], right: Float[Tensor, "rank column"]) -> Float[Tensor, " row"]:
    """L2 norm of each row of ``left @ right``, float32 at least, without forming the product."""
    wide, short = widened(left), widened(right)
    gram = short @ short.T
    return ((wide @ gram) * wide).sum(1).clamp(min=0).sqrt()


def widened(tensor: Tensor) -> Tensor:
    """Half precision in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Perturbation(ABC):
    """Adds `shift` to the output of every linear LoRA layer in training mode, and is told of each optimizer step.

    It follows ``optimizer``: `before_step` runs after backward and clipping, `after_step` when the weights have moved. Evaluation,
    a switched-off or merged adapter and saved files know nothing of it. `remove` takes it off.

    Raises: UserError if the model has no such LoRA; ValueError for a layer that is not linear.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, adapter: str | None = None) -> None:
        owner = type(self).__name__
        self.adapter, self.optimizer = only_adapter(model, adapter), optimizer
        self.layers = lora_layers(model, self.adapter)
        if not self.layers:
            raise UserError(f"{owner}.adapter must be a LoRA, got {self.adapter!r} without a LoRA layer. Check its target_modules.")
        for name, layer in self.layers.items():
            if self.adapter not in layer.lora_A or not isinstance(layer.lora_A[self.adapter], nn.Linear):
                kind = type(layer.get_base_layer()).__name__
                raise ValueError(f"{owner} must have linear layers only, got {name}, a {kind}. Leave it out of target_modules.")
        self._hooks: list[Any] = []

    def _attach(self) -> None:
        """Last in a constructor: nothing is hooked if it refuses."""
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(lambda module, args, out, name=name: self._add(name, module, args, out)))
        self._hooks.append(self.optimizer.register_step_pre_hook(lambda *_: self.before_step()))
        self._hooks.append(self.optimizer.register_step_post_hook(lambda *_: self.after_step()))

    def remove(self) -> None:
        """Take every hook off; model and optimizer are as before."""
        while self._hooks:
            self._hooks.pop().remove()

    def _add(self, name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not layer.training or layer.disable_adapters or layer.merged or self.adapter not in layer.active_adapters:
            return output
        shift = self.shift(name, args[0])
        return output if shift is None else output + shift.to(output.dtype)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`, after the weights and the optimizer. Raises: UserError for a state of other modules."""

    @abstractmethod
    def shift(self, name: str, x: Float[Tensor, "*batch fan_in"]) -> Float[Tensor, "*batch fan_out"] | None:
        """What to add to the layer's output for this input; None is nothing."""

    @abstractmethod
    def before_step(self) -> None:
        """Gradients are there, weights have not moved yet."""

    @abstractmethod
    def after_step(self) -> None:
        """Weights and optimizer state have moved, gradients are still there."""

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """``(A, B, s)`` of a layer."""
        layer = self.layers[name]
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight, float(layer.scaling[self.adapter])

    def check_modules(self, state: dict[str, Any]) -> None:
        """Raises: UserError if a saved state is of other modules."""
        differing = sorted(set(state) ^ set(self.layers))
        if differing:
            owner = type(self).__name__
            raise UserError(f"{owner}: the state was saved for other modules: {', '.join(differing[:4])}. Use the same LoRA.")


class PerturbationOptions:
    """The options of a perturbation: a frozen dataclass that inherits from this, with defaults for all fields, and is a row of
    `PERTURBATIONS`."""

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Perturbation:
        """Hook it to the LoRA on ``network`` and to the optimizer that trains it."""
        raise NotImplementedError  # abstract
