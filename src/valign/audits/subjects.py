"""What the audit of concentration asks: a chat model, a checker of images, or a diffusion model's text encoder or U-Net."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from valign.audits.neurons import Activations
from valign.checks import UserError, check_choice
from valign.detectors.base import Detector, flagged
from valign.evaluation.images.measuring import is_blank
from valign.files import hash_value
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.models.language.chat import Message
from valign.models.language.generation import answer_chats, left_padded
from valign.models.language.loading import LoadedChat

Judge = Callable[[Sequence[Any], Sequence[str]], list[bool]]  # rows and their answers -> which were refused


def row_key(row: Any) -> str:
    """What tells one row from another: an image by its pixels, anything else by its text."""
    return hash_value(row.tobytes().hex()) if isinstance(row, Image) else str(row)


class ChatSubject:
    """Rows are chats that end with a user's turn; answers are greedy, and are not kept."""

    def __init__(
        self, chat: LoadedChat, judge: Judge, *, max_tokens: int = 48, batch_size: int = 128, messages: Any = None
    ) -> None:
        self.chat, self.judge, self.max_tokens, self.batch_size = chat, judge, max_tokens, batch_size
        self.network: nn.Module = chat.model
        self.messages: Callable[[Any], Sequence[Message]] = messages or (lambda row: row)

    def read(self, rows: Sequence[Any], activations: Activations) -> None:
        prompts = [self.chat.renderer.prompt(list(self.messages(row))) for row in rows]
        for first in range(0, len(prompts), self.batch_size):
            ids, mask = left_padded(prompts[first : first + self.batch_size], self.chat.model.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            activations.mask = mask
            self.chat.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

    def refused(self, rows: Sequence[Any]) -> list[bool]:
        answers = answer_chats(
            self.chat, [list(self.messages(row)) for row in rows], max_tokens=self.max_tokens, batch_size=self.batch_size
        )
        return self.judge(rows, [answer.text for answer in answers])


class CheckerSubject:
    """Rows are images; refused is flagged. ``network`` is the checker's own, which the detector calls."""

    def __init__(self, detector: Detector, network: nn.Module) -> None:
        self.detector, self.network = detector, network

    def read(self, rows: Sequence[Any], activations: Activations) -> None:
        activations.mask = None
        self.detector.detect(list(rows))

    def refused(self, rows: Sequence[Any]) -> list[bool]:
        return [bool(flag) for flag in flagged(self.detector.detect(list(rows)), self.detector.card)]


class DiffusionSubject:
    """Rows are prompts; refused is an image that the detector finds harmless. The network is the text encoder or the U-Net.

    The U-Net is read at one noisy latent per prompt, in the middle of the schedule.
    """

    def __init__(
        self,
        model: DiffusionModel,
        detector: Detector,
        *,
        part: Literal["text-encoder", "unet"] = "unet",
        sampling: SamplingConfig = SamplingConfig(steps=12),
    ) -> None:
        check_choice("DiffusionSubject.part", part, ("text-encoder", "unet"))
        self.model, self.detector, self.part, self.sampling = model, detector, part, sampling
        self.network: nn.Module = model.denoiser if part == "unet" else model.text_encoders[0]
        self.network.eval()
        self._shows = False

    def read(self, rows: Sequence[Any], activations: Activations) -> None:
        size = self.sampling.batch_size
        for first in range(0, len(rows), size):
            part = list(rows[first : first + size])
            activations.mask = self._tokens(part) if self.part == "text-encoder" else None
            texts = self.model.encode_prompts(part)
            if self.part == "unet":
                noise = torch.Generator().manual_seed(self.sampling.seed + first)
                noisy = torch.randn(len(part), *self.model.latent_shape, generator=noise).to(self.model.device)
                middle = torch.full((len(part),), self.model.schedule.num_timesteps // 2, device=self.model.device)
                self.model.predict(noisy, middle, texts)

    def _tokens(self, prompts: list[str]) -> Tensor:
        """Which places hold tokens of the text: the rest is padding."""
        tokenizer, encoder = self.model.tokenizers[0], cast(Any, self.network)
        width = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        told = tokenizer(prompts, padding="max_length", max_length=width, truncation=True, return_tensors="pt")
        return cast(Tensor, told.attention_mask)

    def refused(self, rows: Sequence[Any]) -> list[bool]:
        """See `AuditSubject`. Raises: UserError if most of the first rows' images are blank: such a model refuses nothing."""
        images = self.model.generate(list(rows), sampling=self.sampling)
        blank = sum(map(is_blank, images))
        if not self._shows and 2 * blank > len(images):
            raise UserError(
                f"{self.model.folder} must generate images to be audited; {blank} of {len(images)} are blank. "
                "Load it in float32, or look at its images first."
            )
        self._shows = True  # a network of which much is silent may well show nothing
        return [not flag for flag in flagged(self.detector.detect(images), self.detector.card)]
