"""LoRA adapters on disk: written in the diffusers layout, read module by module from diffusers and peft folders.

A folder made here loads with ``pipe.load_lora_weights(folder)``. Scales are folded into ``up`` and ``alpha == rank`` in every
module, so a reader that ignores alphas gets the same function. ``valign.json`` beside the weights says where they came from.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.files import write_json, write_text
from valign.models.files.adapter_index import (
    DIFFUSERS_HEADER,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PROVENANCE,
    WEIGHTS,
    AdapterIndex,
    index_adapter,
)
from valign.models.files.finite import check_finite
from valign.models.files.layouts import PREFIXES, TEXT_PREFIXES, ModuleEntry, prefix_of, split_name
from valign.models.files.model_card import CARD, adapter_card
from valign.models.files.tensor_stream import TensorIndex, stream_tensors

PEFT_PREFIX = "base_model.model."
HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")  # of the hub's cache


@dataclass(frozen=True)
class LoraFactors:
    """One module's change of weight, ``scale * up @ down``; that of a convolution is laid flat, as its ``down`` is."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]
    scale: float
    kernel: tuple[int, int] | None = None  # of a convolution, whose fan_in is channels times kernel

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise ValueError(
                f"LoraFactors must be down [rank, fan_in] and up [fan_out, rank], got {tuple(self.down.shape)} and "
                f"{tuple(self.up.shape)}."
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(fan_out, fan_in)``, the shape of the weight that is changed."""
        return self.up.shape[0], self.down.shape[1]

    def folded(self, weight: float = 1.0) -> "LoraFactors":
        """The same change times ``weight``, in float32, with scale 1: every multiplier sits in ``up``."""
        scale = self.scale * weight
        return LoraFactors(self.down.float(), self.up.float() if scale == 1 else self.up.float() * scale, 1.0, self.kernel)

    def as_saved(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``down`` and ``up`` as files have them, the scale left out: those of a convolution are convolutions."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        return (down, up) if self.kernel is None else (down.reshape(self.rank, -1, *self.kernel), up[:, :, None, None])

    def delta(self) -> Float[Tensor, "fan_out fan_in"]:
        """The dense change of weight, float32 at least."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.scale * (self.up.to(wide) @ self.down.to(wide))


@dataclass(frozen=True)
class AdapterFile:
    """An opened adapter: the index is in memory, the factors stay on disk until asked for."""

    index: AdapterIndex
    tensors: TensorIndex

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def entries(self) -> Mapping[str, ModuleEntry]:
        """By module."""
        return self.index.entries

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The adapter's record."""
        return self.index.metadata

    @property
    def prefix(self) -> str:
        """Of the denoiser's keys in a diffusers file: this file's own, or Stable Diffusion's where it has none (peft)."""
        return prefix_of(self.tensors.places) or PREFIXES[0]

    @property
    def modules(self) -> list[str]:
        """Adapted modules without the file's prefix, sorted."""
        return sorted(self.entries)

    def factors(self, module: str) -> LoraFactors:
        """One module's factors, in the file's dtype; those of convolutions laid flat.

        Raises: UserError if there is no such module, or it is not finite: such an adapter draws black images, which look harmless.
        """
        if module not in self.entries:
            raise UserError(f"{self.folder} must adapt {module}, got {len(self.entries)} others. Compare the targets.")
        entry = self.entries[module]
        down, up = self.tensors.read(entry.down), self.tensors.read(entry.up)
        check_finite(self.tensors.path, {entry.down: down, entry.up: up})
        return LoraFactors(down.flatten(1), up.flatten(1), entry.scale, entry.kernel)

    def items(self) -> Iterator[tuple[str, LoraFactors]]:
        """Every module in sorted order, one in memory at a time."""
        return ((module, self.factors(module)) for module in self.modules)

    def fingerprint(self) -> str:
        """SHA-256 over the weight file's bytes and the scales, hex."""
        return self.index.fingerprint()


def lora_config(ranks: Mapping[str, int], part: str = "") -> dict[str, Any]:
    """Arguments of ``peft.LoraConfig`` for these modules and ranks, with scale 1 everywhere (``alpha == rank``).

    Args: part: Prefix of a text encoder, whose modules are named by their ends: not every version of it has the same root.
    """
    common = min(Counter(ranks.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    start = "" if part in TEXT_PREFIXES else "^"
    others = {f"{start}{module}": rank for module, rank in sorted(ranks.items()) if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(ranks),
        "init_lora_weights": True,
    }


def save_adapter(
    folder: Path,
    factors: Mapping[str, LoraFactors] | Iterable[tuple[str, LoraFactors]],
    *,
    metadata: Mapping[str, Any],
    prefix: str = PREFIXES[0],
    dtype: torch.dtype = torch.float32,
    peft: bool = False,
) -> None:
    """Write an adapter and its model card into ``folder``, one module in memory at a time; one already there is replaced once this
    is complete.

    Args:
        factors: By module name without ``prefix``; ranks may differ. A mapping is written in sorted order.
        metadata: JSON-able provenance: ``base``, ``base_fingerprint``, ``family``, ``category``, ``policy_hash``, ``sources``, ...
        prefix: Of the keys of all modules but a text encoder's, whose names have their own: the adapted component's, see
            `DiffusionModel.components`, or that of an adapter file.
        dtype: Of the file; scales are folded in float32 before the cast.
        peft: Write peft's own layout instead of diffusers', which any model loads; ``prefix`` does not count.
    Raises: UserError if there is no module, or one holds NaN or infinity.
    """
    folder = Path(folder)
    record = json.dumps(public_record(metadata), sort_keys=True)
    ranks: dict[str, int] = {}
    prefix = PEFT_PREFIX if peft else prefix

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for module, lora in sorted(factors.items()) if isinstance(factors, Mapping) else factors:
            down, up = lora.folded().as_saved(dtype)
            if not (down.isfinite().all() and up.isfinite().all()):  # after rounding: half precision ends at 65504
                raise UserError(f"{folder}: the factors of {module} must be finite, got NaN or infinity. Look at what made them.")
            ranks[module] = lora.rank
            key = module if split_name(module)[0] else f"{prefix}{module}"
            yield f"{key}.lora_A.weight", down
            yield f"{key}.lora_B.weight", up
        if not ranks:
            raise UserError(f"{folder}: an adapter must have at least one module, got 0. Check which modules were chosen.")

    def header() -> dict[str, str]:
        parts: dict[str, dict[str, int]] = {}
        for module, rank in ranks.items():
            part, inner = split_name(module)
            parts.setdefault(part or prefix, {})[inner] = rank
        config = {f"{part}{key}": value for part, own in parts.items() for key, value in lora_config(own, part).items()}
        return {"valign": record} if peft else {DIFFUSERS_HEADER: json.dumps(config, sort_keys=True), "valign": record}

    stream_tensors(folder / (PEFT_WEIGHTS if peft else WEIGHTS), tensors(), header)
    if peft:
        base = json.loads(record).get("base")
        write_json(folder / PEFT_CONFIG, {"peft_type": "LORA", "base_model_name_or_path": base, **lora_config(ranks)})
    write_json(folder / PROVENANCE, json.loads(record))
    name = folder.parent.name if folder.name == "adapter" else folder.name
    size = {"modules": f"{len(ranks)}, rank {min(ranks.values())} to {max(ranks.values())}"}
    load = f'pipe.load_lora_weights("{folder.name}")  # a pipeline of diffusers with the base model'
    if peft:
        load = f'model = PeftModel.from_pretrained(model, "{folder.name}")  # peft, on the base model'
    library = "peft" if peft else "diffusers"
    write_text(folder / CARD, adapter_card(json.loads(record), name=name, load=load, library=library, facts=size))


def public_record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it may be given away: a base model of the hub by its id, a folder of this machine by its name alone."""
    record, base = dict(metadata), metadata.get("base")
    if isinstance(base, str):
        hub = HUB_FOLDER.search(base)
        local = Path(base).is_absolute() or base.startswith(("~", ".")) or Path(base).exists()
        record["base"] = f"{hub[1]}/{hub[2]}" if hub else re.split(r"[/\\]", base.rstrip("/\\"))[-1] if local else base
    return record


def open_adapter(folder: str | Path, *, anywhere: bool = False) -> AdapterFile:
    """Open an adapter: a folder of `save_adapter`, a plain diffusers LoRA folder or file, or a peft folder. Reads the index only.

    A training run's folder stands for the ``adapter`` folder in it.

    Args:
        anywhere: Also take adapters of other models than Stable Diffusion, such as language models.
    Raises: UserError for pickles and for anything but LoRA on linear layers and convolutions (of a U-Net and its text encoders,
        unless ``anywhere``).
    """
    found = index_adapter(folder, anywhere=anywhere)
    return AdapterFile(found, TensorIndex(found.header.path, found.header))
