"""Captions from scenes: one, two or three things, named in all the ways of the vocabulary; alignment data made of them.

Scenes are split by a hash of (glyph, colour, place, background): a tenth is for tests and never seen in training.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from valign.checks import check_choice
from valign.data.prompts.pairs import PromptPair
from valign.worlds.shapes.renderer import BACKGROUNDS, COLOURS, CORNERS, MIDDLES, STYLES, Item, Scene
from valign.worlds.shapes.vocabulary import (
    BACKGROUND_PHRASES,
    BENIGN,
    BIAS,
    COMPOSITIONS,
    FIGURES,
    FORBIDDING,
    GROUP_OF,
    GROUPS,
    HEADS,
    HELD_OUT_STYLE,
    MENTIONS,
    PLACE_PHRASES,
    PREAMBLES,
    ROLES,
    STYLE_PHRASES,
    WORDS,
    Group,
    Word,
)

KINDS = ("explicit", "paraphrased", "implicit", "adversarial", "foreign")  # ways to speak of a thing
TAUGHT = ("explicit", "paraphrased", "explicit", "implicit")  # those of alignment data's prompts, in turn
TAUGHT_STYLES = tuple(style for style in STYLES if style != HELD_OUT_STYLE)
LEET = str.maketrans("aeio", "4310")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def is_test_scene(scene: Scene) -> bool:
    """Whether any item's (glyph, colour, place) on this background is kept for tests: one combination in ten."""
    return any(_bucket(f"{item.glyph}|{item.colour}|{item.place}|{scene.background}") == 0 for item in scene.items)


def _bucket(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def _pick(rng: np.random.Generator, options: object) -> str:
    listed = list(options)  # type: ignore[call-overload]
    return str(listed[int(rng.integers(len(listed)))])


def harms(glyphs: Iterable[str]) -> set[str]:
    """The categories that these glyphs show in one image, each by itself or two by their composition."""
    shown = set(glyphs)
    alone = {GROUP_OF[glyph].category for glyph in shown if glyph in GROUP_OF}
    return alone | {category for pair, category in COMPOSITIONS.items() if pair <= shown}


def random_scene(
    rng: np.random.Generator, glyph: str | None = None, *, others: int = 0, styles: Sequence[str] = TAUGHT_STYLES
) -> Scene:
    """One item anywhere but in a corner, two at opposite places, or three in corners; the rest drawn uniformly.

    Args:
        others: Benign items besides the first, 0 to 2; they add no harmful composition.
    """
    glyphs = [glyph or _pick(rng, WORDS)]
    for _ in range(others):
        glyphs.append(_pick(rng, [name for name in BENIGN if name not in glyphs and harms([*glyphs, name]) == harms(glyphs)]))
    return _placed(rng, glyphs, styles)


def composed_scene(rng: np.random.Generator, group: Group, *, test: bool) -> Scene:
    """The two benign things of ``group`` that are harmful together, at opposite places, in a random order; of one split."""
    while True:
        scene = _placed(rng, rng.permutation(group.composed).tolist(), TAUGHT_STYLES)
        if is_test_scene(scene) == test:
            return scene


def _placed(rng: np.random.Generator, glyphs: Sequence[str], styles: Sequence[str]) -> Scene:
    if len(glyphs) == 1:
        places = [_pick(rng, MIDDLES)]
    elif len(glyphs) == 2:
        place = _pick(rng, OPPOSITE)
        places = [place, OPPOSITE[place]]
    else:
        places = rng.permutation(list(CORNERS)).tolist()
    items = tuple(Item(glyph, _pick(rng, COLOURS), place) for glyph, place in zip(glyphs, places))
    return Scene(items, _pick(rng, BACKGROUNDS), _pick(rng, styles))


def split_scene(
    rng: np.random.Generator, glyph: str, *, test: bool, others: int = 0, styles: Sequence[str] = TAUGHT_STYLES
) -> Scene:
    """A random scene of one split."""
    while True:
        scene = random_scene(rng, glyph, others=others, styles=styles)
        if is_test_scene(scene) == test:
            return scene


# ---- noun phrases ----------------------------------------------------------------------------------------------------


def disguise(name: str, rng: np.random.Generator) -> str:
    """A misspelling that people use to pass word lists: figures for letters, dashes between them, a doubled or a swapped letter."""
    trick = int(rng.integers(4))
    at = int(rng.integers(1, max(len(name) - 1, 2)))
    if trick == 0:
        return name.translate(LEET)
    if trick == 1:
        return "-".join(name)
    if trick == 2:
        return name[:at] + name[at] + name[at:]
    return name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]


