"""Adapt a detector's encoder to bad conditions, from pairs of images without labels (CMA, arXiv 2303.05194)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from valign.checks import check_options, option
from valign.data.images.conditions import ImagePair
from valign.detectors.adaptable import Tower
from valign.objectives.robust.cross_condition import (
    IGNORED,
    ContrastOptions,
    CrossConditionContrastive,
    average_momentum,
    balanced_labels,
    check_pairs,
    class_thresholds,
    content_match,
    label_loss,
    normalized_entropy,
)
from valign.progress import track
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask

HEAD_RATE = 10.0  # of the projection head against the encoder


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How an encoder is adapted. Shares of the steps are the authors'; sizes are for detectors, not for their 10,000 steps."""

    steps: int = option(200, help="optimizer steps", low=1)
    batch_size: int = option(16, help="pairs per step", low=1)
    learning_rate: float | None = option(None, help="of the encoder; the kind of detector decides if left out", above=0)
    weight_decay: float = option(0.01, help="of matrices", low=0, rare=True)
    warmup: float = option(
        0.15, help="share of the steps in which the learning rate rises; then it falls to 0", low=0, high=1, rare=True
    )
    detached: float = option(
        0.25, help="share of the steps in which the contrast trains its projection alone", low=0, high=1, rare=True
    )
    contrast_weight: float = option(1.0, help="of the contrast between the two conditions", low=0)
    label_weight: float = option(1.0, help="of the detector's own decisions on the clean images as labels", low=0)
    entropy_weight: float = option(0.01, help="of the entropy of decisions under the bad condition", low=0, rare=True)
    portion: float = option(
        0.2,
        help="share of each decision's most certain images that are labels",
        above=0,
        high=1,
        rare=True,
        needs={"label_weight": ()},
    )
    match_content: bool = option(False, help="trust pairs less whose frozen features differ: for pairs that may be false")
    width: int = option(64, help="numbers of a projected feature", low=1, rare=True, needs={"contrast_weight": ()})
    temperature: float = option(0.3, help="of the contrast", above=0, rare=True, needs={"contrast_weight": ()})
    queue: int = option(
        4096, help="negatives that are kept; at least 20 steps' worth", low=1, rare=True, needs={"contrast_weight": ()}
    )
    checkpoint_every: int = option(50, help="steps between checkpoints; 0 is off: a killed run starts again", low=0)
    seed: int = option(0, help="of the order of pairs, of their conditions and of the projection", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_options(self)

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint_every"}


class Projection(nn.Module):
    """Two 1 x 1 convolutions, the first with ReLU; started from the generator as the authors start theirs."""

    def __init__(self, channels: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, width, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(self.first.weight.shape, generator=generator) * (2 / channels) ** 0.5)
            self.second.weight.copy_(torch.randn(self.second.weight.shape, generator=generator) * 0.01)
        nn.init.zeros_(self.first.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, maps: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image width row column"]:
        return self.second(self.first(maps).relu())  # type: ignore[no-any-return]


class ConditionRobustTask(TrainingTask):
    """The tower's encoder and a projection, against averaged copies of both.

    Args:
        pairs: Each visit draws one of ``conditions`` for a pair that has no image of its own under a bad one.
    """

    def __init__(self, tower: Tower, pairs: Sequence[ImagePair], conditions: Sequence[str], config: AdaptConfig) -> None:
        check_pairs(pairs, pairs)
        self.tower, self.pairs, self.conditions, self.config = tower, pairs, tuple(conditions), config
        self.projection = Projection(tower.channels, config.width, generator_for("projection", config.seed))
        options = ContrastOptions(width=config.width, temperature=config.temperature, grid=tower.grid, queue=config.queue)
        self.contrast = CrossConditionContrastive(options, generator_for("queue", config.seed))
        self.labels = self._clean_decisions()
        self.averages = {name: value.detach().clone() for name, value in self._trained().items()}
        self.visits = Visits(len(pairs), min(config.batch_size, len(pairs)), config.seed)
        rate = config.learning_rate or tower.learning_rate
        groups = []
        for trained, factor in ((tower.trained(), 1.0), (dict(self.projection.named_parameters()), HEAD_RATE)):
            for matrices in (True, False):
                own = [value for value in trained.values() if (value.ndim > 1) == matrices]
                groups.append({"params": own, "lr": factor * rate, "weight_decay": config.weight_decay if matrices else 0.0})
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])  # type: ignore[arg-type]
        keep_peaks(self.optimizer)
        self.schedule = Schedule(steps=config.steps, warmup=round(config.warmup * config.steps), decay="linear")
        self.loop = LoopConfig(
            steps=config.steps, label="adapt to conditions", checkpoint_every=config.checkpoint_every, recipe=config.recipe()
        )

    def gradients(self, step: int) -> dict[str, float]:
        config, tower = self.config, self.tower
        places = [place for place, _ in self.visits.at(step)]
        clean, adverse = self._images(places, step)
        maps = tower.maps(adverse)
        logits = tower.logits(maps)
        learnt = maps.detach() if step < config.detached * config.steps else maps
        with torch.no_grad():
            momentum = average_momentum(step)
            for name, value in self._trained().items():
                self.averages[name].lerp_(value.detach(), 1 - momentum)
            own = {name.removeprefix("tower."): value for name, value in self.averages.items() if name.startswith("tower.")}
            slow = [self._projected(tower.maps(images, own)) for images in (adverse, clean)]
            trust = self._trust(adverse, clean, maps)
        found = self.contrast(self.projection(learnt), slow[1], trust)
        labels = self.labels[places].flatten().to(logits.device)
        parts = {
            "contrast": found.loss,
            "labels": label_loss(logits, labels),
            "entropy": normalized_entropy(logits),
        }
        weights = (config.contrast_weight, config.label_weight, config.entropy_weight)
        loss = sum((weight * part for weight, part in zip(weights, parts.values())), start=logits.new_zeros(()))
        loss.backward()
        self.contrast.push(slow[0])
        labelled = float((labels != IGNORED).float().mean())
        return {"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}, "labelled": labelled}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._trained())

    def extra(self) -> dict[str, Any]:
        return {**super().extra(), "averages": self.averages, "contrast": self.contrast.state()}

    def restore(self, extra: Mapping[str, Any]) -> None:
        super().restore(extra)
        self.averages = {name: value.clone() for name, value in extra["averages"].items()}
        self.contrast.restore(extra["contrast"])

    def _trained(self) -> dict[str, Tensor]:
        own = {f"tower.{name}": value for name, value in self.tower.trained().items()}
        return own | {f"projection.{name}": value for name, value in self.projection.named_parameters()}

    def _projected(self, maps: Tensor) -> Tensor:
        weights = {
            name.removeprefix("projection."): value for name, value in self.averages.items() if name.startswith("projection.")
        }
        return functional_call(self.projection, weights, (maps,))  # type: ignore[no-any-return]

    def _images(self, places: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """Pixels of the pairs under the good and the bad condition."""
        rng = np.random.default_rng([self.config.seed, step, 51])
        names = [self.conditions[int(rng.integers(len(self.conditions)))] if self.conditions else "" for _ in places]
        shown = [self.pairs[place].images(name, self.config.seed, step, place) for place, name in zip(places, names)]
        clean, adverse = zip(*shown)
        return self.tower.pixels(clean), self.tower.pixels(adverse)

    @torch.no_grad()
    def _trust(self, adverse: Tensor, clean: Tensor, maps: Tensor) -> Float[Tensor, "image 1 row column"]:
        """That both images show one content, place by place."""
        trust = torch.ones_like(maps[:, :1])
        if not self.config.match_content:
            return trust
        one, other = (self.tower.maps(images, self.start) for images in (adverse, clean))
        return trust * content_match(one, other)[:, None, None, None]

    @torch.no_grad()
    def _clean_decisions(self) -> Tensor:
        """Pseudo-labels of the encoder as it was, on the clean images: ``[pair, decision]``, `IGNORED` where it is not certain."""
        self.start = {name: value.detach().clone() for name, value in self.tower.trained().items()}
        found = []
        size = self.config.batch_size
        for first in track(range(0, len(self.pairs), size), "Deciding on clean images"):
            part = self.pairs[first : first + size]
            images = [pair.images(self.conditions[0] if self.conditions else "", 0)[0] for pair in part]
            found.append(self.tower.logits(self.tower.maps(self.tower.pixels(images))).softmax(dim=1).cpu())
        chances = torch.cat(found)
        labels = balanced_labels(chances, class_thresholds(chances, portion=self.config.portion))
        return labels.view(len(self.pairs), -1)


def adapt_tower(tower: Tower, pairs: Sequence[ImagePair], conditions: Sequence[str], config: AdaptConfig, out: Path) -> int:
    """Train into ``out`` (checkpoints, ``metrics.jsonl``); the tower's network comes back adapted. Returns the steps taken.

    A killed training goes on from its last checkpoint.
    """
    task = ConditionRobustTask(tower, pairs, conditions, config)
    loop = TrainingLoop(task, start_processes(cpu=True), out=out)
    loop.run()
    return loop.done
