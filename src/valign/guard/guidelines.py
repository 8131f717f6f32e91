"""Guidelines for a request (Guide-Align, arXiv 2403.11838): the best 20 by a bi-encoder, those alike left out, the first 6 given.

The library is the policy's `guidelines`, written or approved by its author: no text of a user ever becomes one. Guidelines with
``requests`` are retrieved; those without stand before every request. `GuidedChat` puts them into the system message of any chat
model, so the guard's rewriter and value judge have them too.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from valign.checks import UserError, check_range
from valign.files import hash_value
from valign.methods import Method
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.bi_encoder import BiEncoder, HashedEncoder, load_bi_encoder
from valign.models.language.chat import ChatModel, Message, Schema
from valign.policy import Guideline, Policy
from valign.text import clean

METHOD = Method(
    slug="guide-align",
    title="Guide-Align: a library of guidelines, and a retriever that puts the right ones before a request",
    paper="arXiv 2403.11838",
    room="guard",
    entry="valign.guard.guidelines:GuidelineRetriever",
    fidelity="simplified",
    note="two matrices on frozen MiniLM in place of two BERTs; guidelines are for image requests; string ratio by difflib",
)
LOG = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "assets" / "guidelines.safetensors"  # fitted on the default policy's library
RETRIEVED, GIVEN, ALIKE = 20, 6, 0.5  # the authors'
MAX_CHARS = 1500  # of all guidelines before one request; the lowest-ranked are left out first


def diverse(texts: Sequence[str], count: int, *, alike: float = ALIKE) -> list[int]:
    """Numbers of the first ``count`` texts that resemble no text taken before; the first always, in order.

    Args: alike: String ratio from which two texts are alike, 0 or more; above 1 keeps all.
    """
    check_range("diverse.alike", alike, low=0.0)
    kept: list[int] = []
    for number, text in enumerate(texts):
        if len(kept) == count:
            break
        if not kept or not any(are_alike(text, texts[other], alike) for other in kept):
            kept.append(number)
    return kept


def are_alike(one: str, two: str, least: float) -> bool:
    """Whether `string_ratio` is ``least`` or more. Nearly always a bound on it tells, which costs a tenth.

    Matching blocks are a common subsequence, so the ratio is at most twice the longest one over both lengths.
    """
    total = len(one) + len(two)
    return not (total and 2 * common_length(two, one) < least * total) and string_ratio(one, two) >= least


def common_length(one: str, two: str) -> int:
    """Length of the longest common subsequence: a row of its table as the bits of a number (Hyyro 2004)."""
    places, every = _places(one), (1 << len(one)) - 1
    open_ = every
    for char in two:
        here = open_ & places.get(char, 0)
        open_ = ((open_ + here) | (open_ - here)) & every
    return len(one) - open_.bit_count()


@lru_cache(maxsize=16384)  # texts of a library come back with every request
def _places(text: str) -> dict[str, int]:
    """Where each character stands, as bits."""
    places: dict[str, int] = {}
    for place, char in enumerate(text):
        places[char] = places.get(char, 0) | 1 << place
    return places


@lru_cache(maxsize=65536)  # a library's pairs come back with every request
def string_ratio(one: str, two: str) -> float:
    """``2 M / (len(one) + len(two))`` with M the characters in difflib's matching blocks, in [0, 1]; no autojunk."""
    return SequenceMatcher(None, one, two, autojunk=False).ratio()


