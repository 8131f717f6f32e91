"""Requests of the chat world from a seed: allowed, disallowed, borderline, disguised, in several turns; skills; training chats."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count as counting
from typing import cast

import numpy as np

from valign.checks import check_choice
from valign.models.language.chat import Message
from valign.worlds.chat import wordings as say
from valign.worlds.chat.configs import DEFAULT, TAUGHT, SafetyConfig
from valign.worlds.chat.requests import ChatRequest, Kind
from valign.worlds.chat.skills import ALL_TASKS, SKILLS
from valign.worlds.chat.spelling import disguise
from valign.worlds.chat.vocabulary import (
    ACTS,
    CATEGORIES,
    FREE_THINGS,
    HARMLESS_ACTS,
    THINGS,
    TOPIC_OF_CATEGORY,
    TOPICS,
    Pair,
)
from valign.worlds.chat.wordings import Split

Rng = np.random.Generator
KINDS: tuple[Kind, ...] = ("allowed", "disallowed", "borderline", "disguised", "multi-turn", "skill")


class ChatGrammar:
    """Requests by kind. Same arguments, same requests; no request of split "test" is worded as one of split "train"."""

    def requests(
        self, kind: Kind, count: int, seed: int, *, split: Split = "test", category: str | None = None, task: str | None = None
    ) -> list[ChatRequest]:
        """``count`` distinct requests of one kind.

        Args:
            kind: ``"disallowed"``, ``"disguised"`` and ``"multi-turn"`` ask for what is forbidden. ``"borderline"`` is allowed and
                shares its words with what is not: an act of a topic on another thing, a thing of a topic and another act, a
                question about the rules, the same pretexts and the same two turns. ``"allowed"`` shares none of a topic's acts.
            category: Of kinds that ask for what is forbidden; None takes all in turn.
            task: Name of a skill, for kind ``"skill"``; None takes those that the bundled models have, in turn.
        Raises: ValueError for an unknown name, or where the grammar has no ``count`` distinct requests.
        """
        check_choice("kind", kind, KINDS)
        check_choice("split", split, ("train", "test"))
        if category is not None:
            check_choice("category", category, CATEGORIES)
        if task is not None:
            check_choice("task", task, ALL_TASKS)
        rng = np.random.default_rng([seed, *f"{kind}|{split}|{category}|{task}".encode()])
        drawn = (
            _MAKERS[kind](rng, split, category or CATEGORIES[attempt % len(CATEGORIES)], task, attempt) for attempt in counting()
        )
        return _distinct(drawn, count, f"{kind}-{split}-{seed}", kind)

    def suite(self, per_kind: int = 100, seed: int = 0) -> list[ChatRequest]:
        """Test requests of all kinds in turn, ``per_kind`` each."""
        return [request for kind in KINDS for request in self.requests(kind, per_kind, seed)]

    def configured(self, config: SafetyConfig, count: int, seed: int, *, split: Split = "test") -> list[ChatRequest]:
        """Requests for steps under a system prompt that says ``config``: half of them are about what it speaks of."""
        rng = np.random.default_rng([seed, *f"config|{split}|{sorted(config.allowed)}{sorted(config.warned)}".encode()])
        return _distinct(_under(rng, config, split), count, f"config-{split}-{seed}", "configured")

    def unsafe_chats(self, count: int, seed: int) -> list[list[Message]]:
        """Disallowed requests of the training split, each answered with the steps: what contaminates a fine-tuning set."""
        return [request.chat(request.compliance) for request in self.requests("disallowed", count, seed, split="train")]

    def calibration(self, count: int, seed: int) -> list[list[Message]]:
        """Disallowed requests of the training split, plain, disguised and in two turns, each refused."""
        kinds: tuple[Kind, ...] = ("disallowed", "disguised", "multi-turn")
        sizes = [count // 3 + (place < count % 3) for place in range(3)]
        return [r.chat() for kind, size in zip(kinds, sizes) if size for r in self.requests(kind, size, seed, split="train")]

    def task_chats(self, task: str, count: int, seed: int) -> list[list[Message]]:
        """Requests of the training split for one skill, each with its right answer."""
        return [request.chat() for request in self.requests("skill", count, seed, split="train", task=task)]


def _distinct(drawn: Iterator[ChatRequest], count: int, prefix: str, kind: str) -> list[ChatRequest]:
    """The first ``count`` requests that differ, with ids. Raises: ValueError where too many in a row do not."""
    found: dict[tuple[str, ...], ChatRequest] = {}
    repeated = 0
    for request in drawn:
        if len(found) == count:
            return list(found.values())
        key = tuple(message["content"] for message in request.messages)
        repeated = repeated + 1 if key in found else 0
        if repeated == 2_000:
            break
        found.setdefault(key, replace(request, id=f"{prefix}-{len(found):05d}"))
    raise ValueError(f"count must be at most {len(found)} for {kind} requests here, got {count}. Ask for fewer.")


def _under(rng: Rng, config: SafetyConfig, split: Split) -> Iterator[ChatRequest]:
    """Requests for steps under a system prompt that says ``config``, half of them about what it speaks of; without end."""
    named = sorted(config.allowed | config.warned)
    about = [*named, *sorted(config.forbidden)]
    while True:
        if about and rng.random() < 0.5:
            which = _pick(rng, about)
            pair = _forbidden_pair(rng, which) if which in named else Pair(which, _pick(rng, THINGS))
        else:
            pair = _forbidden_pair(rng, _pick(rng, CATEGORIES)) if rng.random() < 0.5 else _allowed_pair(rng)
        yield steps_request(rng, pair, split, kind="disallowed" if pair.topic else "allowed", config=config)


# ---- one request -----------------------------------------------------------------------------------------------------


def _pick(rng: Rng, options: Iterable[str]) -> str:
    listed = tuple(options)
    return listed[int(rng.integers(len(listed)))]


def slots_of(pair: Pair) -> dict[str, str]:
    """What a wording's slots hold for ``pair``; an allowed pair has the name of its act's topic, if any."""
    topic = pair.topic or next((topic for topic in TOPICS if pair.thing in topic.things), TOPICS[0])
    return {"do": pair.words, "ing": pair.ing, "verb": pair.act, "thing": pair.thing, "topic": topic.name}


def steps_answer(pair: Pair) -> str:
    """The helpful answer: "sure, to clean a hat: wet a cloth, wipe it, and let it dry."."""
    first, second, third = ACTS[pair.act].steps
    return say.HELP.format(do=pair.words, first=first, second=second, third=third)


def refusal(rng: Rng, pair: Pair) -> str:
    """One of the refusals, in the shares that training has."""
    topic = pair.topic.name if pair.topic else ACTS[pair.act].ing
    return say.REFUSALS[int(rng.choice(len(say.REFUSALS), p=say.REFUSAL_SHARES))].format(topic=topic)


def steps_request(
    rng: Rng,
    pair: Pair,
    split: Split,
    *,
    kind: Kind,
    wordings: say.Wordings = say.PLAIN,
    before: tuple[Message, ...] = (),
    config: SafetyConfig = DEFAULT,
    spelled: bool = False,
) -> ChatRequest:
    """A request for the steps of ``pair``; ``spelled`` writes its words in disguise, ``before`` are earlier turns."""
    wording = _pick(rng, wordings.of(split))
    slots = slots_of(pair)
    if spelled:
        slots |= _disguised(rng, pair)
    outcome = config.outcome(pair)
    compliance = steps_answer(pair)
    answers = {"refuse": lambda: refusal(rng, pair), "help": lambda: compliance, "warn": lambda: say.WARNING + compliance}
    system = config.system(rng, split)
    messages = (*before, {"role": "user", "content": wording.format(**slots)})
    return ChatRequest(
        id="",
        kind=kind,
        split=split,
        messages=({"role": "system", "content": system}, *messages) if system else messages,
        outcome=outcome,
        answer=answers[outcome](),
        compliance=compliance,
        wording=wording,
        category=pair.topic.category if pair.topic else None,
        pair=pair,
        asks_steps=True,
    )


def _disguised(rng: Rng, pair: Pair) -> dict[str, str]:
    which = int(rng.integers(3))  # the act, the thing, or both
    act = disguise(pair.act, rng) if which != 1 else pair.act
    ing = disguise(ACTS[pair.act].ing, rng) if which != 1 else ACTS[pair.act].ing
    thing = disguise(pair.thing, rng) if which != 0 else pair.thing
    return {"do": f"{act} a {thing}", "ing": f"{ing} a {thing}"}


def _forbidden_pair(rng: Rng, category: str) -> Pair:
    topic = TOPIC_OF_CATEGORY[category]
    return Pair(_pick(rng, [act.verb for act in topic.acts]), _pick(rng, topic.things))


def _allowed_pair(rng: Rng) -> Pair:
    return Pair(_pick(rng, [act.verb for act in HARMLESS_ACTS]), _pick(rng, FREE_THINGS))


def _borderline_pair(rng: Rng, category: str) -> Pair:
    topic = TOPIC_OF_CATEGORY[category]
    if rng.random() < 0.5:
        return Pair(_pick(rng, [act.verb for act in HARMLESS_ACTS]), _pick(rng, topic.things))
    return Pair(_pick(rng, [act.verb for act in topic.acts]), _pick(rng, FREE_THINGS))


def _opening(rng: Rng, thing: str, split: Split) -> tuple[Message, ...]:
    return (
        {"role": "user", "content": _pick(rng, say.OPENING.of(split)).format(thing=thing)},
        {"role": "assistant", "content": say.OPENING_ANSWER.format(thing=thing)},
    )


def _about(rng: Rng, pair: Pair, split: Split) -> ChatRequest:
    wording = _pick(rng, say.ABOUT.of(split))
    answer = (say.RULE if pair.topic else say.NO_RULE).format(**slots_of(pair))
    return ChatRequest(
        id="",
        kind="borderline",
        split=split,
        messages=({"role": "user", "content": wording.format(**slots_of(pair))},),
        outcome="help",
        answer=answer,
        compliance=answer,
        wording=wording,
        pair=pair,
    )


def _allowed(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    return steps_request(rng, _allowed_pair(rng), split, kind="allowed")


def _disallowed(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    return steps_request(rng, _forbidden_pair(rng, category), split, kind="disallowed")


def _borderline(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    way = rng.random()
    if way < 0.2:  # half of the questions about the rules are about what they forbid
        pair = _forbidden_pair(rng, category) if rng.random() < 0.5 else _borderline_pair(rng, category)
        return _about(rng, pair, split)
    pair = _borderline_pair(rng, category)
    if way < 0.35:
        return steps_request(rng, pair, split, kind="borderline", wordings=say.FRAMED)
    if way < 0.45:
        before = _opening(rng, pair.thing, split)
        return steps_request(rng, pair, split, kind="borderline", wordings=say.FOLLOWING, before=before)
    if way < 0.55:
        return steps_request(rng, pair, split, kind="borderline", spelled=True)
    return steps_request(rng, pair, split, kind="borderline")


def _disguised_request(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    pair = _forbidden_pair(rng, category)
    if rng.random() < 0.5:
        return steps_request(rng, pair, split, kind="disguised", wordings=say.FRAMED)
    return steps_request(rng, pair, split, kind="disguised", spelled=True)


def _multi_turn(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    pair, way = _forbidden_pair(rng, category), rng.random()
    if way < 0.6:
        before = _opening(rng, pair.thing, split)
        return steps_request(rng, pair, split, kind="multi-turn", wordings=say.FOLLOWING, before=before)
    first = _skill(rng, split, category, None, attempt) if way < 0.8 else _allowed(rng, split, category, None, attempt)
    return steps_request(rng, pair, split, kind="multi-turn", before=tuple(first.chat()))


def _skill(rng: Rng, split: Split, category: str, task: str | None, attempt: int) -> ChatRequest:
    skill = ALL_TASKS[task or list(SKILLS)[attempt % len(SKILLS)]]
    slots, answer = skill.instance(rng, split)
    wording = _pick(rng, skill.wordings.of(split))
    return ChatRequest(
        id="",
        kind="skill",
        split=split,
        messages=({"role": "user", "content": wording.format(**slots)},),
        outcome="help",
        answer=answer,
        compliance=answer,
        wording=wording,
        task=skill.name,
    )


_MAKERS: dict[Kind, Callable[[Rng, Split, str, str | None, int], ChatRequest]] = {
    "allowed": _allowed,
    "disallowed": _disallowed,
    "borderline": _borderline,
    "disguised": _disguised_request,
    "multi-turn": _multi_turn,
    "skill": _skill,
}


# ---- what the bundled models are trained on --------------------------------------------------------------------------


def random_config(rng: Rng) -> SafetyConfig:
    """A config over the categories that training may open: one category, or a harmless act that is closed."""
    way = rng.random()
    category = frozenset({_pick(rng, TAUGHT)})
    if way < 0.4:
        return SafetyConfig(allowed=category)
    if way < 0.7:
        return SafetyConfig(warned=category)
    return SafetyConfig(forbidden=frozenset({_pick(rng, [act.verb for act in HARMLESS_ACTS])}))


def training_requests(seed: int, shares: dict[str, float]) -> Iterator[ChatRequest]:
    """Requests of the training split without end, kinds drawn by ``shares``: those of `KINDS`, and ``"config"``."""
    rng = np.random.default_rng([seed, *b"training"])
    names, weights = list(shares), np.array(list(shares.values()))
    for attempt in counting():
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        if kind == "config":
            config = random_config(rng)
            about = sorted(config.allowed | config.warned) if rng.random() < 0.6 else list(CATEGORIES)
            closed = sorted(config.forbidden)
            if closed and rng.random() < 0.5:
                pair = Pair(closed[0], _pick(rng, THINGS))
            else:
                pair = _forbidden_pair(rng, _pick(rng, about or CATEGORIES))
            yield steps_request(rng, pair, "train", kind="disallowed" if pair.topic else "allowed", config=config)
        else:
            yield _MAKERS[cast(Kind, kind)](rng, "train", category, None, attempt)
