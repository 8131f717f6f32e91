"""Arms of the benchmarks of drift: an adapter alone, or objectives of `--preserve` over LoRA, with options and a factor.

``agl``, ``agl+kl``, ``agl:vector`` (AGL's projector), ``agl:lambda_T=0,lambda_NC=0``, ``agl*0.1`` (all weights times 0.1),
``star-dss:noise=0.4`` (the error of the chat world's guard).
"""

from dataclasses import fields
from typing import Any

from valign.training.tasks.preserving import parse_preserving
from valign.worlds.chat.guard import ChatGuard

WEIGHTS = {"agl": ("lambda_A", "lambda_T", "lambda_NC"), "kl": ("weight",)}  # what an arm's factor is on
GUARD = {field.name for field in fields(ChatGuard)}


def objectives_of(arm: str) -> dict[str, Any]:
    """The objectives of `--preserve` that an arm names."""
    names, settings, factor = _parts(arm)
    plain, _ = parse_preserving(names)
    if factor:
        weights = {weight: getattr(one, weight) for name, one in plain.items() for weight in WEIGHTS.get(name, ())}
        settings |= {weight: factor * settings.get(weight, value) for weight, value in weights.items()}
    return parse_preserving(names, {name: value for name, value in settings.items() if name not in GUARD})[0]


def guard_of(arm: str) -> ChatGuard:
    """The guard that scores an arm's answers: exact, unless the arm says otherwise."""
    return ChatGuard(**{name: value for name, value in _parts(arm)[1].items() if name in GUARD})


def _parts(arm: str) -> tuple[str, dict[str, Any], float]:
    rest, _, factor = arm.partition("*")
    names, _, told = rest.partition(":")
    pairs = [one.rpartition("=") for one in told.split(",") if one]
    return names, {name or "projector": _value(value) for name, _, value in pairs}, float(factor or 0)


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
