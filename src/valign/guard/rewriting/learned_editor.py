"""Rewriting by small changes, learned: the words that carry the harm are replaced by harmless ones, all others stay.

The editing model (`valign.models.heads.edit_model`) says which words must change and what fits in their place; words of the
policy's own counterparts are preferred. Every try changes more words than the one before.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.guard.rewriting.changes import Change, changed, proposed
from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.edit_model import MASK, EditModel, WordTag, form, word_spans
from valign.policy import Policy
from valign.text import WordList, clean, fold
from valign.text.function_words import FUNCTION_WORDS

SHIPPED_EDITS = Path(__file__).parent / "assets" / "rewriter.safetensors"
SURE = (0.8, 0.4, 0.1)  # probability from which a word is changed, per try
MOST_CHANGED = 0.6  # share of the content words that may be changed
FORMS = ("", "ing", "ed", "ly", "s")
ONE_BY_ONE = 3  # words that are filled in one after the other; the rest at once
OTHER_FORM = (
    4.0  # taken from the log-probability of words of another form than the one that stood there ("-ing", "-ed", "-ly", "-s")
)
PREFERRED = 1.0  # added to the log-probability of the words of the policy's counterparts


class LearnedEditor:
    """Proposes at most `len(SURE)` captions that differ in as few words as possible.

    Args:
        model: Trained by ``valign guard fit-rewriter``.
        encoder: The one that the model was trained on.
        policy: Its harmless counterparts are preferred, its listed terms never left standing.
    Raises: UserError if the model was trained on another encoder.
    """

    name = "learned"
    uses_chat = False
    tries = len(SURE)

    def __init__(self, model: EditModel, encoder: MiniLM, policy: Policy) -> None:
        if model.settings.encoder_sha256 != encoder.sha256:
            raise UserError("LearnedEditor.model was trained on another encoder. Train it again, or install the encoder it names.")
        self.model, self.encoder = model, encoder
        self._numbers = {word: number for number, word in enumerate(model.settings.vocabulary)}
        self._forms = torch.tensor([FORMS.index(form(word)) for word in model.settings.vocabulary])
        self._listed = WordList(
            [term for one in policy.categories for term in one.terms]
            + [term for one in policy.categories for concept in one.concepts for term in concept.terms]
        )
        self._preferred = {category.id: self._counterparts(policy, category.id) for category in policy.categories}

    def propose(self, request: RewriteRequest, attempt: int) -> str | None:
        if request.role != "harm" or attempt >= self.tries:
            return None
        return proposed(request, lambda text: self.changes(text, attempt))

    def changes(self, text: str, attempt: int) -> list[Change]:
        """What that try would change; nothing where no further word can be."""
        tags = self.model.tags(self.encoder, text)
        chosen = self.chosen(text, tags, SURE[attempt])
        if attempt and chosen == self.chosen(text, tags, SURE[attempt - 1]):
            chosen = self._one_more(text, tags, chosen)
        return self._changes(text, tags, chosen)

    def harmless(self, text: str) -> bool:
        """What the independent judge says."""
        return self.model.harm([clean(text)])[0] < self.model.settings.judge_limit

    def chosen(self, prompt: str, tags: Sequence[WordTag], sure: float) -> tuple[int, ...]:
        """The words to be changed, by number: those above ``sure``, at least one, and the words of listed terms."""
        content = [place for place, tag in enumerate(tags) if fold(prompt[tag.start : tag.end]) not in FUNCTION_WORDS]
        if not content:
            return ()
        ranked = sorted(content, key=lambda place: -tags[place].change)
        most = max(1, round(len(content) * MOST_CHANGED))
        above = [place for place in ranked if tags[place].change >= sure] or ranked[:1]
        return tuple(sorted({*above[:most], *(place for place in content if self._is_listed(prompt, tags[place]))}))

    def _one_more(self, prompt: str, tags: Sequence[WordTag], chosen: Sequence[int]) -> tuple[int, ...]:
        others = [
            place
            for place, tag in enumerate(tags)
            if place not in chosen and fold(prompt[tag.start : tag.end]) not in FUNCTION_WORDS
        ]
        more = max(others, key=lambda place: tags[place].change, default=None)
        return () if more is None else tuple(sorted((*chosen, more)))

    def _is_listed(self, prompt: str, tag: WordTag) -> bool:
        return self._listed.any(fold(prompt[tag.start : tag.end]))

    def _changes(self, text: str, tags: Sequence[WordTag], chosen: Sequence[int]) -> list[Change]:
        """Those words deleted or replaced."""
        deleted = [(tags[place].start, tags[place].end, "") for place in chosen if tags[place].delete]
        fills = [tags[place] for place in chosen if not tags[place].delete]
        taken = {fold(text[start:end]) for start, end in word_spans(text)}
        words: dict[int, str] = {}
        while len(words) < len(fills):
            open_ = [number for number in range(len(fills)) if number not in words]
            known = [(fills[number].start, fills[number].end, words.get(number, MASK)) for number in range(len(fills))]
            hints = [text[fills[number].start : fills[number].end] for number in open_]
            scores = self._scores(changed(text, [*deleted, *known]), hints, [fills[number].category for number in open_], taken)
            if scores is None:  # beyond what the encoder reads
                words |= dict.fromkeys(open_, "")
                break
            best = scores.max(dim=1)
            for row in [int(best.values.argmax())] if len(words) < ONE_BY_ONE else range(len(scores)):
                word = self.model.settings.vocabulary[int(best.indices[row])]
                taken.add(word)
                words[open_[row]] = word.capitalize() if hints[row][:1].isupper() else word
            words |= dict.fromkeys(open_[len(scores) :], "")
        return [*deleted, *((tag.start, tag.end, words[number]) for number, tag in enumerate(fills))]

    def _scores(
        self, text: str, hints: Sequence[str], categories: Sequence[str], taken: set[str]
    ) -> Float[Tensor, "mask word"] | None:
        scores = self.model.fill(self.encoder, text, hints).clone()  # an inference tensor must not be changed
        if not len(scores):
            return None
        for row, category, hint in zip(scores, categories, hints):
            row[self._forms != FORMS.index(form(fold(hint)))] -= OTHER_FORM
            row[self._preferred.get(category, torch.zeros(0, dtype=torch.long))] += PREFERRED
        scores[:, [self._numbers[word] for word in taken if word in self._numbers]] = -torch.inf
        return scores

    def _counterparts(self, policy: Policy, id: str) -> Tensor:
        category = policy.category(id)
        texts = [category.safe_prompt, *(concept.safe for concept in category.concepts)]
        words = {word for text in texts for word in fold(text).split()}
        return torch.tensor(sorted(self._numbers[word] for word in words if word in self._numbers), dtype=torch.long)
