"""Values that can be refused before any library is imported that takes seconds: names of policies, detectors, devices, methods, and
paths to read. What is known is read from the source, from entry points and from the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from valign.checks import UserError, close_to
from valign.cli.quick import HUB_ID, ROOT, bundled, known_names, table_names

WRITTEN = ("--out", "-o", "--csv", "--parquet", "--latex", "--sheet", "--anchor", "--keys", "--runs")  # paths that need not exist
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "hip", "meta", "privateuseone")
TUNINGS = ("valign.adapters.registry:ADAPTERS", "valign.optimizers.registry:OPTIMIZERS", "valign.optimizers.registry:PERTURBATIONS")
JUDGE = re.compile(r"(?P<place>.+?)@https?://.+")


def given_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags of a command line with what follows them; for a flag that takes no value, that is the next word."""
    for place, word in enumerate(args):
        if word == "--":
            return
        flag, separator, value = word.partition("=")
        if re.fullmatch(r"-[a-z]|--[a-z][\w-]*", flag):
            yield flag, value if separator else next(iter(args[place + 1 :]), "")


def refuse_values(
    args: Sequence[str],
    paths: Collection[str],
    named: Mapping[str, Sequence[str]],
    *,
    own: Collection[str] = (),
    elsewhere: bool = False,
) -> None:
    """Refuse names that nothing has, and paths that are not there.

    Args:
        paths: Flags of the command that take a path.
        named: Flags that take names, joined by ``+``, and what has them: names, or tables as ``"module:TABLE"``.
        own: Flags that mean something else in this command than in all others.
        elsewhere: The device may be that of another machine.
    Raises: UserError that names the flag, the value and what is spelt most like it.
    """
    for flag, value in given_values(args):
        if not value or flag in own:
            continue
        if flag in named:
            known = known_names(named[flag])
            for name in value.split("+"):
                if name not in known:
                    raise UserError(f"{flag} must be one of {', '.join(known)}; got {name!r}.{close_to(name, known)}")
        elif flag in EVERYWHERE:
            EVERYWHERE[flag](flag, value)
        elif flag == "--device":
            refuse_device(value, elsewhere=elsewhere)
        elif flag in paths and flag not in WRITTEN and not _there(value):
            raise UserError(f"{flag} {value} does not exist. Check the path.")


def own_paths(command: Any) -> list[str]:
    """Flags of a command's own function that take a path."""
    hints = get_type_hints(command.callback)
    return [
        flag
        for parameter in command.params
        for flag in parameter.opts
        if Path in (hints.get(parameter.name), *get_args(hints.get(parameter.name)))
    ]


def refuse_policy(flag: str, name: str) -> None:
    """Refuse what is neither a bundled policy nor a file; ``none`` is one where a command has a guard."""
    known = sorted(path.stem for path in (ROOT / "policy").glob("*.yaml"))
    if name not in (known if flag in ("--policy", "-p") else [*known, "none"]) and not Path(name).expanduser().exists():
        raise UserError(f"policy {name} does not exist. Give a YAML file, or one of {', '.join(known)}.{close_to(name, known)}")


def refuse_detector(flag: str, value: str) -> None:
    """Refuse what is neither a kind of detector, nor the oracle of a world, nor a folder, nor on the shelf."""
    shelf = Path(os.environ.get("VALIGN_DETECTORS") or "detectors")
    kinds = table_names("valign.detectors:DETECTORS")
    if Path(value).exists() or (shelf / value).exists():
        return
    for part in value.split("+"):
        judge = JUDGE.fullmatch(part)
        name, separator, folder = (judge["place"] if judge else part).partition("=")
        if separator and name in kinds and not Path(folder).expanduser().exists():
            raise UserError(f"{flag} {part}: {folder or 'FOLDER'} does not exist. Check the path.")
        known = kinds if separator else ["oracle", "none", *bundled(), *kinds]
        if name not in known and (separator or not (Path(name).expanduser().exists() or (shelf / name).exists())):
            own = ", ".join(sorted(path.name for path in shelf.glob("*") if path.is_dir()))
            guess = close_to(name, known)
            raise UserError(
                f"{flag} must be oracle, {', '.join(kinds)} (with =FOLDER where it reads one), or a detector's folder, joined by + "
                f"if several; got {part!r}.{guess} In {shelf}: {own or 'none'}. `valign detector list` says more."
            )


def refuse_device(name: str, *, elsewhere: bool = False) -> None:
    """Refuse what torch has no name for, and CUDA where torch was built without it."""
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UserError(f"device must be auto, cpu, cuda or another torch device, got {name!r}.{close_to(kind, DEVICES)}")
    if kind == "cuda" and not elsewhere and _torch_version().endswith("+cpu"):
        raise UserError(f"device {name} was asked for, but this machine or this build of torch has no CUDA. Use device cpu.")


def refuse_suite(flag: str, name: str) -> None:
    """Refuse what is neither a world's suite nor a file."""
    if not _there(name):
        raise UserError(
            f"{flag} {name} does not exist. Give a table of prompts with labels, or one of {', '.join(bundled())}."
            f"{close_to(name, bundled())}"
        )


def refuse_subject(flag: str, name: str) -> None:
    """Refuse what is neither a folder, nor the name of a world's model, nor a hub id."""
    stages = [one for table in ("STAGES", "ADAPTERS") for one in table_names(f"valign.worlds.chat:{table}")]
    known = [*bundled(), *(f"chat:{one}" for one in stages)]
    if name in known or HUB_ID.fullmatch(name) or Path(name).expanduser().exists():
        return
    raise UserError(
        f"{flag} {name} must be a folder of a chat model, a diffusers pipeline or an adapter, got none of them. Check the path; "
        f"bundled are {', '.join(known)}.{close_to(name, known)}"
    )


# flags that mean the same in every command
EVERYWHERE: Mapping[str, Callable[[str, str], None]] = {
    **dict.fromkeys(("--policy", "-p", "--guard", "-g"), refuse_policy),
    **dict.fromkeys(("--detector", "--filter-detector", "--check"), refuse_detector),
    **dict.fromkeys(("--suite", "-s"), refuse_suite),
    **dict.fromkeys(("--before", "--after"), refuse_subject),
}


def _there(value: str) -> bool:
    """A path, or a name that stands for one."""
    return value in (*bundled(), "shipped") or Path(value).expanduser().exists()


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