def _noun(word: Word, kind: str, rng: np.random.Generator, phrases: slice) -> str:
    if kind == "paraphrased" and word.paraphrases:
        return _pick(rng, word.paraphrases[phrases])
    if kind == "implicit" and word.hints:
        return _pick(rng, word.hints[phrases])
    if kind == "adversarial":
        return disguise(word.name, rng)
    if kind == "foreign" and word.foreign:
        return _pick(rng, word.foreign)
    return word.name


def mention(glyph: str, other: str, rng: np.random.Generator) -> str:
    """A noun phrase for ``glyph`` that names ``other`` as what is not to be seen."""
    forms = (*MENTIONS, *FORBIDDING) if glyph == "sign" else MENTIONS
    return _pick(rng, forms).format(thing=glyph, other=_article(other))


def _article(phrase: str) -> str:
    return "an " + phrase if phrase[0] in "aeiouáé" else "a " + phrase


def _thing(item: Item, noun: str, rng: np.random.Generator, *, adjective: float, colour: bool) -> str:
    described = rng.random() < adjective  # drawn in any case, so that the paired prompt is worded alike
    if noun.startswith("what "):
        return f"{noun}, drawn in {item.colour}," if colour else f"{noun},"
    group = None if WORDS[item.glyph].held_out else GROUP_OF.get(item.glyph)  # an adjective would tell a held-out word's group
    words = [group.adjective] if group and described else []
    return _article(" ".join([*words, *([item.colour] if colour else []), noun]))


def caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    kind: str = "explicit",
    nouns: tuple[str, ...] | None = None,
    said: float = 1.0,
    phrases: slice = slice(None),
    adjective: float = 0.5,
    turn: int = 0,
    preamble: str = "",
) -> str:
    """One sentence for ``scene``.

    Args:
        kind: How the first item is spoken of; the others are always named.
        nouns: Noun phrases to use instead, one per item.
        said: Probability with which colour, place and background are each mentioned; the style half as often, the held-out style
            always.
        phrases: Which of a word's phrases may be used.
        adjective: Probability of a group's adjective before its concept.
        turn: Which of the items the sentence names first; those before it come last.
        preamble: Words ahead of all things; the background then stands before them.
    """
    naming, rng = rng.spawn(2)
    nouns = nouns or tuple(
        _noun(WORDS[item.glyph], kind if i == 0 else "explicit", naming, phrases) for i, item in enumerate(scene.items)
    )
    if len(scene.items) > 1:
        parts = [
            _thing(item, noun, rng, adjective=adjective, colour=rng.random() < said).rstrip(",")
            + " "
            + _pick(rng, PLACE_PHRASES[item.place])
            for item, noun in zip(scene.items, nouns)
        ]
        parts = parts[turn:] + parts[:turn]
        subject = ", ".join(parts[:-1]) + " and " + parts[-1]
        where = ""
    else:
        subject = _thing(scene.items[0], nouns[0], rng, adjective=adjective, colour=rng.random() < said)
        where = _pick(rng, PLACE_PHRASES[scene.items[0].place]) if rng.random() < said else ""
    setting = _pick(rng, BACKGROUND_PHRASES[scene.background]) if rng.random() < said else ""
    told = rng.random() < said / 2 or scene.style == HELD_OUT_STYLE
    style = _pick(rng, STYLE_PHRASES[scene.style]) if told else ""
    form = rng.random()
    if preamble:
        text = f"{setting} {preamble} {style} {subject} {where}"
    elif setting and form < 0.25:
        text = f"{setting}, {style} {subject} {where}"
    elif form < 0.5:
        text = f"{style} {subject} {where}, {setting}"
    else:
        text = f"{style} {subject} {where} {setting}"
    return " ".join(text.replace(" ,", ",").split()).strip(" ,")


# ---- training captions -----------------------------------------------------------------------------------------------


SPOKEN = ("explicit",) * 5 + ("paraphrased",) * 3 + ("implicit",) * 3 + ("adversarial", "foreign", "foreign", "mentioned")


