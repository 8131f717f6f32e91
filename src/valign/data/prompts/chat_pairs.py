"""Unsafe prompts and their safe counterparts from a chat model (the recipe of CoProV2, AlignGuard, arXiv 2412.10493, section 3).

Two requests, worded by the policy: one for unsafe captions of a concept, one that rewrites each of them with as little change as
possible. Names, concepts and captions go out as JSON data inside the request, and the only answer taken is
``{"prompts": [...]}`` of the right length. Every answer taken is written to a journal, so a kill loses none.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from valign.checks import UserError, check_range
from valign.data.journal import Journal
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import LabelledPrompt, PromptPair, file_names
from valign.data.prompts.readers import clean_pairs
from valign.data.prompts.tables import text_cell
from valign.files import hash_value
from valign.interfaces import Chat
from valign.methods import Method
from valign.policy import Category, Concept, Policy
from valign.progress import track

METHOD = Method(
    slug="coprov2-twins",
    title="Unsafe prompts and safe counterparts from a chat model (CoProV2)",
    paper="arXiv 2412.10493",
    room="data",
    entry="valign.data.prompts.chat_pairs:PairWriter",
    fidelity="variant",
    note="the paper's two requests in the policy's own words and for any chat model, with checks of form and repeats",
)
FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)


@dataclass
class PairWriter:
    """Asks, checks, retries and remembers."""

    chat: Chat
    policy: Policy
    journal: Journal
    tries: int = 3  # answers to one request before it is given up
    per_request: int = 10  # prompts asked for at once; short lists are answered more reliably
    patience: int = 3  # requests given up one after the other before the model is
    counts: Counter[str] = field(
        default_factory=Counter
    )  # "requests", "from_journal", "unusable_answers", "failed_requests", drops
    _failed_in_a_row: int = 0

    def __post_init__(self) -> None:
        for name in ("tries", "per_request", "patience"):
            check_range(f"PairWriter.{name}", getattr(self, name), low=1)

    def from_concepts(
        self, categories: Sequence[str], per_concept: int | None = None, *, per_category: int | None = None
    ) -> list[PromptPair]:
        """Pairs for every concept of the categories that is not held out. A model that repeats itself or declines gives fewer.

        Args:
            per_concept: Pairs asked for; None is the policy's number, or less if ``per_category`` needs less.
        Raises: UserError if the endpoint fails, or its answers are of no use.
        """
        jobs: list[tuple[Category, Concept, int]] = []
        for category in map(self.policy.category, categories):
            concepts = [concept for concept in category.concepts if not concept.held_out]
            enough = -(-per_category // max(len(concepts), 1)) if per_category else self.policy.data.per_concept
            jobs += [(category, concept, per_concept or min(self.policy.data.per_concept, enough)) for concept in concepts]
        pairs: list[PromptPair] = []
        for category, concept, wanted in track(jobs, "ask for safe prompts"):
            unsafe = self._unsafe(category, concept, wanted)
            safe = self._safe(category, concept, unsafe)
            pairs += [
                PromptPair(f"{category.id}-{concept.id}-{number:04d}", before, after, (category.id,), concept.id)
                for number, (before, after) in enumerate(zip(unsafe, safe, strict=True))
                if after
            ]
        return self._cleaned(pairs)

    def from_prompts(self, rows: Sequence[LabelledPrompt]) -> list[PromptPair]:
        """A safe counterpart for every unsafe row (label 1); rows of label 0 are passed over. Order and ids are the rows' own.

        Raises: UserError as `from_concepts`; if no row is unsafe; if an unsafe row has no category.
        """
        unsafe = [row for row in rows if row.label == 1]
        nameless = [row.id for row in unsafe if not row.categories]
        if not unsafe or nameless:
            found = f"{len(nameless)} without, first {nameless[0]}" if nameless else "no unsafe prompt"
            raise UserError(f"PairWriter.rows must be unsafe prompts with a category, got {found}. Fill category=NAME, or label=1.")
        chunks: list[list[LabelledPrompt]] = []
        for row in sorted(unsafe, key=lambda row: row.categories[0]):  # one request speaks of one category
            if not chunks or len(chunks[-1]) == self.per_request or chunks[-1][0].categories[0] != row.categories[0]:
                chunks.append([])
            chunks[-1].append(row)
        paired: dict[str, str] = {}
        for chunk in track(chunks, "ask for safe prompts"):
            category = self.policy.category(chunk[0].categories[0])
            concept = Concept(id="any", name=category.title, safe=category.safe_prompt)
            safe = self._safe(category, concept, [row.prompt for row in chunk])
            paired |= {row.id: text for row, text in zip(chunk, safe, strict=True) if text}
        names = file_names(row.id for row in unsafe)
        pairs = [
            PromptPair(names[row.id], row.prompt, paired[row.id], row.categories, kind=row.kind or "explicit")
            for row in unsafe
            if row.id in paired
        ]
        return self._cleaned(pairs)

    def _cleaned(self, pairs: list[PromptPair]) -> list[PromptPair]:
        kept, dropped = clean_pairs(pairs)
        self.counts.update(dropped)
        if not kept:
            raise UserError(
                f"The chat model gave no usable pair ({self.counts['unusable_answers']} unusable answers). Try another model, "
                "or change the wording under `data:` in the policy."
            )
        return kept

    def _unsafe(self, category: Category, concept: Concept, wanted: int) -> list[str]:
        found: dict[str, str] = {}
        for turn in range(2 * -(-wanted // self.per_request)):  # twice the requests needed, for a model that repeats itself
            count = min(self.per_request, wanted - len(found))
            if count <= 0:
                break
            request = self.policy.data.unsafe_request(category, concept, count)
            for prompt in self._ask(request, f"{category.id}/{concept.id}/{turn}", None) or []:
                found.setdefault(fold(prompt), prompt)
        return list(found.values())[:wanted]

    def _safe(self, category: Category, concept: Concept, unsafe: Sequence[str]) -> list[str]:
        """The safe counterpart of each prompt, ``""`` where the model gave none."""
        found: list[str] = []
        for start in range(0, len(unsafe), self.per_request):
            chunk = unsafe[start : start + self.per_request]
            request = self.policy.data.safe_request(category, concept, chunk)
            found += self._ask(request, f"{category.id}/{concept.id}/safe", len(chunk)) or [""] * len(chunk)
        return found

    def _ask(self, request: str, label: str, length: int | None) -> list[str] | None:
        """The prompts answered, from the journal if it has them; None when every try was of no use."""
        key = hash_value([request, label])
        if key in self.journal.entries:
            self.counts["from_journal"] += 1
            return list(self.journal.entries[key]["prompts"])
        problem = ""
        for _ in range(self.tries):
            try:
                self.counts["requests"] += 1
                prompts = parse_prompts(self.chat.complete([{"role": "user", "content": request}]), length)
            except UserError:
                raise  # the endpoint itself failed, after its own retries
            except OSError as error:
                raise UserError(
                    f"The chat endpoint failed: {error}. Start it or check its address; answers so far are kept."
                ) from error
            except ValueError as error:
                problem = str(error)
                self.counts["unusable_answers"] += 1
            else:
                self.journal.add({"key": key, "label": label, "prompts": prompts})
                self._failed_in_a_row = 0
                return prompts
        self.counts["failed_requests"] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.patience:
            many = self.tries * self.patience
            raise UserError(
                f"The chat model must answer with JSON prompts, got {many} unusable answers in a row; the last: {problem}. "
                "Try another model; answers so far are kept and the same command goes on from there."
            )
        return None


def parse_prompts(answer: str, length: int | None = None) -> list[str]:
    """The texts of ``{"prompts": [...]}``, stripped. One code fence around the whole answer is let through; nothing else is.

    Raises: ValueError if the answer is not such an object, a text is blank, or there are not ``length`` of them. The message never
    quotes the answer, which may be offensive.
    """
    fenced = FENCE.fullmatch(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(value, dict) or set(value) != {"prompts"} or not isinstance(value["prompts"], list):
        raise ValueError('it is not an object of the form {"prompts": [...]}')
    prompts = value["prompts"]
    try:
        blank = not prompts or not all(text_cell("prompt", prompt).strip() for prompt in prompts)
    except UserError:
        blank = True
    if blank:
        raise ValueError("its prompts are not all texts")
    if length is not None and len(prompts) != length:
        raise ValueError(f"it holds {len(prompts)} prompts instead of {length}")
    return [" ".join(prompt.split()) for prompt in prompts]
