"""Where prompt pairs come from: a grammar, a file, or a chat model. Each says what shapes its pairs, and then makes them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from valign.checks import UserError
from valign.data.journal import Journal
from valign.data.prompts.chat_pairs import PairWriter
from valign.data.prompts.pairs import PromptPair
from valign.data.prompts.readers import clean_pairs, scan_pairs, scan_prompts
from valign.data.prompts.records import Columns
from valign.data.prompts.tables import TableReading
from valign.files import hash_file, hash_value
from valign.interfaces import Chat
from valign.policy import Policy

FOUND = "found.jsonl"  # of a run of attacks: prompts that succeeded, beside safe ones


@runtime_checkable
class PromptGrammar(Protocol):
    """Makes pairs of one category without a chat model."""

    def pairs(self, category: str, count: int, seed: int) -> list[PromptPair]: ...


@dataclass(frozen=True)
class PromptSet:
    """Pairs from a source, and its counts of what was dropped or asked."""

    pairs: list[PromptPair]
    counts: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Makes pairs for the categories of a policy."""

    def describe(self) -> dict[str, Any]:
        """Everything that shapes the pairs besides the policy; JSON-able, kept in ``run.json``."""
        ...

    def collect(self, policy: Policy, categories: Sequence[str], count: int | None, seed: int, folder: Path) -> PromptSet:
        """About ``count`` pairs a category (None: as many as there are). ``folder`` may hold a journal."""
        ...


@dataclass(frozen=True)
class GrammarSource:
    """Any object with ``pairs(category, count, seed)``."""

    grammar: PromptGrammar

    def describe(self) -> dict[str, Any]:
        return {"source": "grammar", "grammar": type(self.grammar).__qualname__}

    def collect(self, policy: Policy, categories: Sequence[str], count: int | None, seed: int, folder: Path) -> PromptSet:
        if count is None:
            raise UserError("DataConfig.pairs_per_category must be a number for a grammar, which has no end; got None.")
        pairs, dropped = clean_pairs([pair for category in categories for pair in self.grammar.pairs(category, count, seed)])
        return PromptSet(pairs, dropped)


@dataclass(frozen=True)
class FileSource:
    """Pairs from a file of any layout that `scan_pairs` reads."""

    path: Path
    fmt: str | None = None
    columns: Columns = field(default_factory=Columns)
    fill: Mapping[str, object] = field(default_factory=dict)
    missing_twin: str = "refuse"

    def describe(self) -> dict[str, Any]:
        reading = {"fmt": self.fmt, "columns": asdict(self.columns), "fill": dict(self.fill), "missing_twin": self.missing_twin}
        return {"source": "file", "file": hash_file(_existing(self.path)), **reading}

    def collect(self, policy: Policy, categories: Sequence[str], count: int | None, seed: int, folder: Path) -> PromptSet:
        found = scan_pairs(
            self.path,
            self.fmt,
            reading=TableReading(columns=self.columns.renamed(), fill=self.fill),
            known=policy.category_ids(),
            missing_twin=self.missing_twin,
        )
        wanted = [pair for pair in found.pairs if set(pair.categories) & set(categories)]
        return PromptSet(pick_pairs(wanted, categories, count, seed), found.dropped)


@dataclass(frozen=True)
class AttackSource:
    """What attacks found (runs of ``valign attack``), each prompt with the same scene without harm; and those of another source.

    All that was found is taken; ``count`` is for the other source.
    """

    runs: tuple[Path, ...]
    rest: Source | None = None

    def describe(self) -> dict[str, Any]:
        files = [hash_file(_existing(run / FOUND)) for run in self.runs]
        return {"source": "attacks", "files": files, "rest": self.rest.describe() if self.rest else None}

    def collect(self, policy: Policy, categories: Sequence[str], count: int | None, seed: int, folder: Path) -> PromptSet:
        pairs: list[PromptPair] = []
        dropped: Counter[str] = Counter()
        for number, run in enumerate(self.runs, start=1):
            file = _existing(run / FOUND)
            if not file.read_bytes().strip():
                dropped["runs_that_found_nothing"] += 1
                continue
            found = scan_pairs(file, known=policy.category_ids())
            own = [pair for pair in found.pairs if set(pair.categories) & set(categories)]
            pairs += [replace(pair, id=f"attack{number}-{pair.id}") for pair in own]
            dropped.update(found.dropped)
        if self.rest is not None:
            more = self.rest.collect(policy, categories, count, seed, folder)
            pairs += more.pairs
            dropped.update(more.counts)
        kept, twice = clean_pairs(pairs)
        return PromptSet(kept, dropped + twice)


@dataclass(frozen=True)
class ChatSource:
    """Pairs from a chat model: for the policy's concepts, or for the unsafe prompts of a file."""

    chat: Chat
    name: str  # of the chat model, for the record
    prompts: Path | None = None  # unsafe prompts; None: the model writes them
    fmt: str | None = None
    columns: Columns = field(default_factory=Columns)
    fill: Mapping[str, object] = field(default_factory=dict)
    per_concept: int | None = None  # None: the policy's number, or what the pairs of a category ask for, if that is less

    def describe(self) -> dict[str, Any]:
        file = hash_file(_existing(self.prompts)) if self.prompts else None
        reading = {"fmt": self.fmt, "columns": asdict(self.columns), "fill": dict(self.fill)} if file else {}
        return {"source": "chat", "chat": self.name, "file": file, "per_concept": self.per_concept, **reading}

    def collect(self, policy: Policy, categories: Sequence[str], count: int | None, seed: int, folder: Path) -> PromptSet:
        writer = PairWriter(self.chat, policy, Journal(folder / "journal.jsonl"))
        if self.prompts is None:
            pairs = writer.from_concepts(categories, self.per_concept, per_category=count)
            return PromptSet(pick_pairs(pairs, categories, count, seed), writer.counts)
        reading = TableReading(columns=self.columns.renamed(), fill=self.fill)
        read = scan_prompts(self.prompts, self.fmt, reading=reading, known=policy.category_ids())
        rows = [row for row in read.rows if row.label == 1 and (not row.categories or set(row.categories) & set(categories))]
        chosen = pick_pairs(
            [PromptPair(f"r{at}", row.prompt, "", row.categories) for at, row in enumerate(rows)], categories, count, seed
        )
        return PromptSet(writer.from_prompts([rows[int(pair.id[1:])] for pair in chosen]), writer.counts)


def pick_pairs(pairs: Sequence[PromptPair], categories: Sequence[str], count: int | None, seed: int) -> list[PromptPair]:
    """At least ``count`` pairs of each category where there are so many, as few as that takes, in their order.

    Pairs are taken in the order of a seeded hash while one of their categories still lacks some. None takes all.
    """
    if count is None:
        return list(pairs)
    lacking = dict.fromkeys(categories, count)
    chosen: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: hash_value([seed, pair.id])):
        if any(lacking.get(category, 0) > 0 for category in pair.categories):
            chosen.add(pair.id)
            for category in pair.categories:
                lacking[category] = lacking.get(category, 0) - 1
    return [pair for pair in pairs if pair.id in chosen]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} must be a file of prompts, got {'a folder' if path.is_dir() else 'nothing there'}. Check the path."
        )
    return path
