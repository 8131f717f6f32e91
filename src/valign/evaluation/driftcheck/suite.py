"""The suite of DRIFTCHECK (arXiv 2508.02079) from local files in their public formats: safe prompts from MMLU's questions, unsafe
ones from HH-RLHF's first human turns, HateCheck's hateful cases and OpenAI's moderation set.

Unsafe prompts get one of six categories by their words, duplicates go, and every category has the same share, the rest drawn from
what is left, all shuffled by one seed.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from valign.checks import UserError, check_range
from valign.data.prompts.overlap import fold
from valign.data.prompts.readers import scan_prompts
from valign.data.prompts.tables import read_records, text_cell
from valign.evaluation.suite import EvalPrompt, Suite
from valign.methods import Method

METHOD = Method(
    slug="driftcheck",
    title="DRIFTCHECK: refusals of unsafe and of safe prompts before and after fine-tuning",
    paper="arXiv 2508.02079",
    room="evaluation",
    entry="valign.evaluation.driftcheck.suite:build_suite",
    fidelity="variant",
    note="built as a re-implementation describes it, as paper and prompts could not be had; categories by words of ours",
)
SIZE, SEED = 5000, 42  # prompts of either sort, as published
WORDS = {  # whole words or their beginnings (*), of a category; the first category that matches counts
    "explicit": ("sex*", "porn*", "nude*", "naked", "erotic*", "masturbat*", "fetish*"),
    "hate_speech": (
        "hate*",
        "racist*",
        "racis*",
        "slur*",
        "immigrant*",
        "muslim*",
        "jew*",
        "black people",
        "gay*",
        "trans people",
        "women are",
    ),
    "privacy": ("address of", "phone number*", "password*", "social security", "personal information", "stalk*", "spy on", "dox*"),
    "disinformation": ("conspirac*", "hoax*", "fake news", "misinformation", "vaccine*", "rigged", "flat earth", "propaganda"),
    "illegal_activity": (
        "steal*",
        "drug*",
        "cocaine",
        "meth",
        "heroin",
        "hack*",
        "counterfeit*",
        "launder*",
        "shoplift*",
        "illegal*",
        "fraud*",
    ),
    "violence": (
        "kill*",
        "murder*",
        "bomb*",
        "weapon*",
        "gun*",
        "shoot*",
        "stab*",
        "attack*",
        "poison*",
        "hurt*",
        "fight*",
        "beat*",
    ),
}
CATEGORIES = tuple(sorted(WORDS))
SOURCES = ("mmlu", "hh-rlhf", "hatecheck", "openai-moderation")
OWN = {"hate": "hate_speech", "harassment": "hate_speech", "sexual": "explicit", "violence": "violence", "self-harm": "violence"}
HUMAN = re.compile(r"\s*Human:(.*?)(?=\n\nAssistant:|\Z)", re.DOTALL)


def build_suite(files: Mapping[str, Sequence[Path]], *, size: int = SIZE, seed: int = SEED) -> Suite:
    """The suite, ``size`` prompts of either sort at most.

    Args: files: By name in `SOURCES`; MMLU and one of the others are needed.
    Raises: UserError for an unknown source, a file of another format, or where no prompt of a sort is found.
    """
    check_range("build_suite.size", size, low=1)
    unknown = sorted(set(files) - set(SOURCES))
    if unknown:
        raise UserError(f"Sources must be of {', '.join(SOURCES)}, got {', '.join(unknown)}.")
    draws = random.Random(seed)
    safe = _distinct((text, "") for path in files.get("mmlu", ()) for text in mmlu_questions(path))
    unsafe = _distinct(row for name in SOURCES[1:] for path in files.get(name, ()) for row in UNSAFE[name](path))
    for name, found, wanted in (("safe", safe, "mmlu"), ("unsafe", unsafe, " or ".join(SOURCES[1:]))):
        if not found:
            raise UserError(f"The suite must hold {name} prompts, got none. Name files of {wanted}.")
    texts = sorted(safe)
    draws.shuffle(texts)
    chosen = stratified(unsafe, size, draws)
    prompts = [EvalPrompt(f"safe-{place:04d}", text) for place, text in enumerate(texts[:size])]
    prompts += [EvalPrompt(f"unsafe-{place:04d}", text, category, "explicit") for place, (text, category) in enumerate(chosen)]
    return Suite("driftcheck", tuple(prompts))


def stratified(rows: Mapping[str, str], size: int, draws: random.Random) -> list[tuple[str, str]]:
    """``size`` texts with their categories: ``size // categories`` of each, the rest from the shuffled others.

    Args: rows: Text -> category.
    """
    by: dict[str, list[str]] = {}
    for text in sorted(rows):
        by.setdefault(rows[text], []).append(text)
    share, chosen, left = size // max(len(by), 1), [], []
    for category in sorted(by):
        draws.shuffle(by[category])
        chosen += [(text, category) for text in by[category][:share]]
        left += [(text, category) for text in by[category][share:]]
    draws.shuffle(left)
    return chosen + left[: size - len(chosen)]


def category_of(text: str) -> str | None:
    """The category of an unsafe prompt by its words; None if it has none of them."""
    folded = fold(text)
    return next((name for name, pattern in PATTERNS.items() if pattern.search(folded)), None)


def mmlu_questions(path: Path) -> Iterator[str]:
    """Questions of MMLU: a table with a column ``question``."""
    return (text_cell("question", row["question"]) for _, row in read_records(path, ["question"]))


def hh_rlhf_turns(path: Path) -> Iterator[tuple[str, str]]:
    """First human turns of HH-RLHF with their categories; those without a telling word are left out, for most are harmless."""
    for where, row in read_records(path, ["chosen"]):
        found = HUMAN.match(text_cell("chosen", row["chosen"]))
        if found is None:
            raise UserError(f"{where}: chosen must begin with a turn of 'Human:', got none. Take the released files.")
        if (category := category_of(found[1])) is not None:
            yield found[1].strip(), category


def _labelled(path: Path) -> Iterator[tuple[str, str]]:
    """Unsafe rows of a table with labels; a category by words, or else the set's own."""
    for row in scan_prompts(path).rows:
        category = category_of(row.prompt) or next((OWN[name] for name in row.categories if name in OWN), None)
        if row.label and category:
            yield row.prompt, category


def _hatecheck(path: Path) -> Iterator[tuple[str, str]]:
    """All hateful cases are hate speech, whatever their words."""
    return ((row.prompt, "hate_speech") for row in scan_prompts(path).rows if row.label)


def _distinct(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Text on one line -> category, the first of equal texts; empty ones are left out."""
    found: dict[str, tuple[str, str]] = {}
    for text, category in rows:
        line = " ".join(text.split())
        if line:
            found.setdefault(fold(line), (line, category))
    return dict(found.values())


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(re.escape(word).replace(r"\*", r"\w*") for word in words) + r")(?!\w)")


PATTERNS = {name: _pattern(words) for name, words in WORDS.items()}
UNSAFE = {"hh-rlhf": hh_rlhf_turns, "hatecheck": _hatecheck, "openai-moderation": _labelled}
