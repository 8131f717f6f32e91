"""What each phase of a command needs, by configurations alone: peak of memory, disk, and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

from valign.interfaces import SamplingConfig
from valign.memory import MemoryConfig
from valign.merging import MergeMethod
from valign.models.diffusion.network_pool import Group
from valign.models.diffusion.pipeline import VAE_PIXELS
from valign.models.diffusion.sketch import Sketch
from valign.models.footprint import Unit
from valign.recipes.align import AlignConfig
from valign.recipes.chat_sketch import chat_training
from valign.training import PreferenceConfig
from valign.training.tasks.supervised.config import SupervisedConfig

SLACK = 1.15  # what allocators lose to gaps, and kernels take for themselves; by peaks that were measured on a CPU
PNG = 1.6  # bytes per pixel of a generated image's file
STATE = {"adamw": 8.0, "adamw-eight-bit": 2.0, "adafactor": 0.1}  # bytes of an optimizer's state per trained number
FLOAT32 = 4
KEPT = 3  # checkpoints at once: the latest two and the best


@dataclass(frozen=True)
class Phase:
    """One phase of a command."""

    name: str
    memory: float  # bytes at its peak, without the libraries
    flops: float
    disk: float = 0.0  # bytes that it writes
    reads: float = 0.0  # bytes of weights that its passes read; see `valign.models.footprint.Unit`


@dataclass(frozen=True, kw_only=True)
class DiffusionPhases:
    """Phases of commands on a diffusion model.

    Args:
        cuda: Whether the device is a card, where encoders wait in main memory while the denoiser trains.
    """

    sketch: Sketch
    memory: MemoryConfig
    cuda: bool
    processes: int = 1  # that share every step of a training

    def encoding(self, texts: int, images: int, batch: int, states: int) -> Iterator[Phase]:
        """All texts, then all images, into a cache. Args: states: Of each image: itself, and its mirror image."""
        unit, held = self.sketch.text, 2 if self.sketch.precision != "float32" else FLOAT32
        peak, reads = unit.peak(min(batch, texts)) + self._beside("text"), ceil(texts / batch) * unit.reads
        yield Phase("encode prompts", peak * SLACK, texts * unit.flops, texts * self.sketch.text_numbers() * held, reads)
        unit, rows, seen = self.sketch.encoded, self._slice(min(batch, images)), images * states
        latents = 2 * FLOAT32 * prod(self.sketch.shapes.latent_shape)  # mean and standard deviation
        peak, reads = unit.peak(rows) + self._beside("vae"), ceil(seen / rows) * unit.reads
        yield Phase("encode images", peak * SLACK, seen * unit.flops, seen * latents, reads)

    def sampling(self, name: str, images: int, sampling: SamplingConfig, branches: int = 2) -> Phase:
        """Images that are generated. Args: branches: Of the guidance: the denoiser's rows per image."""
        step, last, batch = self.sketch.denoised, self.sketch.decoded, min(sampling.batch_size, images)
        denoiser = step.peak(batch * branches) + self._beside("denoiser", together=True)
        decoder = last.peak(self._slice(batch)) + self._beside("vae", together=True)
        flops = images * (sampling.steps * branches * step.flops + last.flops)
        reads = ceil(images / batch) * sampling.steps * step.reads + ceil(images / self._slice(batch)) * last.reads
        disk = images * self.sketch.shapes.image_size**2 * PNG
        return Phase(name, max(denoiser, decoder) * SLACK, flops, disk, reads)

    def training(self, config: PreferenceConfig, experts: int = 1) -> Phase:
        """Experts on cached pairs, one after another."""
        micro = ceil(config.pairs_per_step / (self.processes * config.memory.micro_batches))
        unit, trained = self._trained(config.rank, config.targets, config.memory)
        peak = self._training_peak(unit, trained, micro if config.memory.split_pairs else 2 * micro, config.optimizer_name)
        passes, plain = (0 if config.precompute_ref_draws else 1) + bool(config.memory.split_pairs), self.sketch.denoised
        flops = 2 * (unit.flops + passes * plain.flops)  # of a pair
        reads = (1 + bool(config.memory.split_pairs)) * (unit.reads + passes * plain.reads)  # of a micro-batch
        if config.retain_weight:  # a retained prompt for every pair, with the base's own answer
            flops, reads = flops + unit.flops + plain.flops, reads + unit.reads + plain.reads
        steps = config.steps * experts
        parts = steps * config.memory.micro_batches
        written = experts * _written(trained, config.optimizer_name)
        return Phase("train", peak, steps * config.pairs_per_step * flops, written, parts * reads)

    def finetuning(
        self, config: SupervisedConfig, rank: int, targets: tuple[str, ...], optimizer: str, *, text_encoder: bool = False
    ) -> Phase:
        """A LoRA on images with captions; with ``text_encoder`` the text encoders have one, too."""
        unit, trained = self._trained(rank, targets, config.memory, text_encoder)
        rows = ceil(config.batch_size / config.memory.micro_batches)
        peak = self._training_peak(unit, trained, rows, optimizer, text_encoder)
        reads = config.steps * config.memory.micro_batches * unit.reads
        return Phase("train", peak, config.batch_size * config.steps * unit.flops, _written(trained, optimizer), reads)

    def align(self, config: AlignConfig, *, categories: int, prompts: int, candidates: int) -> Iterator[Phase]:
        """The whole chain.

        Args:
            categories: That have pairs.
            prompts: Of the test suite.
            candidates: For the strength, on each of which ``config.search`` images are generated; 0 for none.
        """
        pairs = categories * (config.data.pairs_per_category or 100)
        yield self.sampling("make image pairs", 2 * pairs, SamplingConfig.of(config.data))
        texts = 2 * pairs + len(config.data.retain) + 1
        yield from self.encoding(texts, 2 * pairs, config.data.batch_size, 2 if config.data.flip else 1)
        yield self.training(config.recipe(categories).training, categories if config.kind else 1)
        if config.kind and config.kind.calibrated:
            yield self.looking(config.kind, categories, config.calibration)
        if candidates:
            yield self.sampling("search the strength", (1 + candidates) * config.search, SamplingConfig.of(config))
        systems = 3 + len(config.sld)
        yield self.sampling("evaluate", systems * prompts, SamplingConfig.of(config), branches=3 if config.sld else 2)

    def looking(self, kind: type[MergeMethod], categories: int, per_category: int | None) -> Phase:
        """What a calibrated merge asks the denoiser, once for all strengths: states of unsafe prompts, and of benign captions.

        Args: per_category: Unsafe prompts of each expert; the merge's own number if None.
        """
        known: dict[str, Any] = {item.name: item.default for item in fields(kind)}
        unit = self.sketch.denoised
        rows, states = known.get("batch_size", 8), known.get("states", 1)
        seen = states * (categories * (per_category or known["per_category"]) + known.get("captions", 0))
        peak = unit.peak(rows) + self._beside("denoiser", together=True)
        return Phase("look at prompts for the merge", peak * SLACK, seen * unit.flops, reads=ceil(seen / rows) * unit.reads)

    def _beside(self, group: Group, *, together: bool = False) -> int:
        """Bytes of the networks that lie on the device while others work."""
        if self.memory.offload or (self.memory.phased and not together):
            return 0
        return self.sketch.bytes() - self.sketch.bytes(group)

    def _slice(self, images: int) -> int:
        """Images that the autoencoder works on at once."""
        return min(images, self.memory.vae_slice or max(1, VAE_PIXELS // self.sketch.shapes.image_size**2))

    def _trained(self, rank: int, targets: tuple[str, ...], memory: MemoryConfig, text_encoder: bool = False) -> tuple[Unit, int]:
        """Args: memory: The training's own, in which a preset may have set more than `self.memory`."""
        checkpointed = bool(memory.gradient_checkpointing)
        return self.sketch.trained(rank=rank, targets=targets, checkpointed=checkpointed, text_encoder=text_encoder)

    def _training_peak(self, unit: Unit, trained: int, rows: int, optimizer: str, text_encoder: bool = False) -> float:
        beside = 0 if self.cuda else self._beside("denoiser") - (self.sketch.bytes("text") if text_encoder else 0)
        return (unit.peak(rows) + beside) * SLACK + trained * (FLOAT32 + STATE.get(optimizer, STATE["adamw"]))


def _written(trained: int, optimizer: str) -> float:
    """Bytes of the checkpoints at once and of the result."""
    return trained * (KEPT * (FLOAT32 + STATE.get(optimizer, STATE["adamw"])) + FLOAT32)


def chat_finetuning(
    folder: Path,
    config: SupervisedConfig,
    *,
    tokens: int,
    rank: int | None,
    targets: tuple[str, ...] = (),
    four_bit: bool = False,
) -> Phase:
    """Fine-tuning of a chat model by its config.json; ``rank`` None trains every weight. Chats are as long as they may be."""
    precision = "bfloat16" if config.memory.precision == "bfloat16" and rank is not None else "float32"
    checkpointed = bool(config.memory.gradient_checkpointing)
    unit, trained = _chat_training(folder, precision, tokens, rank, targets, checkpointed, four_bit)
    optimizer = "adamw-eight-bit" if config.memory.eight_bit else "adamw"
    rows = ceil(config.batch_size / config.memory.micro_batches)
    peak = unit.peak(rows) * SLACK + trained * (FLOAT32 + STATE[optimizer])
    reads = config.steps * config.memory.micro_batches * unit.reads
    return Phase("train", peak, config.batch_size * config.steps * unit.flops, _written(trained, optimizer), reads)


@cache
def _chat_training(
    folder: Path, precision: str, tokens: int, rank: int | None, targets: tuple[str, ...], checkpointed: bool, four_bit: bool
) -> tuple[Unit, int]:
    return chat_training(
        folder, precision=precision, tokens=tokens, rank=rank, targets=targets, checkpointed=checkpointed, four_bit=four_bit
    )
