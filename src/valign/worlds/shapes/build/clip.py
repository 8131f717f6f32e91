"""Train the miniature CLIP on renders and captions; it scores how well an image fits its prompt."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from valign.worlds.shapes.build.examples import examples
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.build.tokenizer import MAX_TOKENS, tokenize
from valign.worlds.shapes.renderer import SIZE

BUDGET = Budget(steps=600, batch=96, lr=1e-3)
FURTHER = Budget(steps=200, batch=96, lr=1e-3, warmup=20)  # with an earlier version's vision side
WIDTH, LAYERS, HEADS = 128, 4, 4


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """The text transformer of the world, for CLIP and for the pipeline."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_clip(
    folder: Path,
    logs: Path,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    budget: Budget = BUDGET,
    start: Path | None = None,
) -> CLIPModel:
    """Contrastive training on fresh renders, text side started from ``text``; saved in half precision with its preprocessing.

    Args: start: An earlier version's CLIP, whose vision side goes on.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    clip = CLIPModel(CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))

    clip.text_model.load_state_dict(text.state_dict())
    if start is not None:
        earlier = CLIPModel.from_pretrained(start).float()
        clip.vision_model.load_state_dict(earlier.vision_model.state_dict())
        clip.visual_projection.load_state_dict(earlier.visual_projection.state_dict())

    def loss(step: int) -> dict[str, Tensor]:
        first = step * budget.batch
        _, words, images = examples(seed + 10, range(first, first + budget.batch))
        rng = np.random.default_rng([seed, 6, step])
        ids = tokenize(tokenizer, [say(rng) for say in words])
        out = clip(input_ids=ids, pixel_values=images)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(50)))
        target = torch.arange(len(ids))
        total = (F.cross_entropy(out.logits_per_text, target) + F.cross_entropy(out.logits_per_image, target)) / 2
        return {"loss": total, "accuracy": (out.logits_per_text.argmax(1) == target).float().mean()}

    fit(clip, loss, budget, logs, "clip")
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return clip.float()
