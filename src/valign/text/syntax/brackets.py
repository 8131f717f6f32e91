"""Nested brackets, and the texts that come out of those that hold alternatives. Linear in the length of the text."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from valign.text.syntax.traced import Traced, joined

DEEPEST = 24  # brackets within brackets that are read; what lies deeper is text
MOST_TEXTS = 12  # texts that are written out in full
MOST_OPTIONS = 8  # of a group that are read one by one when there are more texts than that
Span = tuple[int, int]


@dataclass
class Bracketed:
    """A pair of brackets: places of both, and the groups directly inside."""

    opens: int
    closes: int = -1
    inside: list["Bracketed"] = field(default_factory=list)


Options = Callable[[str, Bracketed], list[Span] | None]  # where a group's alternatives stand; None for a group that offers none


def groups(text: str, pair: str) -> list[Bracketed]:
    """All closed pairs of brackets at the top level, ``pair`` being the two signs; a sign behind a backslash is text."""
    top: list[Bracketed] = []
    stack: list[Bracketed] = []
    escaped, skipped = False, 0
    for place, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == pair[0]:
            if len(stack) < DEEPEST:
                stack.append(Bracketed(place))
            else:
                skipped += 1
        elif char == pair[1]:
            if skipped:
                skipped -= 1
            elif stack:
                done = stack.pop()
                done.closes = place
                (stack[-1].inside if stack else top).append(done)
    for lost in stack:  # never closed: what it holds stands where it stood
        top += lost.inside
    return sorted(top, key=lambda group: group.opens)


def top_level(text: str, group: Bracketed, sign: str) -> list[int]:
    """Places of a sign inside a group but in none of its inner ones."""
    found, place = [], group.opens + 1
    for inner in [*group.inside, None]:
        stop = inner.opens if inner else group.closes
        while (place := text.find(sign, place, stop)) >= 0:
            found.append(place)
            place += len(sign)
        place = inner.closes + 1 if inner else stop
    return found


def alternatives(traced: Traced, pair: str, options: Options) -> list[Traced]:
    """Every text that comes out when each group gives one of its options.

    Where these are more than `MOST_TEXTS`: texts in which every group gives its first option, every one its second, and so on, all
    options one by one, and all of them together.
    """
    text = traced.text
    tree = groups(text, pair)
    count = _count(text, tree, options)
    if count <= 1:
        return [_take(traced, (0, len(text)), tree, options, 0)]
    if count <= MOST_TEXTS:
        return [joined(traced[slice(*span)] for span in spans) for spans in _product(text, (0, len(text)), tree, options)]
    leaves = [traced[slice(*span)] for span in _leaves(text, tree, options)]
    sweeps = [_take(traced, (0, len(text)), tree, options, number) for number in range(MOST_OPTIONS)]
    return [*sweeps, *leaves[: MOST_TEXTS * 2], joined(leaves, " ")]


def _within(span: Span, inside: Sequence[Bracketed]) -> Sequence[Bracketed]:
    """The groups, sorted by place, that stand in the span."""
    first = bisect_left(inside, span[0], key=lambda group: group.opens)
    return inside[first : bisect_left(inside, span[1], lo=first, key=lambda group: group.opens)]


def _count(text: str, tree: Sequence[Bracketed], options: Options) -> int:
    """How many texts come out, or more than `MOST_TEXTS`."""
    total = 1
    for group in tree:
        spans = options(text, group)
        if spans is None:
            total *= _count(text, group.inside, options)
        else:
            total *= sum(_count(text, _within(span, group.inside), options) for span in spans) or 1
        if total > MOST_TEXTS:
            return total
    return total


def _product(text: str, span: Span, tree: Sequence[Bracketed], options: Options) -> list[list[Span]]:
    results: list[list[Span]] = [[]]
    place = span[0]
    for group in tree:
        spans = options(text, group)
        if spans is None:
            inner = _product(text, (group.opens, group.closes + 1), group.inside, options)
        else:
            inner = [one for option in spans for one in _product(text, option, _within(option, group.inside), options)] or [[]]
        before = (place, group.opens)
        if len(inner) == 1:
            for result in results:
                result += [before, *inner[0]]
        else:
            results = [[*result, before, *one] for result in results for one in inner]
        place = group.closes + 1
    return [[*result, (place, span[1])] for result in results]


def _take(traced: Traced, span: Span, tree: Sequence[Bracketed], options: Options, number: int) -> Traced:
    """Every group gives its option of that number, or its last one."""
    parts, place = [], span[0]
    for group in tree:
        spans = options(traced.text, group)
        parts.append(traced[place : group.opens])
        if spans is None:
            parts.append(_take(traced, (group.opens, group.closes + 1), group.inside, options, number))
        elif spans:
            option = spans[min(number, len(spans) - 1)]
            parts.append(_take(traced, option, _within(option, group.inside), options, number))
        place = group.closes + 1
    return joined([*parts, traced[place : span[1]]])


def _leaves(text: str, tree: Sequence[Bracketed], options: Options) -> list[Span]:
    """Options that hold no other options."""
    found: list[Span] = []
    for group in tree:
        spans = options(text, group)
        if spans is None:
            found += _leaves(text, group.inside, options)
            continue
        for span in spans:
            inner = _leaves(text, _within(span, group.inside), options)
            found += inner or [span]
    return found
