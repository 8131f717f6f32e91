"""HySAC: a CLIP whose embeddings say how unsafe a prompt or an image is, trained, calibrated and tested on quadruples.

Of the quadruples a share is held out, on which the best step is chosen and the thresholds are set; the error is measured on others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_choice, check_options, option, refuse_idle, with_options
from valign.data.images.labelled import HarmExample
from valign.data.images.quadruples import Quadruples
from valign.detectors.calibration import best_threshold, platt
from valign.detectors.errors import DetectorError, measure_detector
from valign.detectors.fitting import copy_encoder, detector_name
from valign.detectors.hysac import HysacDetector, prompt_error
from valign.detectors.record import DetectorRecord, write_record
from valign.interfaces import DetectorCard
from valign.methods import Method
from valign.models.encoders.clip import ClipEncoder
from valign.models.encoders.hyperbolic_clip import (
    ADAPTER,
    DistanceLimit,
    HyperbolicCard,
    HyperbolicClip,
    UnsafeCaptions,
    load_hyperbolic,
    save_hyperbolic,
)
from valign.models.hyperbolic.lorentz import root_distance
from valign.models.hyperbolic.space import HyperbolicSpace
from valign.models.hyperbolic.traversal import Statistic, group_bounds
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings
from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment
from valign.runs import Run, versions
from valign.training.tasks.quadruples import HyperbolicTuning, QuadrupleConfig, embed_all, train_on_quadruples

METHOD = Method(
    slug="hysac-recipe",
    title="HySAC's recipe: LoRA, space, bounds of the groups, thresholds, measured error",
    paper="arXiv 2503.12127",
    room="recipes",
    entry="valign.recipes.hysac:train_hysac",
    fidelity="variant",
    note="probabilities by Platt and the limit by Youden, where the paper leaves the classifier open; the rest as released",
)
MINIATURE = 256  # width of a vision tower up to which published numbers do not carry over
MINIATURE_ENTAILMENT = {"entailment_weight": 5.0, "within_weight": 5.0}  # as released, all captions move to one side of all images
CAPTIONS = 1000  # unsafe captions that are kept to name categories by, at most


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """How the bounds of the groups are taken."""

    statistic: Statistic = option("percentile", help="of a group's distances to the root: the 95th percentile, or the mean")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class HysacRecipe:
    """Every number of a training. The defaults are the authors'; see `for_clip`."""

    training: QuadrupleConfig = field(default_factory=QuadrupleConfig)
    objective: SafetyEntailment = field(default_factory=SafetyEntailment)
    bounds: BoundOptions = field(default_factory=BoundOptions)

    @classmethod
    def for_clip(cls, encoder: ClipEncoder) -> "HysacRecipe":
        """The authors' numbers, or those for a miniature."""
        config: Any = encoder.model.config
        if config.vision_config.hidden_size > MINIATURE:
            return cls()
        return cls(training=QuadrupleConfig.miniature(), objective=SafetyEntailment(**MINIATURE_ENTAILMENT))

    def changed(self, **changes: Any) -> "HysacRecipe":
        """With other numbers, by name; None leaves one as it is. Raises: UserError for one that has no effect."""
        parts = (self.training, self.objective, self.bounds)
        given = {name: value for name, value in changes.items() if value is not None}
        known = sorted(item.name for part in parts for item in fields(part))
        for name in given:
            check_choice("HysacRecipe option", name, known)
        made = [with_options(part, given) for part in parts]
        for part in made:
            refuse_idle(part, given)
        return HysacRecipe(training=made[0], objective=made[1], bounds=made[2])  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """JSON-able; all that shapes the result."""
        return {**self.training.recipe(), **asdict(self.objective), **asdict(self.bounds)}


def train_hysac(
    encoder: ClipEncoder,
    quadruples: Quadruples,
    test: Quadruples,
    out: Path,
    recipe: HysacRecipe | None = None,
    *,
    copy: bool = False,
    domain: Sequence[str] = (),
) -> HyperbolicClip:
    """Train into ``out``, which is then a detector's folder; a finished one of the same data is read. The same call resumes.

    Args:
        encoder: Any transformers CLIP; it comes back with the adapter merged.
        test: Quadruples that the error is measured on, and nothing else.
        copy: Copy the CLIP into the folder instead of naming its place.
        domain: Whose images it can judge, as in `DetectorCard`.
    Raises: UserError if ``out`` was made from something else, or harm was not learned: distances do not rise with it.
    """
    recipe = recipe or HysacRecipe.for_clip(encoder)
    config = recipe.training
    run = Run.open(
        out,
        step="hysac",
        recipe=recipe.record() | {"copy": copy},
        inputs={"clip": encoder.weights_sha256, "quadruples": quadruples.fingerprint, "test": test.fingerprint},
        seed=config.seed,
    )
    if run.done:
        return load_hyperbolic(out)
    train, held_out = quadruples.split(config.held_out, seed=config.seed)
    if copy:
        copy_encoder(encoder.folder, out / "encoder")
    space = HyperbolicSpace(encoder.dim, curvature=config.curvature)
    space.logit_scale.requires_grad_(config.learn_scale)
    if config.balance and train.has_images:
        start = embed_all(encoder, train.rows)
        assert start.safe_image is not None
        assert start.unsafe_image is not None
        space.balance(torch.cat([start.safe_text, start.unsafe_text]), torch.cat([start.safe_image, start.unsafe_image]))
    space.to(encoder.device)
    result = train_on_quadruples(encoder, train, held_out, HyperbolicTuning(space, recipe.objective), config, out, out / ADAPTER)
    adapted = ClipEncoder(out / "encoder" if copy else encoder.folder, adapters=[out / ADAPTER], device=str(encoder.device))
    space.clamp()
    notes = {
        "encoder": "encoder" if copy else str(encoder.folder.resolve()),
        "adapters": [ADAPTER],
        "encoder_sha256": adapted.weights_sha256,
        "quadruples": quadruples.fingerprint,
        **asdict(result),
        **recipe.record(),
    }
    found = _calibrated(adapted, space, train, held_out, recipe, notes)
    save_hyperbolic(out, found.space, found.card, found.captions)
    errors = _measured(found, test, out, quadruples, domain)
    run.finish(**asdict(result), errors={name: error.rows[0].__dict__ for name, error in errors.items()})
    return found


