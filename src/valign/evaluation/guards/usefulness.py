"""How useful the guard's rewrites are: words, meaning and subject kept, beside the pair's safe prompt, and grammar."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from valign.evaluation.guards.rates import Rewrite, Scored
from valign.evaluation.statistics import share_interval

SHOWN = 8  # rewrites of either end in the diff view
TEMPLATE = "template"


def usefulness(scored: Sequence[Scored]) -> dict[str, Any]:
    """By source and for "all": shares with 95 % intervals, and medians; None for what was not measured."""
    tried = [one for one in scored if one.rewrite is not None]
    names = sorted({one.row.source for one in tried})
    groups = {name: [one for one in tried if one.row.source == name] for name in names}
    return {name: _figures(own) for name, own in (groups | {"all": tried} if tried else {}).items()}


def _figures(scored: Sequence[Scored]) -> dict[str, Any]:
    groups = [one.row.group for one in scored]
    rewrites = [one.rewrite for one in scored if one.rewrite is not None]

    def share(value: Callable[[Rewrite], bool | None]) -> dict[str, float] | None:
        answers = [(answer, group) for one, group in zip(rewrites, groups) if (answer := value(one)) is not None]
        if not answers:
            return None
        return asdict(share_interval(np.array([bool(one) for one, _ in answers]), np.array([group for _, group in answers])))

    def median(value: Callable[[Rewrite], float | None]) -> float | None:
        found = [number for one in rewrites if one.made and (number := value(one)) is not None]
        return float(np.median(found)) if found else None

    return {
        "prompts": len(rewrites),
        "rewritten": share(lambda one: one.made),
        "template": share(lambda one: one.source == TEMPLATE if one.made else None),
        "by": dict(sorted(Counter(one.source for one in rewrites if one.made).items())),
        "agreed": share(lambda one: one.agreed if one.made else None),
        "kept": median(lambda one: one.kept),
        "safe_kept": median(lambda one: one.safe_kept),
        "keep_meaning": median(lambda one: one.keep_meaning),
        "safe_meaning": median(lambda one: one.safe_meaning),
        "prompt_to_safe": median(lambda one: one.prompt_to_safe),
        "keep_subject": share(lambda one: one.keep_subject if one.made else None),
        "perplexity": median(lambda one: one.perplexity if one.safe_perplexity is not None or not _has_pairs(rewrites) else None),
        "safe_perplexity": median(lambda one: one.safe_perplexity),
        "checks": median(lambda one: float(one.checks)),
        "most_checks": max((one.checks for one in rewrites), default=0),
        "milliseconds": median(lambda one: one.milliseconds),
    }


def _has_pairs(rewrites: Sequence[Rewrite]) -> bool:
    """Whether perplexities can be compared with those of pairs; then only prompts that have one count."""
    return any(one.safe_perplexity is not None for one in rewrites)


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """Rewrites that were made, those that keep most of the prompt's meaning and words first."""
    made = [one for one in scored if one.rewrite is not None and one.rewrite.made and one.rewrite.text]

    def key(one: Scored) -> tuple[float, str]:
        assert one.rewrite is not None
        return -((one.rewrite.keep_meaning or 0.0) + (one.rewrite.kept or 0.0)), one.row.id

    return sorted(made, key=key)


def diff(prompt: str, text: str) -> str:
    """Markdown: what is gone struck out, what is new in bold."""
    one, two = prompt.split(), text.split()
    parts = []
    for kind, first, last, begin, end in SequenceMatcher(a=one, b=two, autojunk=False).get_opcodes():
        if kind == "equal":
            parts += one[first:last]
            continue
        if first < last:
            parts.append(f"~~{_plain(one[first:last])}~~")
        if begin < end:
            parts.append(f"**{_plain(two[begin:end])}**")
    return " ".join(parts)


def _plain(words: Sequence[str]) -> str:
    return " ".join(words).replace("*", "").replace("~", "").replace("|", "/")
