"""The trained head: a score per policy category from a sentence vector and n-grams. Pure tensors, and its file on disk.

``x = [mean, attended, bag]``, ``h = gelu(W1 x + b1)``, ``logits = W2 h + b2``; column 0 is "any harm", the others are the
categories. ``mean`` is the sentence vector of all-MiniLM-L6-v2; the upper layers of the encoder may be the head's own (tuned), the
lower ones are shared. ``attended`` are means that queries of the head's own weigh, so that few harmful words are not lost in a long
harmless prompt.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import embedding_bag, gelu, linear, normalize

from valign.checks import UserError
from valign.files import atomic_path, hash_file
from valign.models.encoders.minilm import LAYERS, WIDTH, MiniLM, Tokens, Weights, pool, quick_weights, run_layers
from valign.models.files.finite import check_finite
from valign.models.heads.ngrams import bag_of

FORMAT = 1
ANY = "any"  # name of column 0
ATTEND = "attend.weight"  # the queries' tensor; heads on a frozen encoder have none


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What is needed to read the tensors; stored in the file."""

    categories: tuple[str, ...]
    encoder_sha256: str
    buckets: int = 16384
    tuned_layers: int = 0  # upper layers that are the head's own, 0 to 6
    hidden_words: tuple[str, ...] = ()  # words that the head never sees: block rules decide about them (`neutral`)
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # strictness -> column -> probability
    # "found" and "passed" -> category -> probability from which a prompt could be of it, for block rules; none: any found one could
    suspicion: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)  # data, seeds, measured figures: what the card says

    @property
    def columns(self) -> tuple[str, ...]:
        return (ANY, *self.categories)

    @cached_property
    def _hidden(self) -> re.Pattern[str] | None:
        words = sorted(self.hidden_words, key=lambda word: (-len(word), word))
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE) if words else None

    def neutral(self, text: str) -> str:
        """The text with every hidden word as "person", so that the head can neither trust nor distrust it."""
        return self._hidden.sub("person", text) if self._hidden else text


@dataclass(frozen=True)
class Head:
    """Settings and tensors; ``[text, column]`` probabilities out, NaN where a logit is not finite."""

    settings: HeadSettings
    # ngrams.weight [bucket, d], attend.weight [q, 384] or none, hidden.weight [h, 384 (1 + q) + d], hidden.bias, out.*, upper.*
    weights: Mapping[str, Tensor]
    sha256: str = ""  # of the file that it was read from

    @torch.inference_mode()
    def score(self, encoder: MiniLM, texts: Sequence[str], *, quick: bool = True) -> Float[np.ndarray, "text column"]:
        """Probabilities in [0, 1]. A long text has several windows; the highest score counts. ``quick``: in 8 bits if possible."""
        out = np.zeros((len(texts), len(self.settings.columns)), np.float32)
        seen = [self.settings.neutral(text) for text in texts]
        for tokens in encoder.batches(seen):
            lower = encoder.lower(tokens, LAYERS - self.settings.tuned_layers, quick=quick)
            logits = self.logits(self.vectors(lower, tokens, quick=quick), [seen[number] for number in tokens.owner])
            np.maximum.at(out, list(tokens.owner), logits.where(logits.isfinite(), nan).sigmoid().numpy())  # NaN is kept
        return out

    def vectors(
        self, lower: Float[Tensor, "window token dim"], tokens: Tokens, *, quick: bool = True
    ) -> Float[Tensor, "window vector"]:
        """`sentence_vectors` from the shared lower layers' states, through the head's own upper layers."""
        hidden = run_layers(
            lower, tokens.mask, self._quick if quick else self._upper, range(LAYERS - self.settings.tuned_layers, LAYERS)
        )
        return sentence_vectors(hidden, tokens.mask, self.weights)

    @cached_property
    def _upper(self) -> Weights:
        return {name.removeprefix("upper."): tensor for name, tensor in self.weights.items() if name.startswith("upper.")}

    @cached_property
    def _quick(self) -> Weights:
        return quick_weights(self._upper)

    def logits(self, vectors: Float[Tensor, "window vector"], texts: Sequence[str]) -> Float[Tensor, "window column"]:
        return head_logits(self.weights, vectors, *bag_of(texts, self.settings.buckets))


def sentence_vectors(
    hidden: Float[Tensor, "window token dim"], mask: Bool[Tensor, "window token"], weights: Mapping[str, Tensor]
) -> Float[Tensor, "window vector"]:
    """The mean over the tokens, and one mean per query that is weighted by ``softmax(query . token)``; each of unit length."""
    mean = pool(hidden, mask)
    if ATTEND not in weights:
        return mean
    votes = (hidden @ weights[ATTEND].T).masked_fill(~mask[..., None], -inf).softmax(dim=1)
    return torch.cat([mean, normalize(votes.transpose(1, 2) @ hidden, dim=-1).flatten(1)], dim=1)


