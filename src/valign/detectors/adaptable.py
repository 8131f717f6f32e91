"""Detectors whose eyes can be adapted while their judgement stays: the encoder trains, the head is frozen.

A tower makes feature maps of images; the detector's own head makes logits of them, one row per decision.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from PIL.Image import Image
from torch import Tensor, nn
from torch.func import functional_call

from valign.checks import UserError
from valign.detectors.clip_probe import ClipProbeDetector, probe_logit, save_probe
from valign.detectors.hysac import HysacDetector
from valign.detectors.oracle import OracleDetector, save_oracle
from valign.interfaces import Detector
from valign.models.encoders.clip import ClipEncoder
from valign.models.encoders.hyperbolic_clip import save_hyperbolic
from valign.models.files.peft_folder import save_lora
from valign.models.hyperbolic.lorentz import root_distance

RANK = 8
VISION = r".*vision_model\..*\.(k_proj|v_proj|out_proj|fc1|fc2)"  # of the image tower alone


class Tower(ABC):
    """What is adapted of a detector. ``network`` maps pixels to feature maps; its trainable parameters are what trains."""

    network: nn.Module
    channels: int
    grid: int  # cells on a side that a contrast pools its maps into
    learning_rate: float

    @abstractmethod
    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "image 3 height width"]:
        """Images as the network takes them."""

    @abstractmethod
    def logits(self, maps: Float[Tensor, "image channel row column"]) -> Float[Tensor, "decision option"]:
        """The frozen head's logits, as many decisions for each image, image by image."""

    @abstractmethod
    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Write what the adapted detector's folder needs beside `detector.json`; its kind and its options."""

    def maps(self, pixels: Tensor, weights: Mapping[str, Tensor] | None = None) -> Float[Tensor, "image channel row column"]:
        """Feature maps, with other weights where they are given."""
        return self.network(pixels) if weights is None else functional_call(self.network, dict(weights), (pixels,))  # type: ignore[no-any-return]

    def trained(self) -> dict[str, Tensor]:
        """Parameters that train, by name."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}


class OracleTower(Tower):
    """The oracle's convolutions; every place is a decision between its glyphs and "empty". All their weights train."""

    grid, learning_rate = 4, 3e-4

    def __init__(self, detector: OracleDetector) -> None:
        self.detector = detector
        detector.net.requires_grad_(False).eval()
        self.network = detector.net.body
        self.channels = detector.config.width
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "image 3 height width"]:
        return self.detector.pixels(images)

    def logits(self, maps: Float[Tensor, "image channel row column"]) -> Float[Tensor, "decision option"]:
        return self.detector.net.read_places(maps)[1].flatten(0, 1)

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        save_oracle(folder, self.detector.net, replace(self.detector.config, measured={}))
        return "world-oracle", {}


class ClipTower(Tower):
    """The image side of a CLIP under a LoRA: one feature per image, no map."""

    grid, learning_rate = 1, 1e-3

    def __init__(self, encoder: ClipEncoder, *, seed: int = 0) -> None:
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=VISION)
            self.lora: PeftModel = get_peft_model(encoder.model, lora)  # type: ignore[arg-type, assignment]
        self.lora.eval()
        self.network = _ImageFeatures(encoder.model)
        self.channels = encoder.dim

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "image 3 height width"]:
        return self.encoder.prepare(images)

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """The LoRA, behind copies of those that the encoder has already."""
        names = [f"adapter-{number}" for number in range(1, len(self.encoder.adapters) + 2)]
        for earlier, name in zip(self.encoder.adapters, names):
            shutil.copytree(earlier, folder / name)
        save_lora(self.lora, folder / names[-1])
        return "", {"encoder": str(self.encoder.folder.resolve()), "adapters": names}

    def adapted(self, folder: Path, options: Mapping[str, Any]) -> ClipEncoder:
        """The encoder that `save` described."""
        return ClipEncoder(
            self.encoder.folder, device=str(self.encoder.device), adapters=[folder / name for name in options["adapters"]]
        )


class _ImageFeatures(nn.Module):
    """A CLIP's projected image features as maps of one place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output[:, :, None, None]  # type: ignore[operator, no-any-return]


class ProbeTower(ClipTower):
    """A CLIP probe's encoder: a decision for each of its classes."""

    def __init__(self, detector: ClipProbeDetector, *, seed: int = 0) -> None:
        if not isinstance(detector.encoder, ClipEncoder):
            raise UserError(
                f"{detector.card.name} must read a transformers CLIP to be adapted, got {type(detector.encoder).__name__}."
            )
        self.detector = detector
        super().__init__(detector.encoder, seed=seed)

    def logits(self, maps: Float[Tensor, "image channel row column"]) -> Float[Tensor, "decision option"]:
        slope, offset = self.detector.calibration.to(maps).T
        harm = slope * probe_logit(maps[:, :, 0, 0], self.detector.vectors.to(maps)) + offset
        return _binary(harm.flatten(), self.detector.card.threshold)

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        _, options = super().save(folder)
        found, card = self.detector, self.detector.card
        encoder = self.adapted(folder, options)
        covers = {one: list(ids) for one, ids in card.coverage.items()}
        save_probe(
            folder / "probe.safetensors",
            found.vectors,
            card.classes,
            encoder.weights_sha256,
            covers=covers,
            calibration=found.calibration,
        )
        return "clip-probe", options


class HyperbolicTower(ClipTower):
    """A hyperbolic CLIP's encoder: one decision, by the distance to the root."""

    def __init__(self, detector: HysacDetector, *, seed: int = 0) -> None:
        self.clip = detector.clip
        super().__init__(detector.clip.encoder, seed=seed)

    def logits(self, maps: Float[Tensor, "image channel row column"]) -> Float[Tensor, "decision option"]:
        limit = self.clip.card.image
        assert limit is not None  # a detector has one
        points = self.clip.space.points(maps[:, :, 0, 0], "image")
        return _binary(limit.slope * root_distance(points, self.clip.curvature) + limit.offset, limit.limit)

    def save(self, folder: Path) -> tuple[str, dict[str, Any]]:
        _, options = super().save(folder)
        notes = dict(self.clip.card.notes) | options | {"encoder_sha256": self.adapted(folder, options).weights_sha256}
        save_hyperbolic(folder, self.clip.space, replace(self.clip.card, notes=notes), self.clip.captions)
        return "hysac", {}


TOWERS = {OracleDetector: OracleTower, ClipProbeDetector: ProbeTower, HysacDetector: HyperbolicTower}


def tower_of(detector: Detector) -> Tower:
    """What can be adapted of ``detector``. Raises: UserError for one that has nothing of the kind."""
    kind = TOWERS.get(type(detector))
    if kind is None:
        raise UserError(
            f"{detector.card.name} cannot be adapted: it must be a world's oracle, a CLIP probe (`valign detector fit`) or a HySAC "
            "(`valign train hysac`)."
        )
    return kind(detector)  # type: ignore[abstract, arg-type]


def _binary(harm: Float[Tensor, " decision"], threshold: float) -> Float[Tensor, "decision 2"]:
    """Logits of harmless and harmful, equal where the detector's score is its threshold."""
    limit = min(max(threshold, 1e-6), 1 - 1e-6)
    return torch.stack([torch.zeros_like(harm), harm - log(limit / (1 - limit))], dim=1)
