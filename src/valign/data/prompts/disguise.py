"""Prompts as an attacker or a careless typist writes them: same meaning, so same label. Training rows beside the plain ones.

Each disguise is ``(words of the prompt, harmless words, random) -> words``. Harmless prompts get the same treatment, so that odd
spelling alone means nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from valign.checks import UserError, check_range
from valign.data.prompts.pairs import LabelledPrompt

LEET = str.maketrans("aeios", "@3105")
SHORT = 120  # characters of a harmless prompt that may keep another company


def misspelt(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Letters swapped, lost or doubled in about a third of the longer words, at least one."""

    def wrong(word: str) -> str:
        i = random.randrange(len(word) - 1)
        return random.choice(
            (word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:])
        )

    return _some(words, wrong, random)


def marked(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Signs inside words, or signs for letters."""

    def signed(word: str) -> str:
        i = random.randrange(1, len(word))
        return random.choice((word[:i] + random.choice(".-_* ") + word[i:], word.translate(LEET), ".".join(word)))

    return _some(words, signed, random)


def glued(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Neighbours without the space between them."""
    out = words[:1]
    for word in words[1:]:
        if random.random() < 0.3:
            out[-1] += word
        else:
            out.append(word)
    return out


def soup(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Out of order, with half of the little words lost and foreign words between, as optimized prompts look."""
    kept = [word for word in words if len(word) > 3 or random.random() < 0.5]
    kept += random.choices(pool, k=random.randint(0, len(words) // 2))
    random.shuffle(kept)
    return kept


def tailed(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """A suffix or prefix of words and pieces of words without sense."""
    tail = [word[: random.randint(2, 8)] for word in random.choices(pool, k=random.randint(3, 12))]
    return words + tail if random.random() < 0.6 else tail + words


def garbled(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Heavy misspelling: in every word of three letters or more, those behind the first are shuffled, or one is lost or added."""

    def wrong(word: str) -> str:
        rest = list(word[1:])
        kind = random.randrange(3)
        if kind == 0:
            random.shuffle(rest)
        elif kind == 1:
            del rest[random.randrange(len(rest))]
        else:
            rest.insert(random.randrange(len(rest)), random.choice("aeiourstln"))
        return word[0] + "".join(rest)

    return [wrong(word) if len(word) > 2 else word for word in words]


def shredded(words: list[str], pool: Sequence[str], random: Random) -> list[str]:
    """Broken tokens: words cut in two, and pieces glued to their neighbours."""
    pieces = []
    for word in words:
        i = random.randrange(1, len(word)) if len(word) > 3 and random.random() < 0.4 else len(word)
        pieces += [piece for piece in (word[:i], word[i:]) if piece]
    return glued(pieces, pool, random)


DISGUISES: tuple[Callable[[list[str], Sequence[str], Random], list[str]], ...] = (
    misspelt,
    marked,
    glued,
    soup,
    tailed,
    garbled,
    shredded,
)


def disguised(rows: Sequence[LabelledPrompt], *, share: float, seed: int) -> list[LabelledPrompt]:
    """Further rows: a prompt disguised, a new one for every ``1 / share``.

    Args: share: New rows per row, in [0, 1].
    """
    check_range("disguised.share", share, low=0.0, high=1.0)
    random, pool = Random(seed), _harmless_words(rows)
    made = []
    for row in random.sample(list(rows), int(share * len(rows))) if pool else []:
        text = " ".join(random.choice(DISGUISES)(row.prompt.split(), pool, random))
        if text:
            made.append(replace(row, id=f"{row.id}~", prompt=text, pair=""))
    return made


def in_every_disguise(rows: Sequence[LabelledPrompt], *, seed: int) -> list[LabelledPrompt]:
    """Each row in each disguise, for measuring: the source is the disguise's name, "plain" for the row as it was.

    Raises: UserError without harmless rows, whose words the disguises need.
    """
    random, pool = Random(seed), _harmless_words(rows)
    if not pool:
        raise UserError("Disguises need harmless prompts (label 0) to take words from, got none. Add some.")
    made = [replace(row, id=f"{row.id}~plain", source="plain", pair="") for row in rows]
    for disguise in DISGUISES:
        name = disguise.__name__
        for row in rows:
            text = " ".join(disguise(row.prompt.split(), pool, random)) or row.prompt
            made.append(replace(row, id=f"{row.id}~{name}", prompt=text, source=name, pair=""))
    return made


def diluted(rows: Sequence[LabelledPrompt], *, share: float, seed: int) -> list[LabelledPrompt]:
    """Further rows: a prompt with a harmless one behind or before it, so that harm is found in company and harmless length is not.

    Args: share: New rows per row, in [0, 1].
    """
    check_range("diluted.share", share, low=0.0, high=1.0)
    random = Random(seed)
    safe = [row.prompt for row in rows if row.label == 0 and len(row.prompt) < SHORT]
    made = []
    for row in random.sample(list(rows), int(share * len(rows))) if safe else []:
        company = random.choice(safe)
        text = f"{row.prompt}, {company}" if random.random() < 0.5 else f"{company}, {row.prompt}"
        made.append(replace(row, id=f"{row.id}+", prompt=text, pair=""))
    return made


def fragments(rows: Sequence[LabelledPrompt], *, share: float, seed: int) -> list[LabelledPrompt]:
    """Further harmless rows: one to three words out of a harmless prompt, since the shortest prompts of data sets are unsafe ones.

    Args: share: New rows per harmless row, in [0, 1].
    """
    check_range("fragments.share", share, low=0.0, high=1.0)
    random = Random(seed)
    safe = [row for row in rows if row.label == 0]
    made = []
    for row in random.sample(safe, int(share * len(safe))):
        words = row.prompt.split()
        first = random.randrange(len(words))
        made.append(replace(row, id=f"{row.id}/", prompt=" ".join(words[first : first + random.randint(1, 3)]), pair=""))
    return made


def _harmless_words(rows: Sequence[LabelledPrompt]) -> list[str]:
    return [word for row in rows if row.label == 0 for word in row.prompt.split()]


def _some(words: list[str], change: Callable[[str], str], random: Random) -> list[str]:
    long = [i for i, word in enumerate(words) if len(word) > 3]
    chosen = set(random.sample(long, max(1, len(long) // 3)) if long else [])
    return [change(word) if i in chosen else word for i, word in enumerate(words)]
