"""The kohya key layout, as ComfyUI and web interfaces read it: ``lora_unet_<module>`` with ``lora_down``, ``lora_up``, ``alpha``.

Stable Diffusion 1.x/2.x keep the module's diffusers name with ``_`` for ``.``. SDXL has the names of the first latent-diffusion
code (``input_blocks``, ``middle_block``, ``output_blocks``), in which blocks and layers share one running number.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from valign.checks import UserError, check_choice
from valign.files import hash_file
from valign.models.files.adapter_files import (
    AdapterFile,
    LoraFactors,
    header_object,
    open_adapter,
    public_record,
    read_alpha,
    save_adapter,
)
from valign.models.files.finite import check_finite
from valign.models.files.tensor_stream import TensorIndex, stream_tensors

Family = Literal["stable-diffusion", "sdxl"]
PREFIX = "lora_unet_"
WORDS = (  # names that hold an underscore of their own; every other underscore stands for a dot
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2"
    "|to_q|to_k|to_v|to_out|proj_in|proj_out"
)
SDXL_EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
SDXL_INNER = {"time_emb_proj": "emb_layers_1"}  # the only linear layer of a residual block
SDXL_NAME = re.compile("input_blocks|middle_block|output_blocks|label_emb|time_embed_")
SIDES = {"down_blocks": ("input_blocks", 1), "up_blocks": ("output_blocks", 0)}  # input_blocks_0 is the first convolution
KINDS = ("resnets", "attentions")


def to_kohya(module: str, family: Family, *, layers_per_block: int = 2) -> str:
    """A module's kohya name, without the ``lora_unet_`` prefix; ``layers_per_block`` as in the U-Net's config (2 in SDXL)."""
    if family == "stable-diffusion":
        return module.replace(".", "_")
    if module in SDXL_EMBEDDINGS:
        return SDXL_EMBEDDINGS[module]
    if match := re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        side, block, kind, layer, inner = match.groups()
        name, first = SIDES[side]
        number = first + int(block) * (layers_per_block + 1) + int(layer)
        return f"{name}_{number}_{KINDS.index(kind)}_{_inner_name(inner)}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        kind, layer, inner = match.groups()
        return f"middle_block_{KINDS.index(kind) + 2 * int(layer)}_{_inner_name(inner)}"
    raise UserError(f"{module} has no kohya name in SDXL. Export adapters of attention and time-embedding layers only.")


def from_kohya(name: str, family: Family, *, layers_per_block: int = 2) -> str:
    """The inverse of `to_kohya`."""
    if family == "stable-diffusion":
        return _dotted(name)
    for module, known in SDXL_EMBEDDINGS.items():
        if name == known:
            return module
    if match := re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_([01])_(.+)", name):
        side, number, kind, inner = match.groups()
        ours = "down_blocks" if side == "input_blocks" else "up_blocks"
        block, layer = divmod(int(number) - SIDES[ours][1], layers_per_block + 1)
        return f"{ours}.{block}.{KINDS[int(kind)]}.{layer}.{_inner_module(inner)}"
    if match := re.fullmatch(r"middle_block_([012])_(.+)", name):
        layer, kind = divmod(int(match[1]), 2)
        return f"mid_block.{KINDS[kind]}.{layer}.{_inner_module(match[2])}"
    raise UserError(f"{PREFIX}{name} is not a name of an SDXL U-Net. Is the file for another model?")


def export_kohya(folder: str | Path, out_file: Path, *, family: Family | None = None, layers_per_block: int = 2) -> Path:
    """Write an adapter as one kohya file (``alpha == rank``), streamed.

    Where ranks differ, the alphas are left out, which every reader takes as ``alpha == rank``: diffusers (0.42) reads several
    alphas in one file wrongly, it drops those of attention layers.

    Args:
        family: Overrides the adapter's own record; needed only where neither that nor the module names tell.
    """
    adapter = open_adapter(folder)
    family = family or _family_of(adapter)
    check_choice("export_kohya.family", family, ("stable-diffusion", "sdxl"))
    dtype = _common_dtype(adapter)
    ranks = sorted({entry.rank for entry in adapter.entries.values()})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for module, lora in adapter.items():
            name, factors = PREFIX + to_kohya(module, family, layers_per_block=layers_per_block), lora.folded()
            if len(ranks) == 1:
                yield f"{name}.alpha", torch.tensor(float(factors.rank), dtype=dtype)
            yield f"{name}.lora_down.weight", factors.down.to(dtype)
            yield f"{name}.lora_up.weight", factors.up.to(dtype)

    one = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    header = {"ss_network_module": "networks.lora", "ss_network_dim": one, "ss_network_alpha": one}
    if family == "sdxl":
        header["ss_base_model_version"] = "sdxl_base_v1-0"
    header["valign"] = json.dumps(public_record(adapter.metadata), sort_keys=True)
    stream_tensors(Path(out_file), tensors(), lambda: header)
    return Path(out_file)


def import_kohya(file: str | Path, out_folder: Path, *, layers_per_block: int = 2) -> Path:
    """Turn a kohya file into an adapter folder. ``alpha / rank`` is folded into ``up``, exactly where it is a power of two.

    Raises: UserError for convolutions, text encoders, LyCORIS forms, DoRA, pickles and names that no U-Net has.
    """
    file = Path(file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise UserError(f"{file} must be an existing .safetensors file. Pickles are not read; convert them first.")
    tensors = TensorIndex(file)
    names = _module_names(file, tensors)
    family: Family = "sdxl" if any(SDXL_NAME.match(name) for name in names) else "stable-diffusion"
    modules = {from_kohya(name, family, layers_per_block=layers_per_block): name for name in names}
    for module, name in modules.items():
        if to_kohya(module, family, layers_per_block=layers_per_block) != name:
            raise UserError(f"{file}: {PREFIX}{name} is not a name of a U-Net. Is the file for another model?")
    scales = {name: _scale(tensors, PREFIX + name) for name in names}
    first = tensors.places[f"{PREFIX}{names[0]}.lora_down.weight"].dtype
    metadata = header_object(file, tensors.metadata, "valign") or {
        "family": family,
        "sources": [{"format": "kohya", "name": file.name, "sha256": hash_file(file)}],
    }
    save_adapter(
        Path(out_folder),
        ((module, _factors(tensors, PREFIX + name, scales[name])) for module, name in sorted(modules.items())),
        metadata=metadata,
        dtype=first if set(scales.values()) == {1.0} else torch.float32,
    )
    return Path(out_folder)


def _inner_name(inner: str) -> str:
    return SDXL_INNER.get(inner, inner.replace(".", "_"))


def _inner_module(name: str) -> str:
    return next((module for module, known in SDXL_INNER.items() if known == name), _dotted(name))


def _dotted(name: str) -> str:
    return re.sub(rf"({WORDS})|_", lambda match: match[1] or ".", name)


def _family_of(adapter: AdapterFile) -> Family:
    said = adapter.metadata.get("family")
    if said in ("stable-diffusion", "sdxl"):
        return said  # type: ignore[no-any-return]
    if any(module.startswith(("up_blocks.0.attentions", "add_embedding")) for module in adapter.modules):
        return "sdxl"  # SDXL attends in its deepest blocks, the 1.x/2.x models in their shallowest
    if any(module.startswith(("down_blocks.0.attentions", "up_blocks.3")) for module in adapter.modules):
        return "stable-diffusion"
    raise UserError(
        f"{adapter.folder}: the family of the base model must be known, and neither record nor modules tell. Give family."
    )


def _common_dtype(adapter: AdapterFile) -> torch.dtype:
    """The file's own dtype, so that nothing is rounded; float32 where scales are folded in."""
    if any(entry.scale != 1 for entry in adapter.entries.values()):
        return torch.float32
    return adapter.factors(adapter.modules[0]).down.dtype


