"""Teach the text encoder what captions mean, before any image: read every place's glyph and colour, background and style.

Stable Diffusion starts from a text encoder that knows the language already; this is the world's counterpart, in minutes. It never
learns which glyphs form a group: what a probe finds of a held-out word's category is then the prompts' doing.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from valign.worlds.shapes.build.clip import WIDTH, text_config
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.build.oracle import labels
from valign.worlds.shapes.build.tokenizer import tokenize
from valign.worlds.shapes.grammar import training_example
from valign.worlds.shapes.renderer import BACKGROUNDS, COLOURS, PLACES, STYLES
from valign.worlds.shapes.vocabulary import GLYPHS

BUDGET = Budget(steps=1500, batch=96, lr=1e-3)


class CaptionReader(nn.Module):
    """The text encoder with linear heads on the end token's state; only the encoder is kept."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = CLIPTextModel(text_config(tokenizer))
        sizes = {"glyph": len(PLACES) * (len(GLYPHS) + 1), "colour": len(PLACES) * len(COLOURS)}
        sizes |= {"background": len(BACKGROUNDS), "style": len(STYLES)}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        state = self.text(ids).pooler_output
        read = {name: head(state) for name, head in self.heads.items()}
        return {
            name: value.unflatten(1, (len(PLACES), -1)) if name in ("glyph", "colour") else value for name, value in read.items()
        }


def train_text(logs: Path, tokenizer: CLIPTokenizer, *, seed: int = 0, budget: Budget = BUDGET) -> CLIPTextModel:
    """Train on captions alone. What a caption leaves open is guessed; its loss has a floor, which does no harm."""
    torch.manual_seed(seed)
    net = CaptionReader(tokenizer)

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, 14, step])
        scenes, words = zip(*(training_example(rng) for _ in range(budget.batch)))
        read, truth = net(tokenize(tokenizer, [say(rng) for say in words])), labels(list(scenes))
        seen = truth["colour"] >= 0
        parts = {
            "glyph": F.cross_entropy(read["glyph"].flatten(0, 1), truth["glyph"].flatten()),
            "colour": F.cross_entropy(read["colour"][seen], truth["colour"][seen]),
            "background": F.cross_entropy(read["background"], truth["background"]),
            "style": F.cross_entropy(read["style"], truth["style"]),
        }
        return {"loss": 3 * parts["glyph"] + parts["colour"] + parts["background"] + parts["style"], **parts}

    fit(net, loss, budget, logs, "text")
    return net.text
