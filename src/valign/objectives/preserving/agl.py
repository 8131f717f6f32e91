"""Hold a fine-tuning still in the directions that safety is sensitive to (AlignGuard-LoRA, arXiv 2508.02079)."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from valign.checks import check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="agl",
    title="AlignGuard-LoRA: Fisher-guided penalties keep the update out of safety's directions",
    paper="arXiv 2508.02079",
    room="objectives",
    entry="valign.objectives.preserving.agl:AGL",
    fidelity="variant",
    note="the authors' code does not run and the text was not at hand; the geodesic term has a metric in which it is not zero, "
    "and Fisher values are divided by their mean",
)

COORDINATES = 1024  # kept per layer in coordinate mode
Projector = Literal["left", "vector", "coordinate"]


@dataclass(frozen=True)
class WeightChange:
    """How far a weight is from its reference: ``up @ down``, or ``up`` itself where ``down`` is None."""

    up: Float[Tensor, "fan_out rank"]
    down: Float[Tensor, "rank fan_in"] | None = None

    @cached_property
    def dense(self) -> Float[Tensor, "fan_out fan_in"]:
        return self.up if self.down is None else self.up @ self.down

    def along(self, basis: Float[Tensor, "fan_out kept"]) -> Float[Tensor, "kept fan_in"]:
        """``basis^T change``; from factors without forming the change."""
        inner = basis.T @ self.up
        return inner if self.down is None else inner @ self.down


@dataclass(frozen=True)
class LayerFisher:
    """What safety's gradients say of one weight: the directions that matter, and how much each entry does.

    ``basis`` has orthonormal columns; coordinate mode has ``chosen`` entries instead.
    """

    eigenvalues: Float[Tensor, " kept"]  # descending, >= 0; empty in coordinate mode
    basis: Float[Tensor, "fan_out kept"]
    diagonal: Float[Tensor, "fan_out fan_in"]  # mean of the squared gradient of each entry, >= 0
    chosen: Bool[Tensor, "fan_out fan_in"] | None = None

    def split(self, change: WeightChange) -> tuple[Tensor, Tensor]:
        """The change's part that safety is sensitive to, and the rest; their sum is the change."""
        dense = change.dense
        aligned = self.basis @ change.along(self.basis) if self.chosen is None else dense * self.chosen
        return aligned, dense - aligned

    def sensitivity(self, change: WeightChange) -> Float[Tensor, ""]:
        """``|F^(1/2) P change|^2``: eigenvalues times squared components, or the diagonal times squared entries."""
        if self.chosen is not None:
            return (self.diagonal * self.chosen * change.dense.square()).sum()
        return (self.eigenvalues[:, None] * change.along(self.basis).square()).sum()


class AGLTerms(NamedTuple):
    """The penalties of a layer, each times its weight; `AGL.__call__` is their sum."""

    alignment: Float[Tensor, ""]
    trust: Float[Tensor, ""]
    collision: Float[Tensor, ""]


class FisherSum:
    """The Fisher matrix of one weight, from one sample's gradient at a time: nothing is kept but the sums.

    ``left`` sums ``G G^T``; ``vector`` keeps each sample's flat gradient, one row a sample, as the matrix would be far too large.
    """

    def __init__(self, projector: Projector) -> None:
        self.projector, self.samples = projector, 0
        self._matrix: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._rows: list[Tensor] = []

    def add(self, gradient: Float[Tensor, "fan_out fan_in"]) -> None:
        """One sample's gradient of the safety loss by the weight, float32 at least.

        Raises: ValueError for a gradient that is not finite.
        """
        if not gradient.isfinite().all():
            raise ValueError("FisherSum.add must get finite gradients, got NaN or infinity. Look at the calibration data.")
        wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self.samples += 1
        self._squares = self._squares + wide.square()
        if self.projector == "left":
            self._matrix = self._matrix + wide @ wide.T
        elif self.projector == "vector":
            self._rows.append(wide.flatten())

    @property
    def matrix(self) -> Float[Tensor, "fan_out fan_out"]:
        """The mean of ``G G^T``; left mode."""
        return self._matrix / self.samples  # type: ignore[return-value]

    @property
    def diagonal(self) -> Float[Tensor, "fan_out fan_in"]:
        """The mean of the squared gradient of each entry."""
        return self._squares / self.samples  # type: ignore[return-value]

    def spectrum(self) -> tuple[Float[Tensor, " kept"], Float[Tensor, "fan_out kept"]]:
        """Eigenvalues, descending and >= 0, and eigenvectors as columns; in vector mode one per sample at most."""
        if self.projector == "vector":
            _, values, vectors = torch.linalg.svd(torch.stack(self._rows), full_matrices=False)
            return values.square() / self.samples, vectors.T
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.flip(0).clamp(min=0), vectors.flip(1)


def kept_directions(eigenvalues: Float[Tensor, " size"], *, energy: float, cap: int) -> int:
    """The least m whose first m eigenvalues hold ``energy`` of the sum, at most ``cap``; eigenvalues descend."""
    share = eigenvalues.cumsum(0) / eigenvalues.sum()
    return min(int((share < energy).sum()) + 1, cap, len(eigenvalues))


