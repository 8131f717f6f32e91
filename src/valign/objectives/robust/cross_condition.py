"""Features under a bad condition drawn to those of the same place under a good one (CMA, arXiv 2303.05194).

Negatives are features of the bad condition itself, so what tells two conditions apart does not help to find the positive.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, grid_sample, normalize

from valign.checks import UserError, check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="cma",
    title="CMA: contrastive adaptation to bad conditions without the source's labels",
    paper="arXiv 2303.05194",
    room="objectives",
    entry="valign.objectives.robust.cross_condition:CrossConditionContrastive",
    fidelity="exact",
    note="the released loss, queue, warp, confidence and pseudo-labels; the network that aligns two photographs is the caller's",
)


@dataclass(frozen=True, kw_only=True)
class ContrastOptions:
    """The contrast of one training. The defaults are the authors'."""

    width: int = option(128, help="numbers of a projected feature", low=1)
    temperature: float = option(0.3, help="of the contrast", above=0)
    grid: int = option(7, help="cells on a side that features are pooled into; 1 for one feature per image", low=1)
    queue: int = option(65_536, help="negatives that are kept", low=1)
    least_confidence: float = option(0.2, help="of a cell, below which it is left out", low=0, high=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class CellContrast:
    """The mean loss over ``kept`` cells; 0 without any, where there is nothing to learn from."""

    loss: Float[Tensor, ""]
    kept: int


class CrossConditionContrastive:
    """InfoNCE of pooled features against a queue of earlier ones under the bad condition.

    The queue starts with random unit vectors, so the first losses mean little; `state` and `restore` keep it over a resume.
    """

    def __init__(self, options: ContrastOptions, generator: torch.Generator) -> None:
        self.options = options
        self.negatives = normalize(torch.randn(options.queue, options.width, generator=generator), dim=1)
        self.pushed = 0  # rows, over all calls

    @property
    def pointer(self) -> int:
        """Where the next row goes."""
        return self.pushed % self.options.queue

    def __call__(
        self,
        anchor: Float[Tensor, "image width height column"],
        positive: Float[Tensor, "image width height column"],
        confidence: Float[Tensor, "image 1 height column"],
    ) -> CellContrast:
        """The loss of ``anchor``, which alone has a gradient.

        Args:
            anchor: Projected features under the bad condition.
            positive: Those of the same places under the good one.
            confidence: That they are the same places, in [0, 1].
        Raises: ValueError for other shapes, a grid finer than the map, or a confidence outside [0, 1].
        """
        self._check(anchor)
        if positive.shape != anchor.shape:
            shapes = f"{tuple(anchor.shape)} as the anchor, got {tuple(positive.shape)}"
            raise ValueError(f"CrossConditionContrastive.positive must be of shape {shapes}.")
        if confidence.shape != (len(anchor), 1, *anchor.shape[2:]):
            raise ValueError(
                "CrossConditionContrastive.confidence must have one channel and the anchor's places, got "
                f"{tuple(confidence.shape)} for {tuple(anchor.shape)}."
            )
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise ValueError("CrossConditionContrastive.confidence must be in [0, 1], got another value or NaN.")
        anchors, positives = self._cells(anchor * confidence), self._cells(positive.detach() * confidence)
        sure = self._cells(confidence)[:, 0] >= self.options.least_confidence
        kept = sure & (anchors.norm(dim=1) > 0) & (positives.norm(dim=1) > 0)
        if not kept.any():
            return CellContrast(anchor.sum() * 0.0, 0)
        one, other = normalize(anchors[kept], dim=1), normalize(positives[kept], dim=1)
        negatives = self.negatives.to(one.device, one.dtype)
        logits = torch.cat([(one * other).sum(1, keepdim=True), one @ negatives.T], dim=1) / self.options.temperature
        return CellContrast(cross_entropy(logits, torch.zeros(len(one), dtype=torch.long, device=one.device)), int(kept.sum()))

    @torch.no_grad()
    def push(self, features: Float[Tensor, "image width height column"]) -> None:
        """Put every cell of ``features``, of the bad condition, into the queue; the oldest go. Raises: ValueError if too many."""
        self._check(features)
        rows = normalize(self._cells(features), dim=1).to(self.negatives)
        if len(rows) > len(self.negatives):
            raise ValueError(
                f"ContrastOptions.queue must hold at least the {len(rows)} cells of one step, got {len(self.negatives)}. "
                "Make it twenty times as long."
            )
        places = (self.pointer + torch.arange(len(rows))) % len(self.negatives)
        self.negatives[places] = rows
        self.pushed += len(rows)

    def state(self) -> dict[str, Tensor]:
        """The queue, for a checkpoint."""
        return {"negatives": self.negatives, "pushed": torch.tensor(self.pushed)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Undo `state`."""
        self.negatives = state["negatives"].clone()
        self.pushed = int(state["pushed"])

    def _cells(self, features: Float[Tensor, "image channel height column"]) -> Float[Tensor, "cell channel"]:
        pooled = adaptive_avg_pool2d(features, self.options.grid)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)

    def _check(self, features: Tensor) -> None:
        if features.shape[1] != self.options.width:
            raise ValueError(
                f"CrossConditionContrastive needs features of {self.options.width} numbers, got {features.shape[1]}. Project them."
            )
        if min(features.shape[2:]) < self.options.grid:
            raise ValueError(
                f"ContrastOptions.grid must be at most the map's {min(features.shape[2:])} places a side, got {self.options.grid}: "
                "pooling would repeat them. Choose a coarser grid."
            )


@dataclass(frozen=True)
class Warped:
    """A map moved by a flow, and which places it has a value for."""

    features: Float[Tensor, "image channel height column"]
    inside: Bool[Tensor, "image 1 height column"]


def warp(features: Float[Tensor, "image channel height column"], flow: Float[Tensor, "image 2 height column"] | None) -> Warped:
    """The features at each place plus its flow, bilinear; places on or beyond the border have none.

    Args: flow: In places, x before y; None stands for no motion, and every place is inside.
    Raises: ValueError for NaN or infinity.
    """
    everywhere = torch.ones_like(features[:, :1], dtype=torch.bool)
    if flow is None:
        return Warped(features, everywhere)
    if not flow.isfinite().all():
        raise ValueError("warp.flow must be finite, got NaN or infinity. Set unknown places' confidence to 0 and their flow to 0.")
    if not flow.any():
        return Warped(features, everywhere)
    height, width = features.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height, dtype=flow.dtype), torch.arange(width, dtype=flow.dtype), indexing="ij")
    x = 2 * (columns.to(flow) + flow[:, 0]) / max(width - 1, 1) - 1
    y = 2 * (rows.to(flow) + flow[:, 1]) / max(height - 1, 1) - 1
    moved = grid_sample(features, torch.stack([x, y], dim=3).to(features), align_corners=True, padding_mode="zeros")
    inside = (x > -1) & (x < 1) & (y > -1) & (y < 1)
    return Warped(moved, inside[:, None])


def flow_confidence(
    log_variance: Float[Tensor, "image 1 height column"], *, radius: float = 1.0
) -> Float[Tensor, "image 1 height column"]:
    """Probability that the true flow lies within ``radius`` places, ``1 - exp(-radius^2 / (2 exp(log_variance)))``."""
    check_range("flow_confidence.radius", radius, above=0.0)
    return 1 - torch.exp(-(radius**2) / (2 * log_variance.exp()))


def content_match(one: Float[Tensor, " image *map"], other: Float[Tensor, " image *map"]) -> Float[Tensor, " image"]:
    """How far two images show one content: the cosine of their frozen features, cut off at 0."""
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1), dim=1).clamp(min=0)


def class_thresholds(probabilities: Float[Tensor, "sample class"], *, portion: float = 0.2) -> Float[Tensor, " class"]:
    """Of every class, the probability that a share ``portion`` of the samples predicted as it reach; 1 where there are none."""
    check_range("class_thresholds.portion", portion, above=0.0, high=1.0)
    best, predicted = probabilities.max(dim=1)
    found = torch.ones(probabilities.shape[1], dtype=probabilities.dtype)
    for number in range(probabilities.shape[1]):
        own = best[predicted == number].sort(descending=True).values
        if len(own):
            found[number] = own[min(round(portion * len(own)), len(own) - 1)]
    return found


IGNORED = 255  # label of a sample that is not trained


def balanced_labels(probabilities: Float[Tensor, "sample class"], thresholds: Float[Tensor, " class"]) -> Tensor:
    """The class with the highest probability over its threshold; `IGNORED` where none reaches its own."""
    share, label = (probabilities / thresholds.to(probabilities)).max(dim=1)
    return torch.where(share < 1, IGNORED, label)


def label_loss(logits: Float[Tensor, "sample class"], labels: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy with pseudo-labels; 0 where all are `IGNORED`, for there is nothing to learn."""
    if not (labels != IGNORED).any():
        return logits.sum() * 0.0
    return cross_entropy(logits, labels, ignore_index=IGNORED)


def normalized_entropy(logits: Float[Tensor, "sample class"]) -> Float[Tensor, ""]:
    """Mean entropy over that of a uniform answer, in [0, 1]. Raises: ValueError for fewer than two classes."""
    check_range("normalized_entropy.classes", float(logits.shape[1]), low=2.0)
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(1).mean() / torch.tensor(float(logits.shape[1])).log().to(logits)


def average_momentum(step: int, *, most: float = 0.9999) -> float:
    """Of the averaged copies at ``step``, from 0: ``1 - 1 / (step + 1)``, so they start as the network, and at most ``most``."""
    check_range("average_momentum.step", float(step), low=0.0)
    return min(1 - 1 / (step + 1), most)


def check_pairs(normal: object, adverse: object) -> None:
    """Raises: UserError unless both conditions have one image of each content."""
    one, other = len(normal), len(adverse)  # type: ignore[arg-type]
    if one != other or not one:
        raise UserError(
            f"Adaptation needs pairs, an image of each content under both conditions; got {one} and {other}. "
            "For images without partners use plain self-training."
        )
