"""A CLIP tokenizer learnt on the world's captions, and quick token batches for training."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from valign.worlds.shapes.grammar import training_example

VOCABULARY = 2000
MAX_TOKENS = 56
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path, *, seed: int = 0, captions: int = 20_000) -> CLIPTokenizer:
    """Learn byte-level BPE merges in CLIP's layout (`vocab.json`, `merges.txt`), so that any text can be encoded."""
    rng = np.random.default_rng([seed, 5])
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(_captions(rng, captions), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merged = ["".join(pair) for pair in learnt["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *merged, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in learnt["merges"]) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Int[Tensor, "batch token"]:
    """Token ids, padded and cut to the model's length."""
    return tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def _pattern():  # CLIP's own words: letters, single digits, runs of other signs
    from tokenizers import Regex

    return Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


def _captions(rng: np.random.Generator, count: int) -> Iterable[str]:
    for _ in range(count):
        yield training_example(rng)[1](rng).lower()