def head_logits(
    weights: Mapping[str, Tensor], vectors: Float[Tensor, "text vector"], grams: Tensor, starts: Tensor
) -> Float[Tensor, "text column"]:
    """The formula of the module, before the sigmoid."""
    bag = embedding_bag(grams, weights["ngrams.weight"], starts, mode="mean")
    hidden = gelu(linear(torch.cat([vectors, bag], dim=1), weights["hidden.weight"], weights["hidden.bias"]))
    return linear(hidden, weights["out.weight"], weights["out.bias"])


def as_saved(head: Head) -> Head:
    """The head as `load_head` will give it back, its weights rounded to half precision; thresholds belong to these."""
    return replace(head, weights={name: tensor.half().float() for name, tensor in head.weights.items()})


def average(heads: Sequence[Head]) -> Head:
    """The mean of heads weight by weight, a model soup (Wortsman et al. 2022, arXiv 2203.05482): as cheap as one of them.

    Settings are the first one's, without thresholds; its notes say in ``averaged`` how the others were fitted otherwise.

    Raises: UserError unless the heads have the same encoder, columns and shapes, and were fitted from one seed: means of networks
        with different starts are not meaningful.
    """
    first = heads[0]
    for other in heads[1:]:
        for name, ours, theirs in (
            ("encoder", first.settings.encoder_sha256, other.settings.encoder_sha256),
            ("columns", first.settings.columns, other.settings.columns),
            ("hidden words", first.settings.hidden_words, other.settings.hidden_words),
            ("shapes", _shapes(first.weights), _shapes(other.weights)),
            ("left-out sources", first.settings.notes.get("left_out"), other.settings.notes.get("left_out")),
            ("seed", _config(first).get("seed"), _config(other).get("seed")),
        ):
            if ours != theirs:
                raise UserError(f"average.heads must have the same {name}, got others. Give heads of fits with the same settings.")
    weights = {name: torch.stack([head.weights[name] for head in heads]).mean(0) for name in first.weights}
    notes = dict(first.settings.notes)
    if len(heads) > 1:
        notes["averaged"] = [
            {name: value for name, value in _made(head).items() if value != _made(first).get(name)} for head in heads[1:]
        ]
    return Head(replace(first.settings, thresholds={}, notes=notes), weights)


def _config(head: Head) -> Mapping[str, Any]:
    found: Mapping[str, Any] = head.settings.notes.get("config", {})
    return found


def _made(head: Head) -> Mapping[str, Any]:
    """How it was fitted, on how many rows of which source, and of which heads it is the mean."""
    notes = head.settings.notes
    return {**_config(head), **{name: notes[name] for name in ("trained_on", "averaged") if name in notes}}


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def save_head(head: Head, path: Path) -> str:
    """Write safetensors in half precision, settings in the header; returns the file's SHA-256."""
    tensors = {name: tensor.half().contiguous() for name, tensor in sorted(head.weights.items())}
    with atomic_path(path) as temporary:
        save_file(
            tensors, temporary, metadata={"format": str(FORMAT), "settings": json.dumps(asdict(head.settings), sort_keys=True)}
        )
    return hash_file(path)


def load_head(path: Path) -> Head:
    """Read what `save_head` wrote, as float32. Raises: UserError if the file is missing, broken or not a head."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist. Train a head with `valign guard fit`, or leave `learned` out of the policy's stages."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("format") != str(FORMAT):
            raise UserError(f"{path} must be a guard head of format {FORMAT}, got {metadata.get('format')}. Train it again.")
        raw = json.loads(metadata["settings"])
        settings = HeadSettings(**raw | {name: tuple(raw[name]) for name in ("categories", "hidden_words")})
        shapes = _shapes(weights)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} could not be read as a guard head: {error}. Train it again.") from error
    check_finite(path, weights)
    if not all(isfinite(limit) for limits in settings.thresholds.values() for limit in limits.values()):
        raise UserError(f"{path}: its thresholds must be finite, got NaN or infinity. Run `valign guard calibrate`.")
    inputs = WIDTH * (1 + shapes.get(ATTEND, (0,))[0]) + shapes["ngrams.weight"][1]
    expected = (settings.buckets, len(settings.columns), inputs)
    if (shapes["ngrams.weight"][0], shapes["out.weight"][0], shapes["hidden.weight"][1]) != expected:
        raise UserError(f"{path} has tensors that do not fit its settings. Train it again.")
    return Head(settings, weights, hash_file(path))
