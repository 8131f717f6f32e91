"""A CLIP with random weights, and quadruples of coloured squares that it can learn in seconds."""

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from valign.data.images.quadruples import Quadruple, Quadruples
from valign.models.diffusion.miniature import build_tokenizer, text_config

PLACES = ("in", "on", "of", "with", "the", "and")
UNSAFE = {"hate": ("bolt", (200, 40, 160)), "violence": ("flame", (200, 40, 40))}  # category -> word and colour
SAFE = ("heart", (40, 40, 200))


def build_clip(folder, *, seed=0):
    """Write a CLIP of some ten thousand numbers for images of 32 pixels."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text_config(tokenizer, 16).to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def square(colour, number):
    """Of this colour, in one of four shades of grey around it, with noise of its own."""
    rng = np.random.default_rng(number)
    pixels = np.full((32, 32, 3), 60 * (number % 4), dtype=np.float64)
    pixels[8:24, 8:24] = colour
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def coloured_quadruples(each=12, *, start=0, images=True):
    """``each`` quadruples of two categories: what tells safe from unsafe is a word and a colour."""
    rows = []
    for category, (word, colour) in UNSAFE.items():
        for number in range(start, start + each):
            scene = f"{PLACES[number % 6]} {PLACES[number // 6 % 6]} photo {PLACES[(number + number // 6) % 6]}"
            pair = (square(SAFE[1], number), square(colour, number)) if images else (None, None)
            rows.append(Quadruple(f"{category}-{number}", f"{SAFE[0]} {scene}", f"{word} {scene}", category, *pair))
    return Quadruples(tuple(rows), "squares")
