"""What fine-tuning trains: a transformers model, with a linear head of ours on an encoder; its batches, answers and losses.

Adapters sit on ``network``, the transformers model alone, so that peft loads them onto a plain ``AutoModel``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from valign.checks import UserError
from valign.data.tasks.base import Kind, TaskData, TaskRow

NOT_COUNTED = -100  # token that adds nothing to a causal loss


@dataclass(frozen=True)
class TaskBatch:
    """Some rows as tensors, with their targets."""

    inputs: Mapping[str, Tensor]  # what the network takes; pairs that are read apart have the second parts below the first ones
    target: Tensor  # class [row], standardized number [row], or next tokens [row, token]
    weight: int  # rows, or tokens that count: the loss of a batch is a sum, divided by this


@dataclass(frozen=True)
class Target:
    """How a task's targets become tensors: classes in order, or the mean and spread that standardize numbers."""

    kind: Kind
    parts: int = 1  # inputs per row
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, data: TaskData) -> "Target":
        """From the training rows."""
        kind, parts = data.task.kind, data.task.parts
        if kind != "regression":
            return cls(kind, parts, data.labels)
        numbers = torch.tensor([row.target for row in data.train], dtype=torch.float64)
        return cls(kind, parts, (), float(numbers.mean()), float(numbers.std(correction=0)))

    def tensor(self, rows: Sequence[TaskRow]) -> Tensor:
        if self.kind == "classification":
            return torch.tensor([self.labels.index(str(row.target)) for row in rows])
        return (torch.tensor([row.target for row in rows], dtype=torch.float64) - self.mean).div(self.spread).float()

    @property
    def outputs(self) -> int:
        """Numbers that the head gives."""
        return len(self.labels) if self.kind == "classification" else 1


class TaskModel(nn.Module, ABC):
    """``network`` and ``head``; None for a language model, which has its own, and for CLIP, which needs none.

    ``worded_calibration``: its answers to calibration rows are distributions over words; None: if those to the task's rows are.

    Args:
        apart: Rows have two parts, read apart: the head sees ``[u, v, |u - v|, u * v]``.
        fingerprint: SHA-256 of the network's weights. seed: Of the head; None for a network that answers without one.
    """

    worded_calibration: ClassVar[bool | None] = None

    def __init__(self, network: nn.Module, target: Target, *, apart: bool, fingerprint: str, seed: int | None) -> None:
        super().__init__()
        self.network, self.target, self.apart, self.fingerprint = network, target, apart, fingerprint
        self.head: nn.Linear | None = None
        if target.kind != "causal-lm" and seed is not None:
            width = int(network.config.hidden_size)  # type: ignore[union-attr, arg-type]
            self.head = nn.Linear(width * (4 if apart else 1), target.outputs)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                self.head.weight.normal_(std=0.02, generator=generator)
                self.head.bias.zero_()

    @abstractmethod
    def batch(self, rows: Sequence[Any]) -> TaskBatch:
        """The rows on the model's device."""

    @abstractmethod
    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        """The encoder's vector of each input, before the head."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """How rows are read, for a run's record."""

    def cut(self, rows: Sequence[Any]) -> int:
        """How many rows have text that is longer than the model reads; 0 for a model without texts."""
        return 0

    @property
    def main(self) -> nn.Module:
        """The network whose architecture says what is adapted by default."""
        return self.network

    def more_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """``targets`` with what the model adds to them; nothing by default."""
        return targets

    def attached(self, handle: Any) -> None:
        """Called once a method is on `network`. Raises: UserError for a method whose result the model cannot save."""

    def prepare(self, rows: Sequence[Any]) -> None:
        """Called once before training with all rows that will be seen; nothing by default."""

    def checkpoint_gradients(self) -> None:
        """Recompute the network's activations in the backward pass: less memory, more time.

        Raises: UserError if the network cannot.
        """
        network: Any = self.network
        if hasattr(network, "enable_gradient_checkpointing"):  # diffusers
            network.enable_gradient_checkpointing()
        elif getattr(network, "supports_gradient_checkpointing", False):  # transformers
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            raise UserError(
                f"memory.gradient_checkpointing must be off for {type(network).__name__}, which cannot recompute. Leave it out."
            )

    def graded(self, rows: Sequence[Any]) -> dict[str, float]:
        """Scores on held-out rows that need more than one answer per row; none by default."""
        return {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: TaskBatch) -> Tensor:
        """Logits ``[row, class]``, standardized numbers ``[row, 1]``, or logits ``[row, token, word]``."""
        if self.head is None:
            return self.network(**batch.inputs).logits
        features = self.vectors(batch.inputs)
        if self.apart:
            u, v = features.chunk(2)
            features = torch.cat([u, v, (u - v).abs(), u * v], dim=1)
        return self.head(features)

    def loss(self, batch: TaskBatch) -> Float[Tensor, ""]:
        """`summed` over the model's answer."""
        return self.summed(self(batch).float(), batch)

    def summed(self, answer: Tensor, batch: TaskBatch) -> Float[Tensor, ""]:
        """Loss summed over rows (squared error, cross-entropy in nats) or over counted tokens."""
        if self.target.kind == "regression":
            return (answer[:, 0] - batch.target).square().sum()
        if self.target.kind == "classification":
            return cross_entropy(answer, batch.target, reduction="sum")
        return cross_entropy(answer[:, :-1].flatten(0, 1), batch.target[:, 1:].flatten(), reduction="sum", ignore_index=NOT_COUNTED)