@dataclass(frozen=True)
class GuidelineRetriever:
    """The guidelines that fit a request.

    Args:
        guidelines: What is searched; each with a distinct id.
        model: Fitted by ``valign guidelines fit``.
        load: Gives the encoder that ``model`` was fitted on; called once, at the first request.
        count: Guidelines of a request, 1 or more.
        min_score: Dot product under which nothing is given; None gives the best whatever they score.
    Raises: UserError for no guidelines, a blank one, one that is longer than ``max_chars``, or an id used twice.
    """

    guidelines: tuple[Guideline, ...]
    model: BiEncoder
    load: Callable[[], HashedEncoder] = field(repr=False)
    count: int = GIVEN
    min_score: float | None = None
    max_chars: int = MAX_CHARS

    def __post_init__(self) -> None:
        check_range("GuidelineRetriever.count", float(self.count), low=1.0)
        ids = [one.id for one in self.guidelines]
        if not ids:
            raise UserError(
                "GuidelineRetriever.guidelines must not be empty, got none. Add guidelines with requests to the policy."
            )
        twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
        blank = [one.id for one in self.guidelines if not one.text.strip()]
        if twice or blank:
            what = f"the id {twice[0]!r} twice" if twice else f"no text under {blank[0]!r}"
            raise UserError(f"GuidelineRetriever.guidelines must have distinct ids and texts, got {what}. Rename or delete one.")
        longest = max(self.guidelines, key=lambda one: len(one.text))
        if len(longest.text) > self.max_chars:
            raise UserError(
                f"GuidelineRetriever.guidelines must have at most {self.max_chars} characters each, got {len(longest.text)} under "
                f"{longest.id!r}: it could never be given. Shorten it, or raise max_chars."
            )

    def retrieve(self, request: str) -> tuple[Guideline, ...]:
        """The guidelines for the request, the best first; none for a blank one."""
        if not clean(request):
            return ()
        return self.select(self.model.questions(self._encoder, [clean(request)])[0])

    def select(self, question: Float[np.ndarray, " dim"]) -> tuple[Guideline, ...]:
        """The guidelines for a request's vector: the best 20, those alike left out, the first ``count`` within ``max_chars``.

        Ties go to the guideline that comes first in the library. Those that do not fit are left out from the last, and logged.
        Raises: UserError for a vector that is not finite.
        """
        scores = self.rows @ question
        if not np.isfinite(scores).all():
            raise UserError("GuidelineRetriever.model gives a request a vector that is not finite. Fit it again.")
        top = min(RETRIEVED, len(scores))
        best = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
        ranked = best[np.argsort(-scores[best], kind="stable")][:top]
        if self.min_score is not None:
            ranked = ranked[scores[ranked] >= self.min_score]
        found = [self.guidelines[number] for number in ranked]
        given = [found[number] for number in diverse([one.text for one in found], self.count)]
        left_out: list[Guideline] = []
        while sum(len(one.text) for one in given) > self.max_chars:
            left_out.append(given.pop())
        if left_out:
            ids, of = ", ".join(one.id for one in reversed(left_out)), len(given) + len(left_out)
            LOG.warning("Left out %d of %d guidelines beyond %d characters: %s", len(left_out), of, self.max_chars, ids)
        return tuple(given)

    def fingerprint(self) -> str:
        """Of the texts and the fitted matrices."""
        rows = [float(np.abs(matrix).sum()) for matrix in (self.model.question_matrix, self.model.context_matrix)]
        return hash_value(["guidelines", [[one.id, one.text] for one in self.guidelines], rows, self.count, self.min_score])

    @cached_property
    def rows(self) -> Float[np.ndarray, "guideline dim"]:
        """One row per guideline. Raises: UserError if one is not finite."""
        found = self.model.contexts(self._encoder, [one.text for one in self.guidelines])
        if not np.isfinite(found).all():
            raise UserError("GuidelineRetriever.model gives vectors that are not finite. Fit it again.")
        return np.ascontiguousarray(found)

    @cached_property
    def _encoder(self) -> HashedEncoder:
        return self.load()


def policy_retriever(
    policy: Policy, *, model: BiEncoder | None = None, load: Callable[[], HashedEncoder] = MiniLM, count: int = GIVEN
) -> GuidelineRetriever | None:
    """A retriever over the policy's guidelines that have requests; None if it has none. ``model``: None is the shipped one."""
    library = tuple(one for one in policy.guidelines if one.requests)
    return GuidelineRetriever(library, model or load_bi_encoder(SHIPPED), load, count) if library else None


@dataclass(frozen=True)
class GuidedChat:
    """A chat model that gets the guidelines for the last user turn at the end of its system message.

    Guidelines come from the policy alone. A turn that is JSON with a ``caption``, as the guard's own questions are, is read by its
    caption; a turn without text, or for which nothing is retrieved, goes out unchanged.
    """

    chat: ChatModel
    retriever: GuidelineRetriever

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        return self.chat.complete(self.guided(messages), schema=schema)

    def guided(self, messages: list[Message]) -> list[Message]:
        """The messages with guidelines; the given ones stay as they are."""
        asked = next((one["content"] for one in reversed(messages) if one["role"] == "user"), "")
        found = self.retriever.retrieve(_request(asked)) if isinstance(asked, str) else ()
        if not found:
            return messages
        text = "Guidelines for this request:\n" + "\n".join(f"- {one.text}" for one in found)
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        return [{**messages[0], "content": f"{messages[0]['content']}\n{text}"}, *messages[1:]]


def _request(text: str) -> str:
    try:
        data: Any = json.loads(text)
    except ValueError:
        return text
    caption = data.get("caption") if isinstance(data, dict) else None
    return caption if isinstance(caption, str) else text
