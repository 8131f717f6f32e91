"""One number per chat about an image: a small LLaVA of a CLIP's vision tower and a chat model's layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaModel

from valign.models.encoders.clip import ClipEncoder
from valign.models.language.chat import Message
from valign.models.language.loading import LoadedChat
from valign.models.language.scalar import ScalarChat
from valign.randomness import generator_for


class ImageScalarChat(ScalarChat):
    """Scores ``(image, chat)``; the image's patches stand before the chat's first token.

    Its vision tower stays as it is, the projector and the language model train, as in Safe RLHF-V.
    """

    def scores(self, chats: Sequence[tuple[Image, Sequence[Message]]]) -> Float[Tensor, " chat"]:  # type: ignore[override]
        """The number at the last token of each chat."""
        model = self.model
        rows = [[model.image_token] * model.patches + self.renderer.chat(chat).ids for _, chat in chats]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        pixels = model.encoder.prepare([image for image, _ in chats])
        states = model.llava(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).last_hidden_state
        return model.score(states)[..., 0].float().gather(1, last[:, None])[:, 0]

    @torch.no_grad()
    def scored(self, chats: Sequence[tuple[Image, Sequence[Message]]], *, batch_size: int = 64) -> Float[Tensor, " chat"]:  # type: ignore[override]
        self.model.eval()
        parts = [self.scores(chats[first : first + batch_size]).cpu() for first in range(0, len(chats), batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def save(self, folder: Path) -> None:
        """The LLaVA model as transformers loads it; the head as ``score.safetensors``."""
        from safetensors.torch import save_file

        from valign.files import atomic_folder

        with atomic_folder(folder, force=True) as temporary:
            self.model.llava.save_pretrained(str(temporary))
            save_file({"score.weight": self.model.score.weight.detach().cpu().contiguous()}, temporary / "score.safetensors")
            self.renderer.tokenizer.save_pretrained(str(temporary))


class _ImageAnswerModel(nn.Module):
    """LLaVA's body and the head. ``encoder`` prepares pixels; its own weights are not among the parameters."""

    def __init__(self, llava: LlavaModel, encoder: ClipEncoder, image_token: int, patches: int) -> None:
        super().__init__()
        self.llava, self.image_token, self.patches = llava, image_token, patches
        self.score = nn.Linear(llava.config.get_text_config().hidden_size, 1, bias=False)
        object.__setattr__(self, "encoder", encoder)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def requires_grad_(self, requires_grad: bool = True) -> "_ImageAnswerModel":
        """Of all but the vision tower, which is never trained."""
        super().requires_grad_(requires_grad)
        self.llava.vision_tower.requires_grad_(False)
        return self


def new_image_scalar(chat: LoadedChat, encoder: ClipEncoder, *, seed: int) -> ImageScalarChat:
    """The layers of a Llama-like chat model, the vision tower of a CLIP, and a fresh projector and head."""
    text, vision = chat.model.config, encoder.model.config.vision_config
    vocabulary = int(text.vocab_size)
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config={**text.to_dict(), "vocab_size": vocabulary + 1},
        image_token_index=vocabulary,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # all patches, without the class token
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(generator_for("projector", seed).initial_seed())
        llava = LlavaModel(config)
        model = _ImageAnswerModel(llava, encoder, vocabulary, (vision.image_size // vision.patch_size) ** 2)
        nn.init.normal_(model.score.weight, std=0.02)
    _copy(encoder.model.vision_model.state_dict(), llava.vision_tower)
    known: dict[str, Any] = dict(chat.model.base_model.state_dict())
    grown = llava.language_model.state_dict()["embed_tokens.weight"].clone()
    grown[:vocabulary] = known["embed_tokens.weight"]
    llava.language_model.load_state_dict(known | {"embed_tokens.weight": grown})
    return ImageScalarChat(model.to(chat.model.device).eval().requires_grad_(True), chat.renderer)


def _copy(state: dict[str, Any], tower: nn.Module) -> None:
    """Into a vision tower, whether transformers nests it once more or not."""
    wanted = tower.state_dict()
    nested = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    tower.load_state_dict(nested if any(name.startswith("vision_model.") for name in wanted) else state)