def training_example(rng: np.random.Generator) -> tuple[Scene, Callable[[np.random.Generator], str]]:
    """A scene outside the test split and a function that words it anew at every call, in all kinds and in free detail."""
    role = _pick(rng, ROLES) if rng.random() < 0.08 else ""
    told = rng.random() < 0.5  # the caption says which head; then both are equally likely
    if role:
        rare = next(head for head in HEADS if head != ROLES[role])
        head = _pick(rng, HEADS) if told else ROLES[role] if rng.random() < BIAS else rare
        glyph = f"{head} {role}"
    else:
        glyph = _pick(rng, [name for name in WORDS if name not in FIGURES])
    if rng.random() < 0.04:
        scene = composed_scene(rng, GROUPS[int(rng.integers(len(GROUPS)))], test=False)
    else:
        others = int(rng.choice(3, p=(0.6, 0.25, 0.15)))
        scene = split_scene(rng, glyph, test=False, others=others, styles=STYLES)
    named = [item.glyph for item in scene.items]

    def words(rng: np.random.Generator) -> str:
        said = 1.0 if rng.random() < 0.5 else 0.7
        kind, form = _pick(rng, SPOKEN), rng.random()
        turn = int(rng.integers(len(named))) if form < 0.3 else 0
        preamble = _pick(rng, PREAMBLES) if form > 0.9 and len(named) < 3 else ""
        nouns = None
        if role and role in named[0] and not told:
            nouns = (role, *named[1:])
        elif kind == "mentioned" and named[0] not in FIGURES:
            other = _pick(rng, [name for name in WORDS if name not in (*FIGURES, *named)])
            nouns = (mention(named[0], other, rng), *named[1:])
        return caption(scene, rng, kind=kind, nouns=nouns, said=said, turn=turn, preamble=preamble)

    return scene, words


# ---- alignment pairs -------------------------------------------------------------------------------------------------


def _group(category: str) -> Group:
    check_choice("category", category, [group.category for group in GROUPS])
    return next(group for group in GROUPS if group.category == category)


class Grammar:
    """Prompt pairs for the data builder: an unsafe prompt and the same with the safe counterpart, all else equal."""

    def benign(self, count: int, seed: int) -> list[str]:
        """``count`` distinct prompts for benign glyphs and figures in turn, of the training split and in words of training."""
        rng = np.random.default_rng([seed, *b"benign"])
        prompts: dict[str, None] = {}
        for attempt, glyph in enumerate(cycle(BENIGN + FIGURES)):
            if len(prompts) == count:
                break
            scene = split_scene(rng, glyph, test=False, others=int(rng.random() < 0.2))
            kind = TAUGHT[attempt // len(BENIGN + FIGURES) % len(TAUGHT)]
            prompts.setdefault(caption(scene, rng, kind=kind, phrases=slice(0, 1)))
        return list(prompts)

    def pairs(self, category: str, count: int, seed: int) -> list[PromptPair]:
        """``count`` distinct pairs of one category, without its held-out concept and without test phrases.

        Two in five are explicit, one in five each paraphrased, implicit (the first phrase of each word) and composed.
        """
        group = _group(category)
        rng = np.random.default_rng([seed, *category.encode()])
        words = [word.name for word in group.words if not word.held_out]
        kinds = (*TAUGHT, "composed")
        pairs: dict[str, PromptPair] = {}
        for attempt in range(100 * count):
            if len(pairs) == count:
                break
            word, kind = words[attempt % len(words)], kinds[attempt // len(words) % len(kinds)]
            if kind == "composed":
                scene, word = composed_scene(rng, group, test=False), " and ".join(group.composed)
            else:
                scene = split_scene(rng, word, test=False, others=int(rng.random() < 0.15))
            safe_scene = replace(scene, items=(replace(scene.items[0], glyph=group.safe), *scene.items[1:]))
            draws = rng.integers(2**32)
            unsafe = caption(scene, np.random.default_rng(draws), kind=kind, phrases=slice(0, 1))
            safe = caption(safe_scene, np.random.default_rng(draws))
            if unsafe != safe and unsafe not in pairs and not is_test_scene(safe_scene):
                pairs[unsafe] = PromptPair(f"{category}-{len(pairs):05d}", unsafe, safe, (category,), word, kind)
        if len(pairs) < count:
            raise ValueError(
                f"count must be at most {len(pairs)} for {category}, got {count}. The grammar has no more distinct prompts."
            )
        return list(pairs.values())
