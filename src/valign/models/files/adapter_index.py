"""What an adapter file says of itself: its modules, their shapes and scales, and its record. Neither factors nor torch are needed.

`valign.models.files.adapter_files` reads the factors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import hash_file, hash_value, read_json
from valign.models.files.layouts import TEXT_PREFIXES, ModuleEntry, check_modules, prefix_of, read_layout
from valign.models.files.tensor_header import TensorHeader

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PROVENANCE = "valign.json"
DIFFUSERS_HEADER = "lora_adapter_metadata"


@dataclass(frozen=True)
class AdapterIndex:
    """An adapter of which the header alone was read."""

    folder: Path
    header: TensorHeader
    entries: Mapping[str, ModuleEntry]
    metadata: Mapping[str, Any]

    @cached_property
    def _hash(self) -> str:
        scales = {name: entry.scale for name, entry in self.entries.items()}
        return hash_value({"weights": hash_file(self.header.path), "scales": scales})

    def fingerprint(self) -> str:
        """SHA-256 over the weight file's bytes and the scales, hex."""
        return self._hash


def index_adapter(folder: str | Path, *, anywhere: bool = False) -> AdapterIndex:
    """The index of what `open_adapter` opens, with its arguments and its mistakes."""
    weights = _weights_file(Path(folder))
    header = TensorHeader(weights)
    alphas = {key: header.number(key) for key in header.places if key.endswith(".alpha")}
    home = weights.parent
    metadata = read_record(weights, header.metadata)
    shapes = {key: place.shape for key, place in header.places.items()}
    entries = read_layout(str(weights), shapes, _configs(weights, header.metadata), alphas)
    if "valign" not in header.metadata and not metadata and not anywhere:
        check_modules(str(weights), entries)
    return AdapterIndex(home, header, entries, metadata)


def read_record(weights: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """What the adapter's record says, beside its weights or in their header; empty without one."""
    path = weights.parent / PROVENANCE
    return checked_object(path, read_json(path)) if path.exists() else header_object(weights, header, "valign")


def header_object(path: Path, header: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON object under ``name`` in a file's header; empty without one. Raises: UserError for anything else."""
    try:
        found = json.loads(header.get(name, "{}"))
    except (ValueError, RecursionError, TypeError):
        found = None
    return checked_object(f"{path}: {name} in its header", found)


def checked_object(what: str | Path, found: object) -> dict[str, Any]:
    """Raises: UserError unless it is a JSON object."""
    if not isinstance(found, dict):
        raise UserError(f"{what} must be a JSON object, got another kind. Save the adapter again.")
    return found


def _configs(weights: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """peft's config beside the weights, or diffusers' in the header, where its keys begin with the prefix of the network that it is
    of; see `read_layout`."""
    path = weights.parent / PEFT_CONFIG
    if weights.name == PEFT_WEIGHTS and path.exists():
        return {"": checked_object(path, read_json(path))}
    if weights.name == PEFT_WEIGHTS:
        raise UserError(f"{path} does not exist, and without it the adapter's scale is unknown. Copy it beside the weights.")
    config = header_object(weights, header, DIFFUSERS_HEADER)
    prefix = prefix_of(config)

    def own(start: str) -> dict[str, Any]:
        return {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}

    texts = {start: found for start in TEXT_PREFIXES if (found := own(start))}
    return {"": own(prefix) if prefix else {} if texts else config, **texts}


def _weights_file(path: Path) -> Path:
    """The one weight file that ``path`` stands for."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} must be a safetensors file, got {path.suffix or 'no suffix'}. Pickles are not read; convert it first."
            )
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Name an adapter folder or a .safetensors file.")
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    if (path / "adapter").is_dir():
        return _weights_file(path / "adapter")
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} must hold one adapter, got {', '.join(file.name for file in found)}. Name the file itself.")
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{suffix}"))
    if pickles:
        raise UserError(f"{path} holds {pickles[0]}, a pickle, and pickles are not read. Save it as safetensors first.")
    raise UserError(f"{path} holds no adapter ({WEIGHTS}). Name an adapter folder, or train one first.")
