"""Optimizers, and perturbations beside them, by name; the head trains by AdamW under each."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from valign.checks import check_range
from valign.optimizers import GGPO, MGPO, DCTAdamW, GaLore, Trion
from valign.optimizers.base import as_matrix, is_matrix
from valign.optimizers.dct import Feedback
from valign.optimizers.trion import Scale

Groups = list[dict[str, Any]]
HEAD = {"max_dim": 1}  # no matrix is that small: the low-rank optimizers use plain Adam


@runtime_checkable
class Optimizing(Protocol):
    """Options of an optimizer. ``learning_rate`` None is the adapter's."""

    @property
    def learning_rate(self) -> float | None: ...
    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer: ...


@runtime_checkable
class Perturbing(Protocol):
    """Options of a perturbation."""

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> GGPO | MGPO: ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """torch's."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*groups, *head], lr=lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """transformers' at a fixed rate, with its own clipping of updates at 1, as in AlignGuard's launchers for SDXL."""

    learning_rate: float | None = None
    weight_decay: float = 0.0

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Optimizer

        options = {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False}
        return Optimizer([*groups, *head], lr=lr, weight_decay=self.weight_decay, **options)


@dataclass(frozen=True, kw_only=True)
class DctAdamW:
    """`valign.optimizers.DCTAdamW`."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    rank: int = 32  # cosines per matrix; all of them where a matrix is smaller
    update_every: int = 1
    feedback: Feedback = "bf16"

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        options = {**asdict(self), "lr": lr}
        del options["learning_rate"]
        return _quietly(DCTAdamW, by_rank(groups, self.rank), head, options)


@dataclass(frozen=True, kw_only=True)
class GaLoreSteps:
    """`valign.optimizers.GaLore`."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    rank: int = 32
    update_every: int = 200
    scale: float = 1.0  # not the paper's 0.25, so that AdamW's learning rates fit

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        options = {**asdict(self), "lr": lr}
        del options["learning_rate"]
        return _quietly(GaLore, by_rank(groups, self.rank), head, options)


@dataclass(frozen=True, kw_only=True)
class TrionSteps:
    """`valign.optimizers.Trion`."""

    learning_rate: float | None = 1e-3  # a step of 1 has singular values near 1, so AdamW's rates would hardly move a matrix
    weight_decay: float = 0.0
    rank: int = 32
    momentum: float = 0.95
    scale: Scale = "kj"

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        options = {**asdict(self), "lr": lr}
        del options["learning_rate"]
        head = [{**group, "adam_lr": group["lr"], "adam_betas": (0.9, 0.999)} for group in head]
        return _quietly(Trion, by_rank(groups, self.rank), head, options)


@dataclass(frozen=True, kw_only=True)
class Ggpo:
    """`valign.optimizers.GGPO`."""

    sigma: float = 0.03
    beta: float = 0.01
    noise: Literal["weight", "output"] = "weight"

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> GGPO | MGPO:
        return GGPO(network, optimizer, generator=generator, sigma=self.sigma, beta=self.beta, noise=self.noise)


@dataclass(frozen=True, kw_only=True)
class Mgpo:
    """`valign.optimizers.MGPO`."""

    rho: float = 0.05
    decay: float = 0.9  # of the running mean, its beta

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> GGPO | MGPO:
        return MGPO(network, optimizer, rho=self.rho, beta=self.decay)


def by_rank(groups: Sequence[dict[str, Any]], rank: int) -> Groups:
    """The groups cut so that each has matrices of one rank: ``rank``, or their smaller side where that is less."""
    check_range("rank", rank, low=1)
    cut: Groups = []
    for group in groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            fits = min(rank, *as_matrix(parameter).shape) if is_matrix(parameter, 2**62) else rank
            parts.setdefault(fits, []).append(parameter)
        cut += [{**group, "params": params, "rank": fits} for fits, params in sorted(parts.items(), reverse=True)]
    return cut


def _quietly(
    kind: type[DCTAdamW] | type[GaLore] | type[Trion], groups: Groups, head: Groups, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """A group of vectors is meant here: no warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*parameter group without a matrix")
        return kind([*groups, *({**group, **HEAD} for group in head)], **options)
