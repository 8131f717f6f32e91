"""Load a diffusers folder or a model of the Hugging Face hub. Safetensors only: a pickle is never opened."""

import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel, schedulers
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from valign.checks import UserError, check_choice, first_line
from valign.files import read_json
from valign.memory import MemoryConfig
from valign.models.devices import DTYPES, LOAD_ERRORS, choose_device, choose_dtype
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.network_pool import Mode, NetworkPool
from valign.models.diffusion.pipeline import PipelineModel
from valign.models.diffusion.sdxl import StableDiffusionXL
from valign.models.diffusion.stable_diffusion import StableDiffusion
from valign.models.files.finite import check_finite
from valign.models.files.hub import HUB_ID, not_fetched

FAMILIES: dict[str, type[PipelineModel]] = {family.pipeline.__name__: family for family in (StableDiffusion, StableDiffusionXL)}
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # judging images is the detectors' work
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def load_model(
    name_or_folder: str | Path, *, device: str = "auto", dtype: str = "auto", memory: MemoryConfig | None = None
) -> DiffusionModel:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline.

    Args:
        name_or_folder: A diffusers folder (with ``model_index.json``), or a hub id ``owner/name``, which is downloaded.
        device: ``"auto"`` (CUDA where there is one, else CPU) or a torch device.
        dtype: ``"auto"`` (`choose_dtype`), or a name in `DTYPES`; that of ``memory`` if left out. The autoencoder has its own.
        memory: Precision, slices and phases; all networks on the device, the autoencoder in float32, if left out.
    Raises: UserError if the folder is missing, of another architecture, broken, or holds its weights as pickles only.
    """
    check_choice("load_model.dtype", dtype, ("auto", *DTYPES))
    memory, place = memory or MemoryConfig(), choose_device(device)
    folder = resolve_folder(str(name_or_folder))
    family = check_folder(folder)
    wanted = memory.precision if dtype == "auto" else dtype
    kind = DTYPES[wanted] if wanted != "auto" else choose_dtype(place)
    kinds = {part: DTYPES[memory.vae_precision] if part == "vae" else kind for part in family.networks}
    mode: Mode = "phased" if memory.phased else "offload" if memory.offload else "resident"
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

    def read(part: str) -> nn.Module:
        try:
            network: nn.Module = _load_part(folder, part, kinds[part])
        except LOAD_ERRORS as error:
            raise UserError(f"{folder} could not be loaded: {first_line(error)}. Download or save the model again.") from error
        return network.requires_grad_(False).eval()

    try:
        parts: dict[str, Any] = {
            part: (empty_network if mode == "phased" else _load_part)(folder, part, kinds[part]) for part in family.networks
        }
        pipe = _assembled(family, folder, parts)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} could not be loaded: {first_line(error)}. Download or save the model again.") from error
    _check_channels(pipe, folder)
    pipe = pipe.to(place) if mode == "resident" else pipe
    pool = NetworkPool(pipe, place, family.groups(), mode=mode, read=read)
    return family(pipe, str(folder), pool, vae_slice=memory.vae_slice)


def empty_network(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A network of a pipeline's folder by its configuration alone: shapes on the meta device, no weights."""
    kind = CLASSES[part]
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            network = kind(kind.config_class.from_pretrained(folder / part, local_files_only=True))
        else:
            network = kind.from_config(kind.load_config(folder / part, local_files_only=True))
    return nn.Module.to(network, dtype)  # diffusers' own says a warning about modules that there are none of


def _assembled(family: type[PipelineModel], folder: Path, parts: dict[str, Any]) -> Any:
    """The pipeline from its networks. Scheduler and tokenizers are of classes that read JSON and text alone, whatever the index
    says: diffusers would load any class that is named there, with any file that this class reads."""
    index: dict[str, Any] = read_json(folder / "model_index.json")
    for part in family.networks:
        if part.startswith("text_encoder"):
            name = part.replace("text_encoder", "tokenizer")
            parts[name] = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
    named = index.get("scheduler")
    library, kind = named if isinstance(named, list) and len(named) == 2 else (None, None)
    scheduler = getattr(schedulers, str(kind), None) if library == "diffusers" else None
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise UserError(f"{folder / 'model_index.json'} must name a scheduler of diffusers, got {kind}. Save the model again.")
    made: Any = scheduler  # each has a config, which the class that they share does not say
    parts["scheduler"] = made.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    known = signature(family.pipeline.__init__).parameters
    options = {name: value for name, value in index.items() if name in known and isinstance(value, bool | int | float | str)}
    return family.pipeline(**dict.fromkeys(UNUSED & set(known)), **options | family.load_options | parts)


