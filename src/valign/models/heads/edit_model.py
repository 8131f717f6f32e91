"""The editing model: which words of a prompt must change, and which harmless words may stand in their place. Pure tensors.

One encoder, the lower layers of all-MiniLM-L6-v2 and upper layers of its own, read in two ways:

* *tags*: the prompt as it is; per word "keep", "delete" or "replace, for it is of category c";
* *fill*: the prompt with ``[MASK]`` for each word to be replaced, and behind a separator the words that stood there, so that number
  and tense can be taken over; per mask a distribution over a closed vocabulary of harmless words.

``tags = W_t h + b_t``; ``fill = E_v gelu(W_f h + b_f) + b_v`` with the encoder's own word embeddings ``E_v``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from valign.checks import UserError
from valign.files import atomic_path, hash_file
from valign.models.encoders.minilm import EPS, LAYERS, WIDTH, MiniLM, Tokens, Weights, quick_weights, run_layers
from valign.models.files.finite import check_finite
from valign.models.heads.ngrams import bag_of

FORMAT = 2
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
KEEP, DELETE, REPLACE = 0, 1, 2  # columns of the tags; from REPLACE on one per category
MOSTLY = 0.85  # share of the probability of a change from which a word is deleted: a gap reads worse than another word
MASK, BORDER = "[MASK]", "[SEP]"
MASKED = re.compile(re.escape(MASK))


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What is needed to read the tensors; stored in the file."""

    categories: tuple[str, ...]
    vocabulary: tuple[str, ...]  # words that may be filled in, each one token
    encoder_sha256: str
    tuned_layers: int
    judge_buckets: int
    judge_limit: float  # probability of harm from which the judge rejects a rewrite
    notes: Mapping[str, Any] = field(default_factory=dict)  # data, seeds, measured figures: what the card says


@dataclass(frozen=True)
class WordTag:
    """One word of a prompt."""

    start: int  # in characters
    end: int
    change: float  # probability that it must change, in [0, 1]
    delete: bool  # rather than replaced
    category: str  # of the harm, the most probable one


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of every word, in characters, without the ending of a possessive."""
    return [
        (start, end - 2 if text[end - 2 : end] in ("'s", "’s") else end) for start, end in map(re.Match.span, WORD.finditer(text))
    ]


def words_of(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


def without(prompt: str, places: Sequence[int]) -> str:
    """The prompt without these words, by number."""
    spans = word_spans(prompt)
    text, last = "", 0
    for place in sorted(places):
        text += prompt[last : spans[place][0]]
        last = spans[place][1]
    return " ".join((text + prompt[last:]).split())


def form(word: str) -> str:
    """An English word's form by its ending: "ing", "ed", "ly", "s" or ""; a word that is too short has none."""
    return next((ending for ending in ("ing", "ed", "ly", "s") if word.endswith(ending) and len(word) > len(ending) + 2), "")


@dataclass(frozen=True)
class EditModel:
    """Settings and tensors."""

    settings: EditSettings
    # upper.*, tag.weight [2 + category, 384], tag.bias, fill.weight [384, 384], fill.bias, words.bias [word],
    # judge.weight [bucket], judge.bias [], words.vectors [word, 384]: what the encoder makes of each word of the vocabulary
    weights: Mapping[str, Tensor]
    sha256: str = ""  # of the file that it was read from

    @torch.inference_mode()
    def tags(self, encoder: MiniLM, prompt: str, *, quick: bool = True) -> list[WordTag]:
        """One per word of the prompt, in order. A long prompt is read in windows; the highest probability counts."""
        words = word_spans(prompt)
        found: list[Tensor | None] = [None] * len(words)
        for tokens, places in encoder.with_places(prompt):
            scores = tag_logits(self.weights, self.states(encoder, tokens, quick=quick)).softmax(-1)[0]
            for word, pieces in pieces_of(words, places).items():
                best = scores[max(pieces, key=lambda piece: float(-scores[piece, KEEP]))]
                known = found[word]
                found[word] = best if known is None or best[KEEP] < known[KEEP] else known
        return [self._tag(span, scores) for span, scores in zip(words, found)]

    def _tag(self, span: tuple[int, int], scores: Tensor | None) -> WordTag:
        if scores is None:  # a word of signs that the tokenizer leaves out
            return WordTag(*span, 0.0, False, self.settings.categories[0])
        category = self.settings.categories[int(scores[REPLACE:].argmax())]
        return WordTag(*span, 1.0 - float(scores[KEEP]), bool(scores[DELETE] > MOSTLY * (1.0 - scores[KEEP])), category)

    @torch.inference_mode()
    def fill(self, encoder: MiniLM, text: str, instead: Sequence[str], *, quick: bool = True) -> Float[Tensor, "mask word"]:
        """Log-probabilities of the vocabulary's words for each ``[MASK]`` of the text that the encoder reads.

        Args: instead: The words that stood there.
        """
        tokens = encoder.tokenize([fill_input(text, instead)])
        first = Tokens(tokens.ids[:1], tokens.mask[:1], (0,))
        states = self.states(encoder, first, quick=quick)[0]
        masks = states[first.ids[0] == encoder.id_of(MASK)]
        return self.fill_logits(encoder, masks).log_softmax(-1)

    def states(self, encoder: MiniLM, tokens: Tokens, *, quick: bool) -> Float[Tensor, "window token dim"]:
        first = LAYERS - self.settings.tuned_layers
        lower = encoder.lower(tokens, first, quick=quick)
        return run_layers(lower, tokens.mask, self._quick if quick else self._upper, range(first, LAYERS))

    def fill_logits(self, encoder: MiniLM, states: Float[Tensor, "mask dim"]) -> Float[Tensor, "mask word"]:
        if not self._embeddings:
            self._embeddings.append(encoder.embeddings(self.settings.vocabulary))
        return fill_logits(self.weights, states, self._embeddings[0])

    @property
    def word_vectors(self) -> Float[Tensor, "word dim"]:
        """Unit vectors of the vocabulary's words."""
        return self.weights["words.vectors"]

    @cached_property
    def _embeddings(self) -> list[Float[Tensor, "word dim"]]:
        """Input embeddings of the vocabulary, once looked up: the same from any encoder that this model may be used with."""
        return []

    def harm(self, texts: Sequence[str]) -> list[float]:
        """The judge's probability that a text is harmful: logistic regression on hashed n-grams. It knows nothing of the rest."""
        logits = judge_logits(self.weights["judge.weight"], self.weights["judge.bias"], texts)
        return [float(value) for value in logits.sigmoid()]

    @cached_property
    def _upper(self) -> Weights:
        return {name.removeprefix("upper."): tensor for name, tensor in self.weights.items() if name.startswith("upper.")}

    @cached_property
    def _quick(self) -> Weights:
        return quick_weights(self._upper)


