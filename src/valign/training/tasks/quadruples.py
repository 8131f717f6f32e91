"""A LoRA on both encoders of a CLIP, trained on quadruples: HySAC's hyperbolic space, or Safe-CLIP's redirection."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from valign.checks import check_options, option
from valign.data.images.quadruples import Quadruple, Quadruples
from valign.models.encoders.clip import ClipEncoder
from valign.models.files.peft_folder import save_lora
from valign.models.hyperbolic.space import HyperbolicSpace
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings
from valign.objectives.hyperbolic.safe_redirection import SafeRedirection
from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment
from valign.training.engine.draws import Visits, drawing
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.selection import Selection
from valign.training.engine.task import LoopConfig, TrainingTask, Validation

TARGETS = ("k_proj", "v_proj", "out_proj", "fc1", "fc2", "patch_embedding")  # the authors'; neither queries nor the projections
BETAS = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class QuadrupleConfig:
    """How a CLIP is trained on quadruples. The defaults are HySAC's, for ViT-L/14; see `miniature`."""

    steps: int = option(5000, help="optimizer steps at most", low=1)
    batch_size: int = option(32, help="quadruples per step", low=1)
    learning_rate: float = option(1e-4, help="learning rate, AdamW", above=0)
    weight_decay: float = option(0.2, help="of the LoRA; the scalars have none", low=0, rare=True)
    decay: Literal["none", "linear", "cosine"] = option("none", help="of the learning rate", rare=True)
    rank: int = option(16, help="rank of the LoRA", low=1)
    alpha: float = option(1.0, help="scale of the LoRA times its rank", above=0)
    dropout: float = option(0.1, help="of the LoRA's input", low=0, high=1, rare=True)
    curvature: float = option(1.0, help="c at the start, the space's curvature is -c", above=0, rare=True)
    balance: bool = option(False, help="start captions and images at one mean distance from the root", rare=True)
    learn_scale: bool = option(True, help="learn the sharpness of distances", rare=True)
    held_out: float = option(0.2, help="share of the quadruples for validation and thresholds", above=0, high=0.5)
    validate_every: int = option(100, help="steps between validations; the best validated step is kept", low=1)
    patience: int = option(5, help="validations without an improvement before the training stops", low=1)
    checkpoint_every: int = option(100, help="steps between checkpoints; 0 is off: a killed run starts again", low=0)
    seed: int = option(0, help="of the split, the order, dropout and the LoRA", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def miniature(cls) -> "QuadrupleConfig":
        """For CLIPs of a few hundred thousand numbers, found by trial on the shapes world: a LoRA of full scale, a high rate."""
        return cls(
            steps=250,
            batch_size=16,
            learning_rate=3e-3,
            weight_decay=0.01,
            decay="cosine",
            alpha=16.0,
            dropout=0.0,
            balance=True,
            validate_every=50,
        )

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint_every"}


@runtime_checkable
class QuadrupleTuning(Protocol):
    """What one kind of training makes of the four groups' projected features. The entry "loss" is what falls."""

    def losses(self, features: QuadrupleEmbeddings, places: Sequence[int], part: str) -> dict[str, Tensor]: ...
    def scalars(self) -> Mapping[str, nn.Parameter]: ...  # what trains beside the LoRA


@dataclass(frozen=True)
class HyperbolicTuning:
    """HySAC: features become points, and the objective orders them."""

    space: HyperbolicSpace
    objective: SafetyEntailment

    def losses(self, features: QuadrupleEmbeddings, places: Sequence[int], part: str) -> dict[str, Tensor]:
        space = self.space
        space.clamp()
        text, image = features.safe_text, features.safe_image
        images: tuple[Tensor | None, Tensor | None] = (None, None)
        if image is not None and features.unsafe_image is not None:
            images = (space.points(image, "image"), space.points(features.unsafe_image, "image"))
        points = QuadrupleEmbeddings(space.points(text, "text"), space.points(features.unsafe_text, "text"), *images)
        terms = self.objective.terms(points, space.scale, space.curvature)
        return {"loss": self.objective.total(terms), **terms}

    def scalars(self) -> Mapping[str, nn.Parameter]:
        return {f"space.{name}": parameter for name, parameter in self.space.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class RedirectionTuning:
    """Safe-CLIP: features are compared with those of the encoders before training, by part ("train" or "held_out")."""

    frozen: Mapping[str, QuadrupleEmbeddings]
    objective: SafeRedirection
    scale: float  # CLIP's own, exp(logit_scale)

    def losses(self, features: QuadrupleEmbeddings, places: Sequence[int], part: str) -> dict[str, Tensor]:
        whole = self.frozen[part]
        own = [
            group if group is None else group[list(places)]
            for group in (whole.safe_text, whole.unsafe_text, whole.safe_image, whole.unsafe_image)
        ]
        terms = self.objective.terms(features, QuadrupleEmbeddings(*own), self.scale)  # type: ignore[arg-type]
        return {"loss": self.objective.total(terms), **terms}

    def scalars(self) -> Mapping[str, nn.Parameter]:
        return {}


class QuadrupleTask(TrainingTask):
    """Train a LoRA on ``encoder.model`` and the tuning's scalars; the model comes back wrapped by peft as ``network``."""

    def __init__(
        self, encoder: ClipEncoder, train: Quadruples, held_out: Quadruples, tuning: QuadrupleTuning, config: QuadrupleConfig
    ) -> None:
        self.encoder, self.train, self.held_out, self.tuning, self.config = encoder, train, held_out, tuning, config
        with drawing("lora", config.seed):
            lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(TARGETS))  # type: ignore[arg-type]
            self.network: PeftModel = get_peft_model(encoder.model, lora)  # type: ignore[arg-type, assignment]
        self.visits = Visits(len(train.rows), min(config.batch_size, len(train.rows)), config.seed)
        factors = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        groups = [
            {"params": factors, "weight_decay": config.weight_decay},
            {"params": list(tuning.scalars().values()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=BETAS)
        keep_peaks(self.optimizer)
        self.schedule = Schedule(steps=config.steps, decay=config.decay, floor=0.02)
        self.selection = Selection(max_drift=0.0, patience=config.patience)
        self.loop = LoopConfig(
            steps=config.steps,
            label="train on quadruples",
            checkpoint_every=config.checkpoint_every,
            validate_every=config.validate_every,
            recipe=config.recipe(),
        )

    def gradients(self, step: int) -> dict[str, float]:
        places = [place for place, _ in self.visits.at(step)]
        self.network.train()
        with drawing("dropout", self.config.seed, step):
            losses = self.tuning.losses(embed(self.encoder, [self.train.rows[place] for place in places]), places, "train")
        losses["loss"].backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    @torch.no_grad()
    def validate(self, number: int) -> Validation:
        self.network.eval()
        rows, size, total = self.held_out.rows, self.config.batch_size, 0.0
        for first in range(0, len(rows), size):
            places = range(first, min(first + size, len(rows)))
            losses = self.tuning.losses(embed(self.encoder, [rows[place] for place in places]), places, "held_out")
            total += float(losses["loss"]) * len(places) / len(rows)
        return Validation(total, {"val_loss": total})

    def tensors(self) -> dict[str, Tensor]:
        factors = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        return {**factors, **self.tuning.scalars()}

    def notes(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        return {"selection": progress["selection"], "stopped": progress["stopped"]}


def embed(encoder: ClipEncoder, rows: Sequence[Quadruple]) -> QuadrupleEmbeddings:
    """Projected features of the four groups by ``encoder.model``, with gradients where they are on."""
    model = encoder.model
    captions = [*(row.safe for row in rows), *(row.unsafe for row in rows)]
    texts = model.get_text_features(encoder.tokens(captions, short=True)).pooler_output
    if rows[0].safe_image is None:
        return QuadrupleEmbeddings(*texts.chunk(2))
    shown = [row.image("safe") for row in rows] + [row.image("unsafe") for row in rows]
    images = model.get_image_features(encoder.prepare(shown)).pooler_output
    return QuadrupleEmbeddings(*texts.chunk(2), *images.chunk(2))


@torch.no_grad()
def embed_all(encoder: ClipEncoder, rows: Sequence[Quadruple], *, batch_size: int = 64) -> QuadrupleEmbeddings:
    """The same for many rows, without gradients."""
    parts = [embed(encoder, rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    return QuadrupleEmbeddings(*_joined(parts))


def _joined(parts: Sequence[QuadrupleEmbeddings]) -> Iterator[Any]:
    for name in ("safe_text", "unsafe_text", "safe_image", "unsafe_image"):
        groups = [getattr(part, name) for part in parts]
        yield None if groups[0] is None else torch.cat(groups)


@dataclass(frozen=True)
class QuadrupleResult:
    """What a training came to."""

    best_step: int
    steps: int  # that were taken
    stopped: str  # "" or "patience"
    val_loss: float


def train_on_quadruples(
    encoder: ClipEncoder,
    train: Quadruples,
    held_out: Quadruples,
    tuning: QuadrupleTuning,
    config: QuadrupleConfig,
    out: Path,
    adapter: Path,
) -> QuadrupleResult:
    """Train, put the best step back, write its LoRA to ``adapter``; ``encoder.model`` comes back with the LoRA merged.

    Args: out: Of the checkpoints and ``metrics.jsonl``; a killed training goes on from there.
    """
    task = QuadrupleTask(encoder, train, held_out, tuning, config)
    loop = TrainingLoop(task, start_processes(cpu=encoder.device.type == "cpu"), out=out)
    stopped = loop.run()
    best = loop.keep_best()
    task.network.eval()
    save_lora(task.network, adapter)
    encoder.model = task.network.merge_and_unload().requires_grad_(False).eval()  # type: ignore[operator]
    return QuadrupleResult(best, loop.done, stopped, task.selection.best_score if task.selection else float("nan"))


def redirection(encoder: ClipEncoder, train: Quadruples, held_out: Quadruples, objective: SafeRedirection) -> RedirectionTuning:
    """Safe-CLIP's tuning of this encoder, which must be as it was before training."""
    frozen = {"train": embed_all(encoder, train.rows), "held_out": embed_all(encoder, held_out.rows)}
    scale = float(encoder.model.logit_scale.detach().exp())
    return RedirectionTuning(frozen, objective, scale)
