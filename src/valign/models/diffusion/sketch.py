"""A diffusion model by its configurations alone: what each of its computations would need, without its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from valign.checks import UserError
from valign.files import read_json
from valign.models.devices import DTYPES
from valign.models.diffusion.base import Conditioning
from valign.models.diffusion.loading import empty_network, read_family
from valign.models.diffusion.lora import ATTENTION, TEXT_ATTENTION, add_lora
from valign.models.diffusion.network_pool import Group, NetworkPool
from valign.models.diffusion.pipeline import PipelineModel
from valign.models.footprint import Unit, materialize, recompute, simulation, weights_read

GROUPS: tuple[Group, ...] = ("text", "vae", "denoiser")


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The networks of a pipeline's folder, of which only configurations are read; every computation is simulated once.

    Args:
        precision: Of the text encoders and the denoiser: ``"float32"`` or ``"bfloat16"``, which stands for float16, too.
        vae_precision: The same of the autoencoder.
    """

    folder: Path
    precision: str
    vae_precision: str = "float32"

    def __post_init__(self) -> None:
        family = read_family(self.folder)
        for part in (*family.networks, "scheduler"):
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            if not (self.folder / part / name).is_file():
                raise UserError(
                    f"{self.folder / part} must have a {name} to be estimated by, got none. Give a pipeline's folder with its "
                    "configurations (the weights may be missing), or sd15, sd21 or sdxl."
                )

    @cached_property
    def shapes(self) -> PipelineModel:
        """The model on the meta device."""
        return self._model()

    @property
    def family(self) -> str:
        return self.shapes.family

    def bytes(self, *groups: Group) -> int:
        """Of the weights of these groups of networks; of all if none is named."""
        names = [name for group, known in self.shapes.groups().items() if group in (groups or GROUPS) for name in known]
        return sum(p.numel() * p.itemsize for name in names for p in getattr(self.shapes.pipe, name).parameters())

    def text_numbers(self) -> int:
        """Numbers that the encoded text of one prompt has."""
        with torch.device("meta"):
            known = vars(_texts(self.shapes, 1)).values()
        return sum(tensor.numel() for tensor in known if tensor is not None)

    @cached_property
    def text(self) -> Unit:
        """A prompt of full length."""
        return self._unit("text", _read_text)

    @cached_property
    def encoded(self) -> Unit:
        """An image to latents."""
        side = self.shapes.image_size
        return self._unit("vae", lambda model: model.encode_images(torch.zeros(1, 3, side, side)), passes=0.5)

    @cached_property
    def decoded(self) -> Unit:
        """Latents to an image."""

        def work(model: PipelineModel) -> None:
            with torch.no_grad():
                model.decode_latents(torch.zeros(1, *model.latent_shape))

        return self._unit("vae", work, passes=0.5)  # the half of it that decodes

    @cached_property
    def denoised(self) -> Unit:
        """A pass of the denoiser without gradients."""

        def work(model: PipelineModel) -> None:
            with torch.no_grad():
                model.predict(*_noisy(model))

        return self._unit("denoiser", work)

    def trained(
        self, *, rank: int, targets: Sequence[str] = ATTENTION, checkpointed: bool, text_encoder: bool = False
    ) -> tuple[Unit, int]:
        """A pass of the denoiser with gradients of a LoRA, whose factors count among the weights; and how many numbers they are.

        Args: text_encoder: The text encoders have a LoRA, too, and read their text with gradients.
        """
        key = (rank, tuple(targets), checkpointed, text_encoder)
        if key not in self._known:
            self._known[key] = self._trained(rank, targets, checkpointed, text_encoder)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[Any, tuple[Unit, int]]:
        return {}

    def _trained(self, rank: int, targets: Sequence[str], checkpointed: bool, text_encoder: bool) -> tuple[Unit, int]:
        model = self._model()
        network = model.pipe.unet
        if checkpointed:
            network.enable_gradient_checkpointing(recompute)
        add_lora(network, rank=rank, targets=targets)
        encoders = model.text_encoders if text_encoder else []
        for encoder in encoders:
            add_lora(encoder, rank=rank, targets=TEXT_ATTENTION)
        count = sum(p.numel() for one in (network, *encoders) for p in one.parameters() if p.requires_grad)

        def work(model: PipelineModel) -> None:
            noisy, steps, texts = _noisy(model)
            if text_encoder:
                texts = replace(texts, embeds=torch.cat(_read_text(model), dim=-1).to(model.dtype))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
                answer = model.predict(noisy, steps, texts)
            (answer.float() - noisy).square().mean((1, 2, 3)).sum().backward()

        passes = 3 if checkpointed else 2  # forward, backward, and forward again
        unit = self._unit("denoiser", work, model, *(("text",) if text_encoder else ()), passes=passes)
        gradients = 4 * count  # live at the peak, however many rows there are
        return replace(unit, activations=unit.activations - gradients), count

    def _unit(
        self,
        group: Group,
        work: Callable[[PipelineModel], Any],
        model: PipelineModel | None = None,
        *more: Group,
        passes: float = 1.0,
    ) -> Unit:
        model = model or self._model()
        networks = [getattr(model.pipe, name) for one in (group, *more) for name in model.groups()[one]]
        with simulation() as meter:
            for network in networks:
                materialize(network)
            weights = meter.now
            found = meter.measure(lambda: work(model))
        return Unit(weights, found.peak - weights, found.flops, weights_read(networks, passes))

    def _model(self) -> PipelineModel:
        family = read_family(self.folder)
        kinds = {part: DTYPES[self.vae_precision if part == "vae" else self.precision] for part in family.networks}
        networks = {part: empty_network(self.folder, part, kinds[part]) for part in family.networks}
        depth = len(networks["vae"].config.block_out_channels) - 1
        pipe = SimpleNamespace(
            **networks,
            scheduler=SimpleNamespace(config=read_json(self.folder / "scheduler" / "scheduler_config.json")),
            config=SimpleNamespace(**read_json(self.folder / "model_index.json")),
            vae_scale_factor=2**depth,
            **{name.replace("text_encoder", "tokenizer"): None for name in family.groups()["text"]},
        )
        pool = NetworkPool(pipe, torch.device("cpu"), family.groups(), mode="phased")
        pool.present, pool.shared = set(GROUPS), 1  # nothing is read: what is asked for is there by its shape
        return family(pipe, str(self.folder), pool)


def _texts(model: PipelineModel, rows: int) -> Conditioning:
    """Encoded texts of the model's shapes."""
    embeds = torch.zeros(rows, _tokens(model), model.text_width, dtype=model.dtype)
    if len(model.groups()["text"]) == 1:
        return Conditioning(embeds)
    pooled = torch.zeros(rows, model.pipe.text_encoder_2.config.projection_dim, dtype=model.dtype)
    return Conditioning(embeds, pooled, torch.zeros(rows, 6, dtype=model.dtype))


def _noisy(model: PipelineModel) -> tuple[Tensor, Tensor, Conditioning]:
    """The denoiser's input for one image."""
    return torch.zeros(1, *model.latent_shape), torch.zeros(1, dtype=torch.long), _texts(model, 1)


def _read_text(model: PipelineModel) -> list[Tensor]:
    """Hidden states of each text encoder on one text of full length; with gradients where it trains."""
    ids = torch.zeros(1, _tokens(model), dtype=torch.long)
    trained = any(p.requires_grad for encoder in model.text_encoders for p in encoder.parameters())
    with torch.set_grad_enabled(trained):
        return [encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in model.text_encoders]


def _tokens(model: PipelineModel) -> int:
    return int(model.pipe.text_encoder.config.max_position_embeddings)