def fill_input(text: str, instead: Sequence[str]) -> str:
    return f"{text} {BORDER} {' '.join(instead)}" if instead else text


def pieces_of(words: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """For each word, by number, the tokens that lie in it; words without any are left out.

    Args: places: Start and end in characters of every token; equal for those that stand for no text.
    """
    found: dict[int, list[int]] = {}
    word = 0
    for piece, (start, end) in enumerate(places):
        if start == end:
            continue
        while word < len(words) and words[word][1] <= start:
            word += 1
        if word < len(words) and words[word][0] < end:
            found.setdefault(word, []).append(piece)
    return found


def tag_logits(weights: Mapping[str, Tensor], states: Float[Tensor, "... dim"]) -> Float[Tensor, "... tag"]:
    return linear(states, weights["tag.weight"], weights["tag.bias"])


def fill_logits(
    weights: Mapping[str, Tensor], states: Float[Tensor, "mask dim"], embeddings: Float[Tensor, "word dim"]
) -> Float[Tensor, "mask word"]:
    hidden = layer_norm(gelu(linear(states, weights["fill.weight"], weights["fill.bias"])), (WIDTH,), eps=EPS)
    return hidden @ embeddings.T + weights["words.bias"]


def judge_logits(weight: Float[Tensor, " bucket"], bias: Float[Tensor, ""], texts: Sequence[str]) -> Float[Tensor, " text"]:
    """``b + sum of the weights of the text's n-grams / sqrt(their number)``."""
    grams, starts = bag_of(texts, len(weight))
    owner = torch.zeros(len(grams), dtype=torch.long)
    owner[starts[1:]] = 1
    owner = owner.cumsum(0)
    sums = torch.zeros(len(texts)).index_add_(0, owner, weight[grams])
    counts = torch.bincount(owner, minlength=len(texts)).clamp(min=1)
    return bias + sums / counts.sqrt()


def save_edit_model(model: EditModel, path: Path) -> str:
    """Write safetensors in half precision, settings in the header; returns the file's SHA-256."""
    tensors = {name: tensor.half().contiguous() for name, tensor in sorted(model.weights.items())}
    with atomic_path(path) as temporary:
        settings = {"format": FORMAT} | asdict(model.settings)
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings, sort_keys=True)})  # several keys have no order
    return hash_file(path)


def load_edit_model(path: Path) -> EditModel:
    """Read what `save_edit_model` wrote, as float32. Raises: UserError if the file is missing, broken or another one."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Train an editing model with `valign guard fit-rewriter`.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        raw = json.loads(metadata.get("settings", "{}"))
        if (version := raw.pop("format", None)) != FORMAT:
            raise UserError(f"{path} must be an editing model of format {FORMAT}, got {version}. Train it again.")
        settings = EditSettings(**raw | {name: tuple(raw[name]) for name in ("categories", "vocabulary")})
        shapes = (
            weights["tag.weight"].shape[0],
            weights["words.bias"].shape[0],
            weights["judge.weight"].shape[0],
            len(weights["words.vectors"]),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} could not be read as an editing model: {error}. Train it again.") from error
    if shapes != (REPLACE + len(settings.categories), words := len(settings.vocabulary), settings.judge_buckets, words):
        raise UserError(f"{path} has tensors that do not fit its settings. Train it again.")
    check_finite(path, weights)
    return EditModel(settings, weights, hash_file(path))
