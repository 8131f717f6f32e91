"""Miniature pipelines with random weights: the real classes and the real file layout, a few hundred kilobytes, made in a second.

Their images are noise, but they load, train, merge, save and sample as the published models do, on any English prompt.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from valign.checks import check_choice, check_range
from valign.files import atomic_folder

NORM_GROUPS = 8
HEADS = 4
TOKENS = 77
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}  # as published
WORDS = ("a", "the", "of", "and", "in", "on", "with", "man", "woman", "red", "blue", "photo", "painting")


def build_miniature(
    folder: Path,
    *,
    family: Literal["stable-diffusion", "sdxl"] = "stable-diffusion",
    prediction: Literal["epsilon", "velocity"] = "epsilon",
    seed: int = 0,
    width: int = 32,
) -> Path:
    """Write a random-weight pipeline of 64 x 64 pixels to the new ``folder`` and return it; same arguments, same bytes.

    Args:
        prediction: ``"epsilon"`` as SD 1.5, or ``"velocity"`` as SD 2.1; SDXL has both.
        width: Channels of the U-Net's first block and of the text encoder; a multiple of 8, from 8 on.
    """
    check_choice("build_miniature.family", family, ("stable-diffusion", "sdxl"))
    check_choice("build_miniature.prediction", prediction, ("epsilon", "velocity"))
    check_range("build_miniature.width", float(width), low=float(NORM_GROUPS))
    if width % NORM_GROUPS:
        raise ValueError(f"build_miniature.width must be a multiple of {NORM_GROUPS}, got {width}.")
    transformers_logging.disable_progress_bar()
    with atomic_folder(Path(folder)) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the layers draw from the global generator, which is put back afterwards
        pipe: Any = _sdxl(width, prediction) if family == "sdxl" else _stable_diffusion(width, prediction)
        pipe.save_pretrained(temporary, safe_serialization=True)
    return Path(folder)


def build_tokenizer(size: int = 0) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that knows a few whole words; any other text falls apart into bytes, none is unknown.

    Args: size: Entries of its vocabulary at least: those that are missing are words that no text falls into.
    """
    bytes_ = sorted(_byte_letters())
    merges: list[tuple[str, str]] = []
    vocabulary = [*bytes_, *(letter + "</w>" for letter in bytes_)]
    for word in WORDS:
        parts = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # what the merges so far leave apart is joined from the left
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary += [f"unused{number}" for number in range(size - len(vocabulary) - 2)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TOKENS)  # type: ignore[arg-type]  # takes pairs, too


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: again and again join the pair whose merge was learnt first."""
    while pairs := [(merges.index(pair), i) for i, pair in enumerate(pairwise(parts)) if pair in merges]:
        _, i = min(pairs)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in byte-level BPE: themselves where printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte) for byte in sorted(printable)] + [chr(0x100 + i) for i in range(256 - len(printable))]


def text_config(tokenizer: CLIPTokenizer, width: int, **changes: Any) -> CLIPTextConfig:
    """A two-layer CLIP text encoder that knows ``tokenizer``'s special tokens."""
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _stable_diffusion(width: int, prediction: str) -> StableDiffusionPipeline:
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=HEADS,
        norm_num_groups=NORM_GROUPS,
        use_linear_projection=prediction == "velocity",  # as SD 2
    )
    scheduler: Any
    if prediction == "epsilon":
        scheduler = PNDMScheduler(**SD_NOISE, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        scheduler = DDIMScheduler(**SD_NOISE, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False)
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(text_config(tokenizer, width)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(width: int, prediction: str) -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    time_dim = 8
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * width,  # both text encoders side by side
        attention_head_dim=(HEADS, 2 * HEADS),
        norm_num_groups=NORM_GROUPS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=6 * time_dim + width,
    )
    kind = "v_prediction" if prediction == "velocity" else "epsilon"
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(text_config(tokenizer, width)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, width, hidden_act="gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SD_NOISE, prediction_type=kind, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
