"""A model's weights on disk, in one safetensors file or in shards under an index: read and written tensor by tensor."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from valign.checks import UserError
from valign.files import read_json, write_json
from valign.models.files.tensor_stream import TensorIndex, TensorShape, write_known

COMPONENTS = ("unet", "transformer")  # of a pipeline's folder: the denoiser
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TIED = "lm_head.weight"  # in transformers' folders the copy of the input embeddings, where ``tie_word_embeddings`` is set
SAMPLE = 4096  # bytes of each tensor that a fingerprint reads
LEFT_OUT = ("run.json", "realign.json", "mask", "checkpoints")  # what valign itself keeps beside a result
SHARD = 5_000_000_000  # bytes


@dataclass(frozen=True)
class WeightFolder:
    """An opened folder of weights: the headers are in memory, the tensors stay on disk until asked for."""

    model: Path  # the model's folder: of a pipeline the whole one
    folder: Path  # with the weight files in it
    stem: str  # of their names: ``model`` or ``diffusion_pytorch_model``
    files: Mapping[str, TensorIndex]  # by file name, sorted
    config: Mapping[str, Any]
    latest: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # the tensor that was checked last

    @cached_property
    def index(self) -> dict[str, TensorIndex]:
        """The file of each tensor, by name, sorted; a tied copy of the embeddings is left out."""
        found = {name: file for file in self.files.values() for name in file.places}
        if self.config.get("tie_word_embeddings") and len(found) > 1:
            found.pop(TIED, None)
        return dict(sorted(found.items()))

    @cached_property
    def shapes(self) -> dict[str, TensorShape]:
        """Dtype and shape by name, sorted."""
        return {name: TensorShape(file.places[name].dtype, file.places[name].shape) for name, file in self.index.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.index[name].read(name)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, index in self.index.items():
            place = index.places[name]
            digest.update(f"{name} {place.dtype} {place.shape}".encode())
            with index.path.open("rb") as file:
                for start in (place.start, place.start + place.size // 2):
                    file.seek(start)
                    digest.update(file.read(min(SAMPLE, place.size)))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and 8 KiB of each tensor, hex: a model larger than memory is not read as a whole."""
        return self._fingerprint


def open_weights(path: str | Path) -> WeightFolder:
    """Open a transformers model, a diffusers pipeline (its U-Net or transformer) or such a component. Reads headers only.

    Raises: UserError for a folder without safetensors, an adapter, pickles, an incomplete set of shards, or quantised weights.
    """
    model = Path(path).expanduser()
    if not model.is_dir():
        raise UserError(f"{model} must be a model's folder, got none. Download the model first, or check the path.")
    folder = model
    if (model / "model_index.json").exists():
        folder = next((model / name for name in COMPONENTS if (model / name).is_dir()), model)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} must be a whole model here, got an adapter. Name the model that it was trained on.")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} must hold config.json and safetensors, got no config.json. Name a model's folder.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} must be a JSON object, got another kind. Download the model again.")
    if config.get("quantization_config"):
        raise UserError(
            f"{folder} must hold plain weights, got quantised ones ({_scheme(config)}). Name the model before quantisation."
        )
    names, stem = _files(folder)
    files = {name: TensorIndex(folder / name) for name in sorted(names)}
    return WeightFolder(model, folder, stem, files, config)


def _scheme(config: Mapping[str, Any]) -> str:
    found = config["quantization_config"]
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def _files(folder: Path) -> tuple[list[str], str]:
    """Names of the weight files, and their stem."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise UserError(f"{folder} must hold one set of weights, got {', '.join(one.name for one in indexes)}. Delete the others.")
    if indexes:
        listed = read_json(indexes[0])
        table = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(table, dict) or not all(isinstance(name, str) and Path(name).name == name for name in table.values()):
            raise UserError(f"{indexes[0]} must hold a weight_map of file names, got none. Download the model again.")
        names = sorted(set(table.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} must hold all of its {len(names)} shards, got no {absent[0]}. Download the model again.")
        return names, indexes[0].name.removesuffix(".safetensors.index.json").split(".")[0]
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, found[0].removesuffix(".safetensors").split(".")[0]
    if found:
        raise UserError(f"{folder} must hold one set of weights, got {', '.join(found[:5])} without an index. Delete the others.")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    what = f"the pickle {pickles[0]}, and pickles are not read" if pickles else "none"
    raise UserError(f"{folder} must hold safetensors, got {what}. Save the model as safetensors first.")


def plan_shards(shapes: Mapping[str, TensorShape], limit: int = SHARD) -> list[list[str]]:
    """Names by shard, in the order given: each shard up to ``limit`` bytes, or one tensor that is larger."""
    shards: list[list[str]] = []
    room = 0
    for name, known in shapes.items():
        if not shards or known.size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= known.size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """File names as transformers and diffusers have them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(
    folder: Path,
    stem: str,
    shapes: Mapping[str, TensorShape],
    make: Callable[[str], Tensor],
    *,
    limit: int = SHARD,
    before: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the tensors in shards, each atomically, and the index last; shards that are there already are kept as they are.

    Args:
        shapes: Of all tensors, in the order of the files.
        make: Gives one tensor by name; not called for those of a finished shard.
        before: Called when the tensors of a shard are made, before the shard has its name.
    Returns: the names of the files.
    """
    plan = plan_shards(shapes, limit)
    names = shard_names(stem, len(plan))
    for name, tensors in zip(names, plan, strict=True):
        if not (folder / name).exists():
            write_known(folder / name, {one: shapes[one] for one in tensors}, make, before=before)
    if len(plan) > 1:
        table = {one: name for name, tensors in zip(names, plan, strict=True) for one in tensors}
        size = sum(known.size for known in shapes.values())
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": dict(sorted(table.items()))}
        )
    return names


def copy_rest(source: WeightFolder, out: Path) -> None:
    """Copy what a model needs beside these weights: configurations, tokenizer, a pipeline's other parts; pickles are not copied."""
    place = source.folder.relative_to(source.model)
    for file in sorted(source.model.rglob("*")):
        inner = file.relative_to(source.model)
        own = inner.parent == place and (file.name.endswith((".safetensors", ".safetensors.index.json")))
        hidden = any(part.startswith(".") for part in inner.parts)
        if not file.is_file() or own or hidden or file.suffix in PICKLES or inner.parts[0] in LEFT_OUT:
            continue
        (out / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / inner)


def same_weights(one: WeightFolder, other: WeightFolder) -> bool:
    """Whether two folders hold the same weights, as far as their fingerprints tell."""
    return one.folder.samefile(other.folder) or one.fingerprint() == other.fingerprint()