@dataclass(frozen=True, kw_only=True)
class AGL:
    """``lambda_A |F^(1/2) P D|^2 + lambda_T |H^(1/2) (1 - P) D|^2 + lambda_NC (alpha E_RM + (1 - alpha) E_geo)`` of a change D.

    P projects on the directions to which the safety loss is most sensitive, F is its Fisher matrix. ``E_RM`` weighs places where
    both parts change, ``sum of eta |D_A D_T|`` with ``eta = 1 + beta sigmoid(|D| - tau)``; ``E_geo`` is the squared cosine of both
    parts. With the Euclidean metric that cosine is zero whatever D is, since P is orthogonal; the elementwise Fisher metric does
    not commute with P, so the term is live. A change of 0 costs nothing.

    Raises: ValueError for weights, beta, tau or eps out of range, or an unknown choice.
    """

    lambda_A: float = option(0.25, help="weight of changes along safety's directions", low=0)
    lambda_T: float = option(0.50, help="weight of changes elsewhere: the trust region", low=0)
    lambda_NC: float = option(0.10, help="weight of the collision of both", low=0)
    alpha: float = option(0.5, help="share of the entrywise collision; the rest is the geodesic one", low=0, high=1)
    beta: float = option(4.0, help="extra weight of large entries in the entrywise collision", low=0)
    tau: float = option(0.01, help="size of a large entry", low=0)
    eps: float = option(1e-12, help="added to the geodesic denominator", above=0, rare=True)
    projector: Projector = option(
        "left", help="directions of each weight's outputs (left), of all trained numbers (vector), or entries (coordinate)"
    )
    trust: Literal["identity", "fisher_diagonal", "task_ema"] = option(
        "fisher_diagonal", help="what the trust region weighs entries by: one, safety's Fisher, or the task's squared gradients"
    )
    geo_metric: Literal["fisher_elementwise", "euclidean"] = option(
        "fisher_elementwise", help="of the geodesic collision; euclidean, as published, is always zero"
    )
    reduction: Literal["mean", "sum"] = option("mean", help="of the entrywise collision over the entries of a weight")
    fisher_normalize: Literal["mean", "none"] = option(
        "mean", help="divide Fisher values by their mean, so that the weights mean the same for every model; none: as published"
    )
    fisher_labels: Literal["data", "model"] = option(
        "data", help="gradients of the calibration answers, or of answers drawn from the model (the true Fisher)"
    )
    energy: float = option(0.9, help="share of the eigenvalues' sum that is kept", above=0, high=1)
    cap: int = option(128, help="directions kept per weight at most", low=1)
    directions: int | None = option(None, help="directions (entries in coordinate mode) kept per weight; none: by energy", low=1)
    clamp: bool = option(False, help="take all directions where fewer than that are there, instead of refusing", rare=True)
    warmup: float = option(0.1, help="share of the steps in which the collision's weight rises from 0", low=0, high=1, rare=True)
    refresh_every: int = option(0, help="steps after which the Fisher matrix is estimated anew; 0: never", low=0, rare=True)
    ema_decay: float = option(0.95, help="of the squared task gradients, for task_ema", low=0, high=1, rare=True)

    def __post_init__(self) -> None:
        check_options(self)
        if self.lambda_NC and self.projector == "coordinate":
            warnings.warn("AGL's collision terms are zero in coordinate mode: both parts never share an entry.", stacklevel=3)
        elif self.lambda_NC and self.alpha < 1 and self.geo_metric == "euclidean":
            warnings.warn("AGL's geodesic collision is zero in the Euclidean metric; use fisher_elementwise.", stacklevel=3)

    def fisher(self, gathered: FisherSum, *, name: str = "the weight") -> LayerFisher:
        """Directions and diagonal of one weight from its samples' gradients.

        Raises: ValueError without samples, for gradients that are all zero, or more ``directions`` than there are.
        """
        if not gathered.samples:
            raise ValueError("AGL must have calibration samples, got none. Add rows to the calibration file.")
        diagonal = gathered.diagonal
        if not diagonal.any():
            raise ValueError(
                f"AGL must have gradients on the calibration data, got only zeros for {name}. Leave it out of the targets, or use "
                "other calibration rows."
            )
        scaled = diagonal / diagonal.mean() if self.fisher_normalize == "mean" else diagonal
        if self.projector == "coordinate":
            count = self._wanted(min(COORDINATES, diagonal.numel()), diagonal.numel(), name)
            chosen = torch.zeros(diagonal.numel(), dtype=torch.bool, device=diagonal.device)
            chosen[diagonal.flatten().topk(count).indices] = True
            empty = diagonal.new_zeros(0)
            return LayerFisher(empty, diagonal.new_zeros(len(diagonal), 0), scaled, chosen.view_as(diagonal))
        values, vectors = gathered.spectrum()
        count = self._wanted(kept_directions(values, energy=self.energy, cap=self.cap), len(values), name)
        values = values[:count] / (values[:count].mean() if self.fisher_normalize == "mean" else 1)
        return LayerFisher(values, vectors[:, :count].contiguous(), scaled)

    def _wanted(self, default: int, most: int, name: str) -> int:
        count = self.directions or default
        if count > most and not self.clamp:
            check_range("AGL.directions", count, low=1, high=most, hint=f"{name} has no more; set clamp to take them all.")
        if count > most:
            warnings.warn(f"AGL takes all {most} directions of {name}, fewer than the {count} asked for.", stacklevel=4)
        return min(count, most)

    def warm(self, step: int, steps: int) -> float:
        """Factor in [0, 1] on the collision's weight at ``step`` (from 0) of ``steps``."""
        rising = self.warmup * steps
        return min(1.0, step / rising) if rising else 1.0

    def terms(
        self,
        change: WeightChange,
        fisher: LayerFisher,
        *,
        trust: Float[Tensor, "fan_out fan_in"] | None = None,
        warm: float = 1.0,
    ) -> AGLTerms:
        """The three penalties of one weight.

        Args:
            trust: Weight of each entry, >= 0, instead of the option's; for ``task_ema`` the running mean.
            warm: `warm` of the step.
        Raises: ValueError for shapes that do not fit, or a negative ``trust``.
        """
        shape, wanted = (len(change.up), (change.up if change.down is None else change.down).shape[1]), tuple(fisher.diagonal.shape)
        if shape != wanted:
            raise ValueError(f"AGL.terms.change must have the Fisher matrix's shape {wanted}, got {shape}. Estimate it anew.")
        zero = change.up.new_zeros(())
        alignment = self.lambda_A * fisher.sensitivity(change) if self.lambda_A else zero
        collides = self.lambda_NC * warm
        if not self.lambda_T and not collides:
            return AGLTerms(alignment, zero, zero)
        aligned, rest = fisher.split(change)
        entry = self._trust(fisher, trust)
        held = self.lambda_T * (rest.square() if entry is None else entry * rest.square()).sum()
        collision = collides * self.collision(aligned, rest, fisher.diagonal) if collides else zero
        return AGLTerms(alignment, held, collision)

    def __call__(self, change: WeightChange, fisher: LayerFisher, *, warm: float = 1.0) -> Float[Tensor, ""]:
        """The sum of `terms`."""
        return torch.stack(self.terms(change, fisher, warm=warm)).sum()

    def collision(
        self,
        aligned: Float[Tensor, "fan_out fan_in"],
        rest: Float[Tensor, "fan_out fan_in"],
        diagonal: Float[Tensor, "fan_out fan_in"],
    ) -> Float[Tensor, ""]:
        """``alpha E_RM + (1 - alpha) E_geo`` of both parts of a change; ``diagonal`` is the metric of the latter."""
        entrywise, geodesic = aligned.new_zeros(()), aligned.new_zeros(())
        if self.alpha:
            entrywise = entrywise_collision(aligned, rest, beta=self.beta, tau=self.tau, reduction=self.reduction)
        if self.alpha < 1:
            metric = diagonal if self.geo_metric == "fisher_elementwise" else None
            geodesic = geodesic_collision(aligned, rest, metric, eps=self.eps)
        return self.alpha * entrywise + (1 - self.alpha) * geodesic

    def _trust(self, fisher: LayerFisher, given: Tensor | None) -> Tensor | None:
        if given is None and self.trust == "task_ema":
            raise ValueError("AGL.terms must get trust with task_ema, got None. Give the running mean of squared task gradients.")
        if given is None:
            return None if self.trust == "identity" else fisher.diagonal
        if given.shape != fisher.diagonal.shape or not (given >= 0).all():
            raise ValueError(
                f"AGL.trust must be >= 0 with shape {tuple(fisher.diagonal.shape)}, got {tuple(given.shape)} with least value "
                f"{given.min().item():g}."
            )
        return given


def entrywise_collision(
    aligned: Float[Tensor, "fan_out fan_in"], rest: Float[Tensor, "fan_out fan_in"], *, beta: float, tau: float, reduction: str
) -> Float[Tensor, ""]:
    """``E_RM``: ``(1 + beta sigmoid(|D| - tau)) |D_A D_T|`` over all entries, D being the sum of both; mean or sum."""
    weight = 1 + beta * torch.sigmoid((aligned + rest).abs() - tau)
    both = weight * (aligned * rest).abs()
    return both.mean() if reduction == "mean" else both.sum()


def geodesic_collision(
    aligned: Float[Tensor, "fan_out fan_in"],
    rest: Float[Tensor, "fan_out fan_in"],
    metric: Float[Tensor, "fan_out fan_in"] | None,
    *,
    eps: float,
) -> Float[Tensor, ""]:
    """``E_geo``: ``<D_A, D_T>^2 / (|D_A|^2 |D_T|^2 + eps)`` in [0, 1], with entries weighed by ``metric`` (None: all alike)."""
    weight = torch.ones_like(aligned) if metric is None else metric
    inner = (weight * aligned * rest).sum()
    return inner.square() / ((weight * aligned.square()).sum() * (weight * rest.square()).sum() + eps)
