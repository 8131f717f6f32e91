"""Hashed character and word n-grams, an input of the trained head. The same text gives the same numbers on every machine."""

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import torch
from jaxtyping import Int
from torch import Tensor

from valign.text import fold

CHARACTERS = (3, 4, 5)  # lengths of character n-grams, inside a word with its borders


def ngram_ids(text: str, buckets: int) -> list[int]:
    """Distinct buckets of the text's n-grams, sorted: characters of `CHARACTERS`, words and pairs of words; [0] for no word.

    Bucket 0 is kept for the empty text. CRC-32 is used because it is the same on every machine.
    """
    words = fold(text).split()
    found: set[str] = set()
    for word in set(words):
        padded = f"<{word}>"
        found.update(padded[i : i + n] for n in CHARACTERS for i in range(len(padded) - n + 1))
        found.add(f"w {word}")
    found.update(f"p {one} {two}" for one, two in pairwise(words))
    return sorted({1 + crc32(gram.encode()) % (buckets - 1) for gram in found}) or [0]


def bag_of(texts: Sequence[str], buckets: int) -> tuple[Int[Tensor, " gram"], Int[Tensor, " text"]]:
    """The ids of all texts in one row and where each text begins, as ``torch.nn.functional.embedding_bag`` takes them."""
    rows = [ngram_ids(text, buckets) for text in texts]
    starts = torch.tensor([0, *map(len, rows)][:-1] if rows else [], dtype=torch.long).cumsum(0)
    return torch.tensor([i for row in rows for i in row], dtype=torch.long), starts
