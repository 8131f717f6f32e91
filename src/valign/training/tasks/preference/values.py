"""Train LiVO's value encoder beside a frozen model (arXiv 2410.12700), in the loop that trains everything on pairs.

Policy: the model with the value token before the prompt. Reference: the same without it. Only the encoder has gradients.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle
from valign.checks import UserError
from valign.data.images.latents import PairLatents
from valign.data.images.value_sets import ValueCache
from valign.interfaces import PairCache, Sampler
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.models.diffusion.lora import adapter_names
from valign.models.diffusion.value_encoder import ValueConditioning, ValueEncoder, ValueText, copy_encoder, save_value_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
from valign.objectives import PairObjective
from valign.randomness import generator_for
from valign.training.engine.draws import PairDraw
from valign.training.tasks.preference.batches import PairBatch, PairSource
from valign.training.tasks.preference.config import PreferenceConfig
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.train import TrainResult, run_training
from valign.training.tasks.preference.trainable import Fixed


class ValueSource(PairSource):
    """An aligned image is a pair with a violating one of its scene, another at every visit; both share noise, timestep, flip.

    Under ``safe_caption`` the batch has no token: the drift that validation measures there is 0, always.
    """

    def __init__(
        self, model: DiffusionModel, cache: ValueCache, rows: Int[Tensor, " row"], config: PreferenceConfig, encoder: ValueEncoder
    ) -> None:
        self.model, self.values, self.rows, self.config, self.encoder = model, cache, rows, config, encoder
        self.cache = cache  # type: ignore[assignment]  # the base class asks it for ids and the shape of latents
        self.dtype = model.dtype
        self._partners: list[int] = []
        ids = {(name, prompt) for name, prompt in zip(cache.principle_of, cache.prompts, strict=True)}
        self.ids = {key: encoder.tokenize(encoder.principle(key[0]), [key[1]])[0] for key in sorted(ids)}

    def visit(self, visits: Any, *, safe_caption: bool = False) -> PairBatch:
        fixed = self.config.precompute_ref_draws
        self._partners = [self._partner(pair, visit % fixed if fixed else visit) for pair, visit in visits]
        return super().visit(visits, safe_caption=safe_caption)

    def validation(self, places: Any, draws: int, *, safe_caption: bool = False) -> PairBatch:
        self._partners = [self._partner(pair, -1) for pair, _ in places]
        return super().validation(places, draws, safe_caption=safe_caption)

    def _partner(self, pair: int, visit: int) -> int:
        """Row of the violating image; -1 stands for validation, whose pairs never change."""
        rows = self.values.opposed(int(self.rows[pair]))
        generator = generator_for("value partner", self.config.seed, self._id(pair), visit)
        return rows[int(torch.randint(len(rows), (1,), generator=generator))]

    def _build(self, pairs: list[int], draws: list[PairDraw], safe_caption: bool) -> PairBatch:
        rows, partners = self.rows[torch.tensor(pairs)], torch.tensor(self._partners)
        flip = torch.tensor([draw.flip for draw in draws])
        (winner_mean, winner_std), (loser_mean, loser_std) = (self.values.batch(chosen, flip) for chosen in (rows, partners))
        text = Conditioning(**self.values.conditioning(rows)).to(self.model.device, self.dtype)
        if not safe_caption:
            keys = [(self.values.principle_of[row], self.values.prompts[row]) for row in rows.tolist()]
            text = ValueConditioning(text, torch.stack([self.ids[key] for key in keys]), self.encoder)
        latents = PairLatents(winner_mean=winner_mean, winner_std=winner_std, loser_mean=loser_mean, loser_std=loser_std)
        return self._noised(pairs, draws, latents, text)


@dataclass(frozen=True)
class ValuePreviews:
    """Generates from training prompts with their principles' token; inside ``encoder.off()`` without."""

    pipeline: ValueGuidedPipeline
    principles: Mapping[str, str]  # prompt -> principle

    def generate(self, prompts: Sequence[str], **options: Any) -> list[Image]:
        return self.pipeline.generate(prompts, principles=[self.principles.get(p) for p in prompts], **options)

    def fingerprint(self) -> str:
        return self.pipeline.model.fingerprint()


@dataclass
class ValueTokens:
    """The value encoder as what the loop trains; the model itself stays as it is."""

    model: DiffusionModel
    encoder: ValueEncoder
    principles: Mapping[str, str] = field(default_factory=dict)  # of the preview's prompts

    @property
    def sampler(self) -> Sampler:
        return ValuePreviews(ValueGuidedPipeline(self.model, self.encoder), self.principles)

    def attach(self) -> None:
        if adapter_names(self.model):
            raise UserError(
                "The model to train values for must be bare, got one with an adapter loaded. Call unload_adapters first."
            )
        self.encoder.active = True
        self.encoder.to(self.model.device)

    def start(self, step: PairStep | None, source: PairSource | None) -> None:
        """Nothing: the copy starts as the base's own encoder."""

    def detach(self) -> None:
        self.encoder.requires_grad_(False)

    def off(self, model: Any) -> AbstractContextManager[Any]:
        return self.encoder.off()

    def rules(self) -> AdapterHandle:
        return Fixed(self.encoder, self.parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.encoder.trained()

    def state(self) -> Mapping[str, Tensor]:
        return self.parameters()

    def source(self, cache: PairCache, rows: Tensor, config: PreferenceConfig) -> PairSource:
        assert isinstance(cache, ValueCache)  # what `train_values` takes
        return ValueSource(self.model, cache, rows, config, self.encoder)

    def result(self, out: Path) -> Path:
        return out / "values"

    def save(self, out: Path, metadata: Mapping[str, Any]) -> None:
        save_value_encoder(self.result(out), self.encoder, metadata=metadata)


def train_values(
    model: DiffusionModel,
    cache: ValueCache,
    out: Path,
    config: PreferenceConfig,
    objective: PairObjective,
    *,
    layout: str = "reference",
    lora_rank: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    label: str = "train values",
) -> TrainResult:
    """Train a value encoder on ``cache``; write ``out/values``, ``metrics.jsonl``, ``checkpoints`` and ``samples``.

    A finished run is returned as it is, an interrupted one goes on from its last checkpoint, with the same bytes on a CPU.
    LoRA settings of ``config`` are the U-Net's and have no meaning here.

    Args:
        layout: How images will be generated, see `copy_encoder`; training always pads to 77 tokens.
        lora_rank: Train factors of this rank instead of the whole copy.
    Raises: UserError for what `train_preference` refuses, for caption dropout (a value text needs its prompt) and for retention.
    """
    if config.empty_prompt_prob or config.safe_prompt_term or config.retain_weight:
        raise UserError(
            "train_values needs empty_prompt_prob 0, retain_weight 0 and safe_prompt_term off: a value text belongs to its prompt."
        )
    encoder = copy_encoder(
        model, list(map(ValueText.read, cache.principles)), layout=layout, lora_rank=lora_rank, seed=config.init_seed
    )
    trainable = ValueTokens(model, encoder, dict(zip(cache.prompts, cache.principle_of, strict=True)))
    parameters = sum(p.numel() for p in encoder.trained().values())
    made = {"layout": layout, "lora_rank": lora_rank, "parameters": parameters, **(metadata or {})}
    return run_training(trainable, cache, cache.rows(), out, config, objective, metadata=made, label=label)
