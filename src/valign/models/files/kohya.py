"""The kohya key layout, as ComfyUI and web interfaces read it: ``lora_unet_<module>`` with ``lora_down``, ``lora_up``, ``alpha``;
modules of text encoders are ``lora_te_<module>``, in SDXL ``lora_te1_`` and ``lora_te2_``.

OneTrainer (``unet.<module>``) and ComfyUI (``diffusion_model.<module>``) write the same tensors under names with dots: read, too.

Stable Diffusion 1.x/2.x keep the module's diffusers name with ``_`` for ``.``. SDXL has the names of the first latent-diffusion
code (``input_blocks``, ``middle_block``, ``output_blocks``), in which blocks and layers share one running number.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from valign.checks import UserError, check_choice
from valign.files import hash_file
from valign.models.files.adapter_files import (
    AdapterFile,
    LoraFactors,
    open_adapter,
    public_record,
    save_adapter,
)
from valign.models.files.adapter_index import header_object
from valign.models.files.finite import check_finite
from valign.models.files.layouts import UNET, check_modules, full_name, is_matrix, split_name
from valign.models.files.tensor_stream import TensorIndex, stream_tensors

Family = Literal["stable-diffusion", "sdxl"]
PREFIX = "lora_unet_"
WORDS = (  # names that hold an underscore of their own; every other underscore stands for a dot
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2"
    "|to_q|to_k|to_v|to_out|proj_in|proj_out|conv_in|conv_out|conv_shortcut"
)
SDXL_NAMES = {
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}
DOTTED = ("unet.", "model.diffusion_model.", "diffusion_model.")  # OneTrainer's and ComfyUI's names, with dots
TEXT_ENCODERS = {  # what a text encoder's names begin with, kohya's, OneTrainer's or ComfyUI's -> what they do in adapter files
    **dict.fromkeys(("lora_te_", "lora_te1_", "te.", "te1.", "text_encoder.", "clip_l."), "text_encoder."),
    **dict.fromkeys(("lora_te2_", "te2.", "text_encoder_2.", "clip_g."), "text_encoder_2."),
}
TEXT_MODULE = re.compile(r"(?:text_model[_.])?encoder[_.]layers[_.](\d+)[_.](self_attn|mlp)[_.](\w+)")
WRITTEN: dict[Family, dict[str, str]] = {  # the same the other way round
    "stable-diffusion": {"text_encoder.": "lora_te_"},
    "sdxl": {"text_encoder.": "lora_te1_", "text_encoder_2.": "lora_te2_"},
}
KEY = re.compile(r"(?P<name>.+)\.(?P<part>alpha|lora_down\.weight|lora_up\.weight|lora_A\.weight|lora_B\.weight)")
HALVES = {"alpha": "alpha", "lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up"}
TEXT_WIDTHS: dict[int, Family] = {768: "stable-diffusion", 1024: "stable-diffusion", 2048: "sdxl"}  # of 1.x, 2.x and XL
SDXL_INNER = {  # inside a residual block
    "time_emb_proj": "emb_layers_1",
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
OF_SDXL = re.compile("input_blocks|middle_block|output_blocks|label_emb|time_embed_|out_2$")
SIDES = {"down_blocks": ("input_blocks", 1), "up_blocks": ("output_blocks", 0)}  # input_blocks_0 is the first convolution
KINDS = ("resnets", "attentions")


def to_kohya(module: str, family: Family, *, layers_per_block: int = 2) -> str:
    """A module's kohya name, without the ``lora_unet_`` prefix; ``layers_per_block`` as in the U-Net's config (2 in SDXL)."""
    if family == "stable-diffusion":
        return module.replace(".", "_")
    if module in SDXL_NAMES:
        return SDXL_NAMES[module]
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks_{(int(match[1]) + 1) * (layers_per_block + 1)}_0_op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):  # after the block's last residual and attention
        return f"output_blocks_{int(match[1]) * (layers_per_block + 1) + layers_per_block}_2_conv"
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
    for module, known in SDXL_NAMES.items():
        if name == known:
            return module
    if match := re.fullmatch(r"input_blocks_(\d+)_0_op", name):
        return f"down_blocks.{int(match[1]) // (layers_per_block + 1) - 1}.downsamplers.0.conv"
    if match := re.fullmatch(r"output_blocks_(\d+)_2_conv", name):
        return f"up_blocks.{int(match[1]) // (layers_per_block + 1)}.upsamplers.0.conv"
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

    Smaller ranks are filled up with zeros to the largest: readers differ in what several ranks, or several alphas, mean.

    Args:
        family: Overrides the adapter's own record; needed only where neither that nor the module names tell.
    """
    adapter = open_adapter(folder)
    family = family or _family_of(adapter)
    check_choice("export_kohya.family", family, ("stable-diffusion", "sdxl"))
    dtype = _common_dtype(adapter)
    rank = max(entry.rank for entry in adapter.entries.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for module, lora in adapter.items():
            name, factors = _key(adapter, module, family, layers_per_block), lora.folded()
            missing = rank - factors.rank
            padded = replace(factors, down=pad(factors.down, (0, 0, 0, missing)), up=pad(factors.up, (0, missing)))
            down, up = padded.as_saved(dtype)
            yield f"{name}.alpha", torch.tensor(float(rank), dtype=dtype)
            yield f"{name}.lora_down.weight", down
            yield f"{name}.lora_up.weight", up

    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if family == "sdxl":
        header["ss_base_model_version"] = "sdxl_base_v1-0"
    else:  # kohya's tools tell 1.x from 2.x by the width of the text
        widths = {entry.shape[1] for module, entry in adapter.entries.items() if module.endswith(("attn2.to_k", "attn2.to_v"))}
        known = [{768: "sd_v1", 1024: "sd_v2"}[width] for width in widths & {768, 1024}]
        if len(known) == 1:
            header["ss_base_model_version"] = known[0]
    header["valign"] = json.dumps(public_record(adapter.metadata), sort_keys=True)
    stream_tensors(Path(out_file), tensors(), lambda: header)
    return Path(out_file)


def import_kohya(file: str | Path, out_folder: Path, *, layers_per_block: int = 2) -> Path:
    """Turn a file of kohya's tools, of OneTrainer or in ComfyUI's names into an adapter folder.

    ``alpha / rank`` is folded into ``up``, exactly where it is a power of two; else the file's widest precision is kept.
    Raises: UserError for LyCORIS forms, DoRA, pickles and names that neither a U-Net nor a text encoder has.
    """
    file = Path(file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise UserError(f"{file} must be an existing .safetensors file. Pickles are not read; convert them first.")
    tensors = TensorIndex(file)
    found = _read_names(file, tensors)
    modules = {_module_of(file, name, layers_per_block): parts for name, parts in found.items()}
    if len(modules) < len(found):
        raise UserError(f"{file} must name each module once, got {len(found)} names of {len(modules)} modules. Save it again.")
    check_modules(str(file), modules)
    scales = {module: _scale(tensors, parts) for module, parts in modules.items()}
    fan_in = {module: tensors.places[parts["down"]].shape[1] for module, parts in modules.items() if not split_name(module)[0]}
    widest = _widest(tensors.places[parts[half]].dtype for parts in modules.values() for half in ("down", "up"))
    family = _guess_family(fan_in)
    metadata = header_object(file, tensors.metadata, "valign") or {
        **({"family": family} if family else {}),
        "sources": [{"format": "kohya", "name": file.name, "sha256": hash_file(file)}],
    }
    save_adapter(
        Path(out_folder),
        ((module, _factors(tensors, parts, scales[module])) for module, parts in sorted(modules.items())),
        metadata=metadata,
        dtype=widest if set(scales.values()) == {1.0} else torch.promote_types(widest, torch.float32),
    )
    return Path(out_folder)


def _key(adapter: AdapterFile, module: str, family: Family, layers_per_block: int) -> str:
    """The module's whole name in a kohya file."""
    part, _ = split_name(module)
    if not part:
        return PREFIX + to_kohya(module, family, layers_per_block=layers_per_block)
    if part not in WRITTEN[family]:
        raise UserError(f"{adapter.folder}: {module} is of a second text encoder, which {family} does not have. Check family.")
    return WRITTEN[family][part] + module.removeprefix(part).replace(".", "_")


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
    family = _guess_family({module: entry.shape[1] for module, entry in adapter.entries.items() if not split_name(module)[0]})
    if family is None:
        raise UserError(
            f"{adapter.folder}: the family of the base model must be known, and neither record nor modules tell. "
            "Name it: --family, or family= in Python."
        )
    return family


def _guess_family(fan_in: Mapping[str, int]) -> Family | None:
    """By where a U-Net attends, how deep, and how wide its text is; None where the modules are of both. Args: inputs by module."""
    for module, width in fan_in.items():
        if module.startswith(("up_blocks.0.attentions", "add_embedding")) or re.search(r"transformer_blocks\.[1-9]", module):
            return "sdxl"  # SDXL attends in its deepest blocks, with several transformers; the 1.x/2.x models in their shallowest
        if module.startswith(("down_blocks.0.attentions", "down_blocks.3", "up_blocks.3")):
            return "stable-diffusion"
        if module.endswith(("attn2.to_k", "attn2.to_v")) and width in TEXT_WIDTHS:
            return TEXT_WIDTHS[width]
    return None


def _common_dtype(adapter: AdapterFile) -> torch.dtype:
    """The file's own dtype, so that nothing is rounded; float32 where scales are folded in."""
    if any(entry.scale != 1 for entry in adapter.entries.values()):
        return torch.float32
    return _widest(adapter.tensors.places[key].dtype for entry in adapter.entries.values() for key in (entry.down, entry.up))


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _read_names(file: Path, tensors: TensorIndex) -> dict[str, dict[str, str]]:
    """Each name of a module, with its layout's prefix, and the keys of its ``down``, ``up`` and, if it is there, ``alpha``."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors.places:
        match = KEY.fullmatch(key)
        if not key.startswith((PREFIX, *DOTTED, *TEXT_ENCODERS)):
            raise UserError(
                f"{file} must adapt a U-Net and its text encoders only, got {key}. "
                f"Names begin with {', '.join((PREFIX, *DOTTED, 'lora_te'))}: is it for another model?"
            )
        if match is None:
            raise UserError(f"{file} must be plain LoRA, got {key}. LoHa, LoKr, LoCon and DoRA files are not read.")
        found.setdefault(match["name"], {})[HALVES[match["part"]]] = key
    if not found:
        raise UserError(f"{file} must hold LoRA factors, got 0 tensors. Is it the right file?")
    for name, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise UserError(f"{file}: {name} must have lora_down and lora_up. The file is incomplete; download it again.")
        down, up = (tensors.places[parts[half]].shape for half in ("down", "up"))
        if len(down) not in (2, 4) or not is_matrix(up):
            raise UserError(f"{file}: {name} must be LoRA on a linear layer or a convolution, got {down} and {up}. Leave it out.")
    return dict(sorted(found.items()))


def _module_of(file: Path, name: str, layers_per_block: int) -> str:
    """The module in diffusers' names: those of latent-diffusion and underscores for dots are undone."""
    prefix = next(prefix for prefix in (PREFIX, *DOTTED, *TEXT_ENCODERS) if name.startswith(prefix))
    inner = name.removeprefix(prefix)
    if prefix in TEXT_ENCODERS:
        match = TEXT_MODULE.fullmatch(inner)
        if match is None:
            raise UserError(f"{file}: {name} is not a name of a CLIP text encoder's layer. Is the file for another model?")
        return full_name(TEXT_ENCODERS[prefix], f"encoder.layers.{match[1]}.{match[2]}.{match[3]}")
    if prefix != PREFIX and UNET.fullmatch(inner):
        return inner
    short = inner.replace(".", "_")
    family: Family = "sdxl" if OF_SDXL.match(short) else "stable-diffusion"
    module = from_kohya(short, family, layers_per_block=layers_per_block)
    if to_kohya(module, family, layers_per_block=layers_per_block) != short:
        raise UserError(f"{file}: {name} is not a name of a U-Net. Is the file for another model?")
    return module


def _scale(tensors: TensorIndex, parts: Mapping[str, str]) -> float:
    """``alpha / rank``; by kohya's rule, no alpha means ``alpha == rank``."""
    return tensors.header.number(parts["alpha"]) / tensors.places[parts["down"]].shape[0] if "alpha" in parts else 1.0


def _factors(tensors: TensorIndex, parts: Mapping[str, str], scale: float) -> LoraFactors:
    down, up = (tensors.read(parts[half]) for half in ("down", "up"))
    check_finite(tensors.path, {parts["down"]: down, parts["up"]: up})
    kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else None
    return LoraFactors(down.flatten(1), up.flatten(1), scale, kernel)
