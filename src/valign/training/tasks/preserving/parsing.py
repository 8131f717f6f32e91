"""Objectives by name: ``--preserve agl+kl`` with their options."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from valign.checks import UserError, close_to, read_options, refuse_idle
from valign.objectives import PRESERVING


def parse_preserving(text: str, settings: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """``"agl"``, ``"constrained-sft+kl"``: objectives by name, and the settings that belong to none of them.

    A setting is an objective's field as ``NAME.FIELD`` (``agl.lambda_A``), or bare where it is not also another's.
    Raises: UserError for an unknown name, one given twice, a value of the wrong type or range, and a setting without effect.
    """
    names = [name for name in text.split("+") if name]
    for name in names:
        if name not in PRESERVING or names.count(name) > 1:
            what = "each once" if name in PRESERVING else "known"
            guess = "" if name in PRESERVING else close_to(name, PRESERVING)
            raise UserError(f"--preserve must name objectives, {what}, got {text!r}.{guess} Known: {', '.join(PRESERVING)}.")
    kinds = {name: PRESERVING[name] for name in names}
    mine: dict[str, dict[str, Any]] = {name: {} for name in names}
    left: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        part, _, option = key.rpartition(".")
        owners = [name for name in names if option in {field.name for field in fields(kinds[name])} and part in ("", name)]
        if len(owners) > 1:
            raise UserError(f"--set {key} belongs to {' and '.join(owners)}. Write {owners[0]}.{option} or {owners[1]}.{option}.")
        (mine[owners[0]] if owners else left)[option if owners else key] = value
    made = {name: read_options(kinds[name], mine[name], name=name) for name in names}
    for name, objective in made.items():
        refuse_idle(objective, mine[name])
    return made, left