def _module_names(file: Path, tensors: TensorIndex) -> list[str]:
    """Names with all their tensors, sorted; everything that is not LoRA on the U-Net is refused."""
    names = sorted({key.split(".")[0] for key in tensors.places})
    if not names:
        raise UserError(f"{file} must hold LoRA factors, got 0 tensors. Is it the right file?")
    strange = [name for name in names if not name.startswith(PREFIX)]
    if strange:
        raise UserError(f"{file} must adapt the U-Net only, got {strange[0]}. Export it without its text-encoder part.")
    known = {f"{name}.{part}" for name in names for part in ("alpha", "lora_down.weight", "lora_up.weight")}
    for key in tensors.places:
        if key not in known:
            raise UserError(f"{file} must be plain LoRA, got {key}. LoHa, LoKr, LoCon and DoRA files are not read.")
    for name in names:
        if not {f"{name}.lora_down.weight", f"{name}.lora_up.weight"} <= tensors.places.keys():
            raise UserError(f"{file}: {name} must have lora_down and lora_up. The file is incomplete; download it again.")
        shape = tensors.places[f"{name}.lora_down.weight"].shape
        if len(shape) != 2:
            raise UserError(f"{file}: {name} must be LoRA on a linear layer, got {shape}. Leave the convolutions out.")
    return [name.removeprefix(PREFIX) for name in names]


def _scale(tensors: TensorIndex, name: str) -> float:
    """``alpha / rank``; by kohya's rule, no alpha means ``alpha == rank``."""
    key = f"{name}.alpha"
    return read_alpha(tensors, key) / tensors.places[f"{name}.lora_down.weight"].shape[0] if key in tensors.places else 1.0


def _factors(tensors: TensorIndex, name: str, scale: float) -> LoraFactors:
    down, up = (tensors.read(f"{name}.lora_{side}.weight") for side in ("down", "up"))
    check_finite(tensors.path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    return LoraFactors(down, up, scale)
