"""A suite: the prompts that every system answers, each with a fixed seed."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from valign.checks import UserError, check_choice
from valign.data.prompts.overlap import fold
from valign.data.prompts.pairs import FILE_NAME
from valign.files import hash_value

HARM_KINDS = ("explicit", "paraphrased", "implicit", "adversarial", "foreign", "crowded", "composed", "late", "styled")
BENIGN_KINDS = ("benign", "mentioned")  # a mentioned harm is named and not asked for: "a star without a bolt"
KINDS = HARM_KINDS + BENIGN_KINDS


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt. ``category`` is empty for a benign one; ``expected`` says what a right image of it shows
    (glyph, colour, place, background, style) and which glyph it does not (absent); ``counterpart`` is the glyph that an aligned
    image of an unsafe prompt shows in the harm's place; ``seed`` is None unless the prompt set fixes one."""

    id: str
    prompt: str
    category: str = ""
    kind: str = "benign"
    concept: str = ""
    held_out: bool = False
    expected: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    counterpart: str = ""

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.id):
            raise UserError(
                f"Prompt id must be letters, digits, dot, dash or underscore, got {self.id!r}. It names the image's file."
            )
        if not self.prompt.strip():
            raise UserError(f"Prompt {self.id} must hold a text, got {self.prompt!r}. Remove the row or write the prompt.")
        check_choice(f"Prompt {self.id}: kind", self.kind, KINDS)
        if self.benign != (self.category == ""):
            raise UserError(
                f"Prompt {self.id} must be benign exactly when it has no category, got {self.kind} and {self.category!r}."
            )
        if self.benign and self.counterpart:
            raise UserError(f"Prompt {self.id} is benign and must have no counterpart, got {self.counterpart!r}. Remove it.")

    @property
    def benign(self) -> bool:
        return self.kind in BENIGN_KINDS


@dataclass(frozen=True)
class Suite:
    """``stand_in`` says that its harms are neutral drawings, so that a report may show them without a veil."""

    name: str
    prompts: tuple[EvalPrompt, ...]
    stand_in: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise UserError(f"Suite {self.name} must hold at least one prompt, got 0.")
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise UserError(f"Suite {self.name} must have distinct ids, got {prompt.id} twice. Rename one of them.")
            seen.add(prompt.id)

    def __len__(self) -> int:
        return len(self.prompts)

    def categories(self) -> tuple[str, ...]:
        """Ids of the harm categories asked for, sorted."""
        return tuple(sorted({prompt.category for prompt in self.prompts if prompt.category}))

    def fingerprint(self) -> str:
        """SHA-256 over everything that shapes an image or its judgement, hex; the name does not count."""
        rows = [asdict(prompt) for prompt in self.prompts]
        return hash_value([{key: value for key, value in row.items() if key != "counterpart" or value} for row in rows])

    def seeds(self, seed: int) -> list[int]:
        """A seed per prompt: its own, or one drawn from ``seed`` and its id, so that no other prompt can move it."""
        return [prompt_seed(seed, prompt.id) if prompt.seed is None else prompt.seed for prompt in self.prompts]

    def take(self, limit: int | None, *, keep: Collection[str] | None = None) -> "Suite":
        """At most ``limit`` prompts in the suite's order: unsafe and benign as they are to each other, the unsafe ones of every
        category in turn, and those of a category, as the benign ones, of every kind in turn. Those of a kind are drawn by hash, as
        neighbours are often alike.

        Args: keep: Categories of which none may be dropped; all of the suite's for None.
        Raises: UserError for a limit that would drop one of them, or all benign prompts.
        """
        if limit is None or limit >= len(self):
            return self
        needed = [name for name in self.categories() if keep is None or name in keep]
        unsafe = [position for position, prompt in enumerate(self.prompts) if not prompt.benign]
        benign = [position for position, prompt in enumerate(self.prompts) if prompt.benign]
        fewest = max(len(needed), bool(unsafe)) + bool(benign)
        if limit < fewest:
            what = [f"one of each of {', '.join(needed)}"] * bool(needed) + ["a benign one"] * bool(benign)
            raise UserError(
                f"Suite {self.name} must keep at least {fewest} prompts, {' and '.join(what)}, got a limit of {limit}. Raise it."
            )
        harmless = min(len(benign), limit - max(len(needed), bool(unsafe)), max(1, round(limit * len(benign) / len(self))))
        kept = sorted(self._in_turn(unsafe, needed)[: limit - harmless] + self._in_turn(benign, ())[:harmless])
        return Suite(self.name, tuple(self.prompts[position] for position in kept), self.stand_in)

    def _in_turn(self, positions: Sequence[int], first: Sequence[str]) -> list[int]:
        """Positions, a category at a time and in it a kind at a time; in each turn those of ``first`` come first."""
        kinds: Counter[tuple[str, str, bool]] = Counter()
        turns: dict[str, list[tuple[int, int]]] = {}
        for position in sorted(positions, key=lambda position: prompt_seed(0, self.prompts[position].id)):
            prompt = self.prompts[position]
            group = (prompt.category, prompt.kind, prompt.held_out)
            turns.setdefault(prompt.category, []).append((kinds[group], position))
            kinds[group] += 1
        ranked = [
            (turn, name not in first, position) for name, own in turns.items() for turn, (_, position) in enumerate(sorted(own))
        ]
        return [position for _, _, position in sorted(ranked)]


def prompt_seed(seed: int, prompt_id: str) -> int:
    """31 bits of the SHA-256 of run seed and prompt id: the same on every machine, whatever else is in the suite."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:4], "big") >> 1


def overlap(suite: Suite, trained_on: Iterable[str]) -> list[EvalPrompt]:
    """The suite's prompts that were also trained on, whatever their case and spacing."""
    trained = {fold(text) for text in trained_on}
    return [prompt for prompt in suite.prompts if fold(prompt.prompt) in trained]


def refuse_overlap(suite: Suite, trained_on: Iterable[str]) -> None:
    """Raise UserError if a prompt of the suite was trained on: its score would not be evidence. Texts are not printed."""
    seen = overlap(suite, trained_on)
    if seen:
        named = ", ".join(prompt.id for prompt in seen[:5]) + (" ..." if len(seen) > 5 else "")
        raise UserError(
            f"Suite {suite.name} must not hold prompts that were trained on, got {len(seen)} of {len(suite)}: {named}. "
            "Remove them from the suite, or evaluate on another one."
        )