def _calibrated(
    encoder: ClipEncoder,
    space: HyperbolicSpace,
    train: Quadruples,
    held_out: Quadruples,
    recipe: HysacRecipe,
    notes: Mapping[str, Any],
) -> HyperbolicClip:
    """Bounds of the training's groups, and limits set on what was held out."""
    curvature = float(space.curvature.detach())
    points = {name: _points(space, embed_all(encoder, part.rows)) for name, part in (("train", train), ("held_out", held_out))}
    distances = {
        part: {name: root_distance(group, curvature).double().cpu().numpy() for name, group in own.items()}
        for part, own in points.items()
    }
    own = distances["train"]
    if not train.has_images:  # a bound of images is never asked for
        own = {**own, "safe_image": own["safe_text"], "unsafe_image": own["unsafe_text"]}
    kept = train.rows[:CAPTIONS]
    return HyperbolicClip(
        encoder,
        space,
        HyperbolicCard(
            bounds=group_bounds(own, curvature, statistic=recipe.bounds.statistic),
            text=_limit(distances["held_out"], "text"),
            image=_limit(distances["held_out"], "image") if train.has_images else None,
            notes=dict(notes),
        ),
        UnsafeCaptions(points["train"]["unsafe_text"][: len(kept)].cpu(), tuple(row.category for row in kept)),
    )


@torch.no_grad()
def _points(space: HyperbolicSpace, features: QuadrupleEmbeddings) -> dict[str, Float[Tensor, "row dim"]]:
    groups = {"safe_text": features.safe_text, "unsafe_text": features.unsafe_text}
    images = {"safe_image": features.safe_image, "unsafe_image": features.unsafe_image}
    found = {name: space.points(group, "text") for name, group in groups.items()}
    return found | {name: space.points(group, "image") for name, group in images.items() if group is not None}


def _limit(distances: Mapping[str, Float[np.ndarray, " row"]], modality: str) -> DistanceLimit:
    values = np.concatenate([distances[f"safe_{modality}"], distances[f"unsafe_{modality}"]])
    harmful = np.repeat([False, True], len(values) // 2)
    slope, offset = platt(values, harmful, who=f"Harm in {modality}s")
    scores = DistanceLimit(slope, offset, 0.5).probability(values)
    return DistanceLimit(slope, offset, best_threshold(scores, harmful))


def _measured(
    found: HyperbolicClip, test: Quadruples, out: Path, quadruples: Quadruples, domain: Sequence[str]
) -> dict[str, DetectorError]:
    """Errors on ``test`` of prompts and, where there are images, of images, which the detector's card then has."""
    errors = {
        "prompts": prompt_error(found, [(row.safe, ()) for row in test.rows] + [(row.unsafe, (row.category,)) for row in test.rows])
    }
    if found.card.image is None:
        return errors
    if not test.has_images:
        raise UserError(
            f"{test.origin} must have images to test a detector of images on, got captions alone. Give other quadruples."
        )
    card = DetectorCard(
        detector_name(out),
        ("unsafe",),
        found.card.image.limit,
        found.weights_sha256,
        covers={"unsafe": quadruples.categories},
        domain=tuple(domain),
    )
    detector = HysacDetector.of(found, card)
    examples = [HarmExample(f"{row.id}/safe", (), row.image("safe")) for row in test.rows]
    examples += [HarmExample(f"{row.id}/unsafe", (row.category,), row.image("unsafe")) for row in test.rows]
    errors["images"] = measure_detector(detector, examples)
    measured = errors["images"].record(images=test.origin, sha256=test.fingerprint)
    record = DetectorRecord(
        kind="hysac",
        card=errors["images"].on(card),
        options={},
        measured=measured | {"prompts": errors["prompts"].record()["categories"]},
        made={
            "quadruples": quadruples.origin,
            "quadruples_sha256": quadruples.fingerprint,
            **found.card.notes,
            "versions": versions(),
        },
    )
    write_record(out, record)
    return errors
