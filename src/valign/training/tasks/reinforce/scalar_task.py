"""Training a scalar model on pairs of chats: reward, cost, and shadow rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.data.chats.dual_preferences import DualPreference
from valign.models.language.scalar import ScalarChat
from valign.objectives.rewards.safe_rlhf import cost_loss, reward_loss
from valign.training.engine.draws import Visits
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask

Chat = Any  # as the scalar model takes it: messages, or an image with messages
PairLoss = Callable[[Float[Tensor, " pair"], Float[Tensor, " pair"], Sequence[int]], Float[Tensor, " pair"]]


@dataclass(frozen=True, kw_only=True)
class ScalarConfig:
    """The budget of one scalar model."""

    scalar_steps: int = option(300, help="optimizer steps of each reward or cost model", low=1)
    scalar_batch: int = option(16, help="pairs per step of these", low=1, rare=True)
    scalar_learning_rate: float = option(3e-5, help="learning rate of these", above=0)
    scale: float = option(1.0, help="kappa: weight of the cost model's boundary beside its ranking", low=0, rare=True)
    use_severity: bool = option(False, help="multiply costs by how severe the harm is, not by its sign alone", rare=True)

    def __post_init__(self) -> None:
        check_options(self)


class ScalarTask(TrainingTask):
    """``loss`` of the scores of two chats per pair; all weights train."""

    def __init__(
        self, scalar: ScalarChat, pairs: Sequence[tuple[Chat, Chat]], loss: PairLoss, config: ScalarConfig, *, seed: int, label: str
    ) -> None:
        self.scalar, self.pairs, self.loss = scalar, pairs, loss
        self.visits = Visits(len(pairs), config.scalar_batch, seed)
        self.schedule = Schedule(steps=config.scalar_steps, warmup=round(0.03 * config.scalar_steps), decay="cosine")
        scalar.model.requires_grad_(True)
        parameters = list(scalar.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=config.scalar_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        keep_peaks(self.optimizer)
        self.max_norm = 1.0
        self.loop = LoopConfig(steps=config.scalar_steps, label=label, checkpoint_every=100)

    def gradients(self, step: int) -> dict[str, float]:
        places = [place for place, _ in self.visits.at(step)]
        scores = self.scalar.scores([chat for side in (0, 1) for chat in (self.pairs[place][side] for place in places)])
        first, second = scores.chunk(2)
        loss = self.loss(first, second, places).mean()
        loss.backward()
        return {"loss": float(loss.detach()), "ranked": float((first > second).float().mean())}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.scalar.model.named_parameters())


def fit_scalar(
    scalar: ScalarChat,
    pairs: Sequence[tuple[Chat, Chat]],
    loss: PairLoss,
    config: ScalarConfig,
    accelerator: Accelerator,
    *,
    out: Path | None,
    seed: int,
    label: str,
) -> float:
    """Train ``scalar`` in place, frozen afterwards; return the share of pairs that it ranks, on the pairs it has seen."""
    scalar.model.train()
    TrainingLoop(ScalarTask(scalar, pairs, loss, config, seed=seed, label=label), accelerator, out=out).run()
    scalar.model.eval().requires_grad_(False)
    first, second = (scalar.scored([pair[side] for pair in pairs]) for side in (0, 1))
    return float((first > second).float().mean())


def reward_pairs(rows: Sequence[DualPreference]) -> tuple[list[tuple[Chat, Chat]], PairLoss]:
    """Better and worse answers by helpfulness, and the loss of a reward model."""

    def loss(better: Tensor, worse: Tensor, places: Sequence[int]) -> Any:
        return reward_loss(better, worse)

    return [(row.chat(row.better), row.chat(1 - row.better)) for row in rows], loss


def cost_pairs(rows: Sequence[DualPreference], config: ScalarConfig) -> tuple[list[tuple[Chat, Chat]], PairLoss]:
    """Less safe and safer answers, and the loss of a cost model."""
    signs = torch.tensor([[-row.harmless[1 - row.safer], -row.harmless[row.safer]] for row in rows])
    signs = signs if config.use_severity else signs.sign()

    def loss(high: Tensor, low: Tensor, places: Sequence[int]) -> Any:
        here = signs[list(places)].to(high)
        return cost_loss(high, low, here[:, 0], here[:, 1], scale=config.scale)

    return [(row.chat(1 - row.safer), row.chat(row.safer)) for row in rows], loss
