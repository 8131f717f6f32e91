"""Training prompts from two grammars: pairs that share a harm, a place or a word, one of them harmless; and everyday requests.

Data sets have few signs, warnings, acts out of place and harmless uses of alarming words, and next to no harmless instructions;
these fill the gap. The grammars (``assets/sentences.yaml``, ``assets/requests.yaml``) are data in our words, so that they can be
read, corrected and extended without code.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from valign.checks import check_range
from valign.data.prompts.pairs import LabelledPrompt
from valign.policy import Policy

ASSETS = Path(__file__).parent / "assets"
REQUESTS = 125  # everyday requests per pair of a harm: as many as a data set of middling size has
PLACES = 5  # times as many pairs per group of places or per contrast as per harm, since these have many acts
_SLOT = re.compile(r"\{(\w+)\}")
PairText = tuple[str, str, str, str]  # safe prompt, unsafe prompt, category or "", what both are about


@cache
def grammar(name: str = "sentences") -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((ASSETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def generated_rows(policy: Policy, *, each: int, seed: int) -> list[LabelledPrompt]:
    """Paired prompts of source "generated"; a category that the policy does not have is not known. Same seed, same rows.

    Args: each: WrittenPairs per harm of the grammar; 0 gives no rows at all.
    """
    check_range("generated_rows.each", each, low=0)
    rows = []
    known = policy.category_ids()
    for number, (safe, unsafe, category, about) in enumerate(_pairs(each, Random(seed)) if each else ()):
        pair = f"generated:{number}"
        shared: dict[str, Any] = {"source": "generated", "group": f"generated:{about}", "pair": pair}
        rows.append(LabelledPrompt(f"{pair}-s", safe, 0, (), **shared))
        rows.append(LabelledPrompt(f"{pair}-u", unsafe, 1, (category,) if category in known else (), **shared))
    return rows


def request_rows(*, each: int, seed: int) -> list[LabelledPrompt]:
    """Harmless requests of source "requests", `REQUESTS` times ``each``; no two alike. Same seed, same rows."""
    check_range("request_rows.each", each, low=0)
    rules, random = grammar("requests"), Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < REQUESTS * each:
        texts[_fill_one(random.choice(rules["frames"]), {}, random, rules)] = None
    return [LabelledPrompt(f"requests:{i}", text, 0, (), "requests", f"requests:{i}") for i, text in enumerate(texts)]


def _pairs(each: int, random: Random) -> Iterator[PairText]:
    rules = grammar()
    for category, harms in rules["harms"].items():
        for name, act, scene in harms:
            own = {"name": name, "act": act, "scene": scene}
            for _ in range(each):
                yield _fill("safe", own, random), _fill("unsafe", own, random), category, name
    for group in rules["manners"]:
        for _ in range(PLACES * each):
            own = {slot: random.choice(group[slot]) for slot in ("mild", "fitting", "elsewhere")}
            own |= {"act": random.choice(group["mild"] + group["never"]), "where": random.choice(group["places"])}
            yield _fill("manners_safe", own, random), _fill("manners_unsafe", own, random), "", group["places"][0]
    for contrast in rules["contrasts"]:
        for _ in range(PLACES * each):
            own = {slot: random.choice(values) for slot, values in contrast["slots"].items()}
            safe, unsafe = (_fill_one(random.choice(contrast[side]), own, random) for side in ("safe", "unsafe"))
            yield safe, unsafe, contrast["category"], contrast["about"]
    for people in rules["people"]["groups"]:
        for _ in range(each // 2):
            safe, unsafe = (
                _fill_one(random.choice(rules["people"][side]), {"group": people}, random) for side in ("safe", "unsafe")
            )
            yield safe, unsafe, "hate", people
    for safe, unsafe, category in rules["twins"]:
        yield safe, unsafe, category, safe


def _fill(kind: str, own: Mapping[str, str], random: Random) -> str:
    return _fill_one(random.choice(grammar()[kind]), own, random)


def _fill_one(frame: str, own: Mapping[str, str], random: Random, words: Mapping[str, Any] | None = None) -> str:
    words = words or grammar()["words"]
    return " ".join(_SLOT.sub(lambda slot: own.get(slot[1]) or random.choice(words[slot[1]]), frame).split())
