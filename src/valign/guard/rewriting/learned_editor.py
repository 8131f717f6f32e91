"""Rewriting by small changes, learned: the words that carry the harm are replaced by harmless ones, all others stay.

The editing model (`valign.models.heads.edit_model`) says which words must change and what fits in their place; words of the
policy's own counterparts, and words that are near in meaning to those that stood there, are preferred. Where its first proposal is
refused, the guard itself is asked which words carry the harm (`valign.guard.rewriting.edit_search`), and several ways of changing
them are compared; of those that pass, the one that keeps most of the prompt's meaning comes first.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.guard.rewriting.caption import parse_caption, subject_of
from valign.guard.rewriting.changes import Change, changed, proposed, tidy
from valign.guard.rewriting.edit_search import Risks, carriers, content_words, droppable, part_of, parts_that_carry
from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.models.encoders.minilm import MiniLM, RememberingEncoder
from valign.models.heads.edit_model import MASK, EditModel, WordTag, form, word_spans, words_of
from valign.policy import Policy
from valign.text import WordList, clean, fold, views

SHIPPED_EDITS = Path(__file__).parent / "assets" / "rewriter.safetensors"
SURE = 0.8  # probability from which a word is changed in the first proposal
MOST_CHANGED = 0.6  # share of the content words that may be changed there
CAUTION = 0.15  # cosine to the request that a risk at the margin costs, against none
SEARCHED = 8  # proposals of the search, at most
BOTH = 2  # sets of words of the search that are filled in in two ways; larger ones in one
FORMS = ("", "ing", "ed", "ly", "s")
OTHER_FORM = (
    4.0  # taken from the log-probability of words of another form than the one that stood there ("-ing", "-ed", "-ly", "-s")
)
PREFERRED = 1.0  # added to the log-probability of the words of the policy's counterparts
NEAR = (8.0, 3.0, 0.0)  # added per unit of cosine to the word that stood there; the search has the first two


class LearnedEditor:
    """Proposes captions that differ in as few words as possible, at most `SEARCHED` and one per entry of `NEAR`.

    Args:
        model: Trained by ``valign guard fit-rewriter``.
        encoder: The one that the model was trained on.
        policy: Its harmless counterparts are preferred, its listed terms never left standing.
    Raises: UserError if the model was trained on another encoder.
    """

    name = "learned"
    uses_chat = False

    def __init__(self, model: EditModel, encoder: MiniLM, policy: Policy) -> None:
        if model.settings.encoder_sha256 != encoder.sha256:
            raise UserError("LearnedEditor.model was trained on another encoder. Train it again, or install the encoder it names.")
        self.model, self.encoder, self._margin = model, encoder, policy.guard.margin
        self._numbers = {word: number for number, word in enumerate(model.settings.vocabulary)}
        self._forms = torch.tensor([FORMS.index(form(word)) for word in model.settings.vocabulary])
        self._listed = WordList(
            [term for one in policy.categories for term in one.terms]
            + [term for one in policy.categories for concept in one.concepts for term in concept.terms]
        )
        self._preferred = {category.id: self._counterparts(policy, category.id) for category in policy.categories}

    def proposals(self, request: RewriteRequest) -> Iterator[str]:
        """The model's own proposal, then those of the search, each once. None for a broken norm or a sign."""
        if request.role != "harm":
            return
        seen, read = {fold(request.prompt)}, _PromptMemory(self.model, self.encoder)
        first, search = partial(self._first, read), partial(self._search, read, request.risks)
        for ways_of, most in ((first, len(NEAR)), (search, SEARCHED)):
            numbered = cache(ways_of)
            for number in range(most):
                text = proposed(request, partial(_way, numbered, number))
                if text is not None and fold(text) not in seen:
                    seen.add(fold(text))
                    yield text

    def _first(self, read: "_PromptMemory", text: str) -> list[list[Change]]:
        """What the model would change by itself, one way per entry of `NEAR`."""
        tags = read.tags(text)
        chosen = self.chosen(text, tags)
        kept = [place for place in chosen if not tags[place].delete]
        gone = [(tags[place].start, tags[place].end, "") for place in chosen if tags[place].delete]
        return [[*gone, *fills] for fills in self._fills(read, text, kept, gone, NEAR)]

    def _search(self, read: "_PromptMemory", risks: Risks, text: str) -> list[list[Change]]:
        """Ways of changing the text whose risk is below the margin, at most `SEARCHED`; those that keep most of its meaning at
        the least risk first."""
        tags, content, listed = read.tags(text), self._open(text), self.listed(text)
        must = [place for place in content if place in listed]
        ways: list[list[Change]] = []
        for number, words in enumerate(carriers(text, content, must, [tag.change for tag in tags], risks, self._margin)):
            ways += self._fills(read, text, words, [], NEAR[:2] if number < BOTH else NEAR[1:2])
            if number == 0:
                ways += self._cuts(read, text, words)
        if not ways and (parts := parts_that_carry(text, risks, self._margin)):
            ways = [[(*part, "") for part in parts]]
        texts = [tidy(changed(text, way)) for way in ways]
        safe = [(risk / self._margin, number) for number, risk in enumerate(risks(texts) if texts else []) if risk < self._margin]
        vectors = read.vectors.encode([clean(text), *(texts[number] for _, number in safe)])
        worth = [float(vector @ vectors[0]) - CAUTION * risk for vector, (risk, _) in zip(vectors[1:], safe)]
        ranked = sorted(zip(worth, (number for _, number in safe)), key=lambda one: (-one[0], one[1]))
        return [ways[number] for _, number in ranked[:SEARCHED]]

    def harmless(self, text: str) -> bool:
        """What the independent judge says."""
        return self.model.harm([clean(text)])[0] < self.model.settings.judge_limit

    def chosen(self, prompt: str, tags: Sequence[WordTag]) -> tuple[int, ...]:
        """The words to be changed, by number: those above `SURE`, at least one, and the words of listed terms."""
        content, listed = self._open(prompt), self.listed(prompt)
        if not content:
            return ()
        ranked = sorted(content, key=lambda place: -tags[place].change)
        most = max(1, round(len(content) * MOST_CHANGED))
        above = [place for place in ranked if tags[place].change >= SURE] or ranked[:1]
        return tuple(sorted({*above[:most], *(listed & set(content))}))

    def _open(self, prompt: str) -> list[int]:
        """Content words that may change: not who is shown, unless a list has the word."""
        subject, listed = subject_of(parse_caption(clean(prompt)).scene), self.listed(prompt)
        kept = fold(subject).split()[-1:] if subject else []
        words = words_of(prompt)
        return [word for word in content_words(prompt) if word in listed or fold(words[word]) not in kept]

    def listed(self, prompt: str) -> set[int]:
        """Words of listed terms, by number; all words of a phrase."""
        view = next(views(prompt))
        places = [view.span(start, end) for start, end, _ in self._listed.find(view.text)]
        words = word_spans(prompt)
        return {number for number, (start, end) in enumerate(words) if any(start < last and first < end for first, last in places)}

    def _cuts(self, read: "_PromptMemory", text: str, words: Sequence[int]) -> Iterator[list[Change]]:
        """The same words gone instead of replaced, where that leaves no gap: those that describe the next word, a whole part."""
        if dropped := droppable(text, words):
            others, tags = [word for word in words if word not in dropped], read.tags(text)
            gone = [(tags[word].start, tags[word].end, "") for word in dropped]
            yield from ([*gone, *fills] for fills in self._fills(read, text, others, gone, NEAR[:1]))
        if part := part_of(text, words):
            yield [(*part, "")]

    def _fills(
        self, read: "_PromptMemory", text: str, words: Sequence[int], gone: Sequence[Change], near: Sequence[float]
    ) -> Iterator[list[Change]]:
        """Those words replaced, one way per weight of nearness to the words that stood there. Args: gone: What else changes."""
        fills = [read.tags(text)[word] for word in words]
        if not fills:
            yield []
            return
        hints = [text[one.start : one.end] for one in fills]
        masked = changed(text, [*gone, *((one.start, one.end, MASK) for one in fills)])
        scores = self.model.fill(self.encoder, masked, hints).clone()  # an inference tensor must not be changed
        for row, one, hint in zip(scores, fills, hints):
            row[self._forms != FORMS.index(form(fold(hint)))] -= OTHER_FORM
            row[self._preferred.get(one.category, torch.zeros(0, dtype=torch.long))] += PREFERRED
        taken = [self._numbers[word] for word in map(fold, words_of(text)) if word in self._numbers]
        scores[:, taken] = -torch.inf
        cosines = torch.from_numpy(read.vectors.encode(hints[: len(scores)])) @ self.model.word_vectors.T
        for weight in near:
            picked = _distinct(scores + weight * cosines)
            found = [self.model.settings.vocabulary[number] for number in picked]
            found += [""] * (len(fills) - len(found))  # beyond what the encoder reads
            yield [
                (one.start, one.end, word.capitalize() if hint[:1].isupper() else word)
                for one, hint, word in zip(fills, hints, found)
            ]

    def _counterparts(self, policy: Policy, id: str) -> Tensor:
        category = policy.category(id)
        texts = [category.safe_prompt, *(concept.safe for concept in category.concepts)]
        words = {word for text in texts for word in fold(text).split()}
        return torch.tensor(sorted(self._numbers[word] for word in words if word in self._numbers), dtype=torch.long)


class _PromptMemory:
    """What the model and the encoder made of one prompt's texts and words, each once."""

    def __init__(self, model: EditModel, encoder: MiniLM) -> None:
        self.tags = cache(partial(model.tags, encoder))
        self.vectors = RememberingEncoder(encoder)


def _way(ways_of: Callable[[str], Sequence[list[Change]]], number: int, text: str) -> list[Change]:
    ways = ways_of(text)
    return ways[number] if number < len(ways) else []


def _distinct(scores: Float[Tensor, "mask word"]) -> list[int]:
    """A column per row, no column twice, the surest rows first."""
    scores, picked = scores.clone(), [0] * len(scores)
    for row in scores.amax(dim=1).argsort(descending=True).tolist():
        picked[row] = int(scores[row].argmax())
        scores[:, picked[row]] = -torch.inf
    return picked
