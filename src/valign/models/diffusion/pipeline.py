"""What Stable Diffusion 1, 2 and XL share: latents, the U-Net, the sampler. They differ in their text encoders."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from valign.checks import UserError
from valign.models.diffusion.animation import animate
from valign.models.diffusion.base import Conditioning, LatentDist
from valign.models.diffusion.network_pool import Group, NetworkPool
from valign.models.diffusion.sampling import generate
from valign.models.diffusion.schedule import DiscreteSchedule
from valign.models.diffusion.text_reader import TextReader
from valign.models.files.fingerprint import fingerprint_folder

TEXT_CHUNK = 64  # prompts per pass of a text encoder; bounds its memory
VAE_PIXELS = 2**19  # of all images that the autoencoder reads or makes at once: two of 512 x 512, one of 1024 x 1024


class PipelineModel:
    """A diffusers pipeline with a U-Net, a KL autoencoder and CLIP text encoders, as a `DiffusionModel`.

    The U-Net and the text encoders run in ``dtype``, the autoencoder in float32 (half precision overflows in SDXL's).
    """

    family = ""
    pipeline: Any = None  # the diffusers class
    networks: tuple[str, ...] = ()  # its parts with weights
    load_options: ClassVar[dict[str, Any]] = {}  # for the class
    components: Mapping[str, str] = {"denoiser": "unet.", "text_encoder": "text_encoder."}

    def __init__(self, pipe: Any, folder: str, pool: NetworkPool | None = None, *, vae_slice: int | None = None) -> None:
        """
        Args:
            pool: Where the networks are; all where the pipeline has them if left out.
            vae_slice: Images that the autoencoder reads or makes at once; as many as have `VAE_PIXELS` together if left out.
        """
        self.pipe = pipe
        self.folder = folder
        self.pool = pool or NetworkPool(pipe, next(pipe.unet.parameters()).device, self.groups())
        self._vae_slice = vae_slice
        self._reader = TextReader(pipe, self._tokens_read)
        self.schedule = DiscreteSchedule(pipe.scheduler.config, folder)
        if pipe.unet.config.get("time_cond_proj_dim") is not None:
            raise UserError(f"{folder} is a guidance-distilled model, which cannot be guided. Choose the model it was made from.")
        for name in self.networks:
            getattr(pipe, name).requires_grad_(False).eval()

    @classmethod
    def groups(cls) -> dict[Group, tuple[str, ...]]:
        """Names of the networks that work together, of which a phased or offloaded model has one group on the device at a time."""
        texts = tuple(name for name in cls.networks if name.startswith("text_encoder"))
        return {"text": texts, "vae": ("vae",), "denoiser": ("unet",)}

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self.pipe, name) for name in self.groups()["text"]]

    @property
    def tokenizers(self) -> list[Any]:
        return [self.pipe.tokenizer]

    @property
    def encoders(self) -> list[nn.Module]:
        """The autoencoder and the text encoders: all networks that a training from cached latents does not need. None where they
        come and go by themselves."""
        return [] if self.pool.mode != "resident" else [self.pipe.vae, *self.text_encoders]

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @denoiser.setter
    def denoiser(self, network: nn.Module) -> None:
        self.pipe.unet = network

    @property
    def text_width(self) -> int:
        return self.pipe.unet.config.cross_attention_dim

    @property
    def device(self) -> torch.device:
        return self.pool.device if self.pool.mode != "resident" else self._first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> Tensor:
        return next(self.pipe.unet.parameters())  # diffusers' own properties walk through all modules: milliseconds, every step

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.pipe.vae.config.latent_channels, height, width

    @cached_property
    def image_size(self) -> int:
        return self.latent_shape[-1] * self.pipe.vae_scale_factor

    def to(self, device: torch.device | str) -> None:
        """Move all networks to ``device``."""
        self.pool.to(torch.device(device))

    def checkpoint_gradients(self, on: bool) -> None:
        """Recompute the denoiser's activations in the backward pass, or keep them: less memory, or less time."""
        network = self.pipe.unet
        (network.enable_gradient_checkpointing if on else network.disable_gradient_checkpointing)()

    def encode_prompts(self, prompts: Sequence[str], *, length: int | None = None) -> Conditioning:
        """Text to U-Net input, as the diffusers pipeline does it; tokens beyond the 77th are cut off.

        The empty text is the model's unconditional branch, in guidance and in training alike. ``length`` pads and cuts to another
        number of tokens, at most the tokenizer's own, which it is when not given. Gradients flow to text encoders that train.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError("encode_prompts.prompts must be a list of at least one text, got a bare text or no text.")
        self.pool.need("text")
        chunks = [list(prompts[i : i + TEXT_CHUNK]) for i in range(0, len(prompts), TEXT_CHUNK)]
        trained = any(p.requires_grad for encoder in self.text_encoders for p in encoder.parameters())
        with nullcontext() if trained else torch.no_grad():
            return Conditioning.cat([self._encode_chunk(chunk, length) for chunk in chunks])

    def _encode_chunk(self, prompts: list[str], length: int | None) -> Conditioning:
        raise NotImplementedError  # abstract: each family encodes its own way

    def _tokens(self, tokenizer: Any, prompts: list[str], length: int | None = None) -> Any:
        prompts = self.pipe.maybe_convert_prompt(prompts, tokenizer)  # textual inversion: one word may stand for several vectors
        length = length or self._tokens_read(tokenizer)
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(self.device)

    def _tokens_read(self, tokenizer: Any) -> int:
        """Tokens that are read of a text: the encoders say, too, since tokenizers of converted checkpoints do not."""
        configs = [getattr(self.pipe, name).config for name in self.groups()["text"]]
        return int(min(tokenizer.model_max_length, *(config.max_position_embeddings for config in configs)))

    def text_read(self, prompts: Sequence[str]) -> list[str]:
        """The part of each prompt that the text encoder reads; the prompt itself where that is all."""
        return self._reader.text_read(prompts)

    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> LatentDist:
        """Posterior of the latents of images in [-1, 1]; float32 on the model's device."""
        self.pool.need("vae")
        with torch.no_grad():
            found = [self.pipe.vae.encode(part.to(self.device, self.pipe.vae.dtype)).latent_dist for part in self._slices(images)]
        scale, shift = self._latent_units
        mean, std = (torch.cat([getattr(part, name).float() for part in found]) for name in ("mean", "std"))
        return LatentDist((mean - shift) * scale, std * scale)

    def decode_latents(self, latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        """Latents in U-Net units to images, about [-1, 1] but not clipped."""
        self.pool.need("vae")
        scale, shift = self._latent_units
        latents = (latents.to(self.pipe.vae.dtype) / scale) + shift
        return torch.cat([self.pipe.vae.decode(part, return_dict=False)[0] for part in self._slices(latents)])

    def _slices(self, images: Float[Tensor, "batch channel height width"]) -> tuple[Tensor, ...]:
        """What the autoencoder takes at once, of images or of latents: its activations are the largest of all networks."""
        pixels = images.shape[-1] * images.shape[-2] * (1 if images.shape[1] == 3 else self.pipe.vae_scale_factor**2)
        return images.split(self._vae_slice or max(1, VAE_PIXELS // pixels))

    @property
    def _latent_units(self) -> tuple[Any, Any]:
        """``scale, shift``: numbers, or one value per channel where the autoencoder's config holds statistics; on `device`."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.scaling_factor, config.get("shift_factor") or 0.0
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (mean, std))
        return config.scaling_factor / std, mean

    def predict(
        self, noisy: Float[Tensor, "batch channel height width"], timesteps: Real[Tensor, "..."], conditioning: Conditioning
    ) -> Float[Tensor, "batch channel height width"]:
        """The U-Net's answer, in ``dtype``; one timestep per row or one for all. Gradients flow where the caller lets them."""
        self.pool.need("denoiser")
        return self.pipe.unet(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning.embeds,
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None

    generate = generate
    animate = animate

    def fingerprint(self) -> str:
        """SHA-256 over the folder's configurations and weights, hex; loaded adapters do not count. Read once, then kept."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_folder(Path(self.folder))