def _check_channels(pipe: Any, folder: Path) -> None:
    """Raises: UserError for a denoiser that wants more than latents: an inpainting or image-editing model."""
    asked, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if asked != latent:
        raise UserError(
            f"{folder} must denoise latents of {latent} channels, got a U-Net with {asked} input channels, "
            "as models have that fill in or edit images. Use a text-to-image model."
        )


def _load_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One network, of the class that this library works with whatever the folder's files say; every weight must be there."""
    network, info = CLASSES[part].from_pretrained(
        folder / part,
        dtype=dtype,
        variant=_variant(folder / part),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{part} lacks {len(missing)} weights, such as {missing[0]}")
    check_finite(folder / part, network.state_dict())
    return network


def resolve_folder(name: str) -> Path:
    """The folder of a model: itself, or what the hub gives for ``owner/name``. Raises: UserError if there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{name} must be a model folder, got a file. Convert a single-file checkpoint once: "
            "diffusers.StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name} does not exist. Give a diffusers folder, or a hub id such as owner/name.")
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:
        raise not_fetched(name, error) from error


def check_folder(folder: Path) -> type[PipelineModel]:
    """The family of a pipeline's folder. Raises: UserError for what `load_model` refuses before it reads weights."""
    family = read_family(folder)
    for part in family.networks:
        files = sorted((folder / part).glob("*"))
        if any(file.suffix == ".safetensors" for file in files):
            continue
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles:
            raise UserError(
                f"{pickles[0]} is a pickle, which can run any code when it is opened, and there is no safetensors file beside it. "
                "Convert it where you trust it: diffusers.DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False)"
                ".save_pretrained(NEW_FOLDER)."
            )
        raise UserError(f"{folder / part} has no safetensors file. Download or save the model again.")
    for part in family.networks:
        if part.startswith("text_encoder"):
            _check_tokenizer(folder / part.replace("text_encoder", "tokenizer"), folder / part / "config.json")
    return family


def read_family(folder: Path) -> type[PipelineModel]:
    """By the folder's index alone. Raises: UserError if it is not a diffusers model, or of no supported family."""
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"{folder} has no model_index.json, so it is not a diffusers model. Give the folder that save_pretrained made."
        )
    index: dict[str, Any] = read_json(folder / "model_index.json")
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"{folder} must be one of {', '.join(FAMILIES)}; got {kind}. Choose a model of a supported architecture.")
    return FAMILIES[kind]


def _check_tokenizer(folder: Path, encoder: Path) -> None:
    """Without its files a tokenizer of two words is made, and all prompts look the same to the model."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    whole = folder / "tokenizer.json"
    if missing := [file for file in files if not file.is_file()]:
        if not whole.is_file():
            raise UserError(f"{missing[0]} does not exist, and no tokenizer.json beside it. Download or save the model again.")
        words = len((read_json(whole).get("model") or {}).get("vocab") or ())
    else:
        words = len(read_json(files[0]))
    said = read_json(encoder).get("vocab_size", 0)
    if words < said // 2:
        raise UserError(
            f"{whole if missing else files[0]} must have the {said} words of the text encoder, got {words}. "
            "Download or save the model again."
        )


def _variant(folder: Path) -> str | None:
    """``"fp16"`` where a network is there only as ``*.fp16.safetensors``."""
    names = [file.name for file in folder.glob("*.safetensors")]
    found = {match.group(1) for name in names if (match := re.search(r"\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors$", name))}
    plain = any(re.fullmatch(r"[\w-]+\.safetensors", name) for name in names)
    return None if plain or not found else min(found)
