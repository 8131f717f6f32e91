"""The published sizes of models as folders of configurations without weights: what estimates and random models are made from."""

from pathlib import Path
from typing import Any

from valign.checks import check_choice
from valign.files import atomic_folder, write_json
from valign.models.diffusion.miniature import SD_NOISE, build_tokenizer

WORDS = 49_408  # of CLIP's vocabulary
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPENCLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD_UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# name -> pipeline class, networks, scheduler settings beside `SD_NOISE`
PUBLISHED: dict[str, tuple[str, dict[str, dict[str, Any]], dict[str, Any]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        {"unet": SD_UNET, "vae": {**VAE, "sample_size": 512, "scaling_factor": 0.18215}, "text_encoder": CLIP_L},
        {"skip_prk_steps": True},
    ),
    "sd21": (
        "StableDiffusionPipeline",
        {
            "unet": {
                **SD_UNET,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "vae": {**VAE, "sample_size": 768, "scaling_factor": 0.18215},
            "text_encoder": OPENCLIP_H,
        },
        {"skip_prk_steps": True, "prediction_type": "v_prediction"},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "unet": SDXL_UNET,
            "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
            "text_encoder": CLIP_L,
            "text_encoder_2": OPENCLIP_G,
        },
        {"skip_prk_steps": True},
    ),
}
TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def write_configs(name: str, folder: Path, *, sample_size: int | None = None) -> Path:
    """Write the configurations of a published size to the new ``folder`` and return it: a pipeline's folder but for the weights.

    Args:
        name: In `PUBLISHED`.
        sample_size: Of the latents, a side; the published one if left out.
    """
    check_choice("write_configs.name", name, PUBLISHED)
    pipeline, networks, scheduler = PUBLISHED[name]
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "PNDMScheduler"]}
    with atomic_folder(Path(folder)) as temporary:
        for part, config in networks.items():
            (temporary / part).mkdir()
            index[part] = ["transformers", TEXT_CLASSES[part]] if part in TEXT_CLASSES else ["diffusers", config["_class_name"]]
            if part in TEXT_CLASSES:
                config = {"architectures": [TEXT_CLASSES[part]], "model_type": "clip_text_model", "vocab_size": WORDS, **config}
                tokenizer = part.replace("text_encoder", "tokenizer")
                build_tokenizer(WORDS).save_pretrained(str(temporary / tokenizer))
                index[tokenizer] = ["transformers", "CLIPTokenizer"]
            elif part == "unet" and sample_size:
                config = {**config, "sample_size": sample_size}
            write_json(temporary / part / "config.json", config)
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", {"_class_name": "PNDMScheduler", **SD_NOISE, **scheduler})
        extra = {"force_zeros_for_empty_prompt": True} if "text_encoder_2" in networks else {}
        write_json(temporary / "model_index.json", {**index, **extra})
    return Path(folder)
