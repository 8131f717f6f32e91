"""Values that can be refused before any library is imported that takes seconds: names of policies, detectors, devices, methods, and
paths to read. What is known is read from the source, from entry points and from the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from valign.checks import UserError, check_choice, close_to
from valign.cli.quick import FAMILIES, ROOT, bundled, given_values, known_names, refuse_model, table_names
from valign.files import read_json
from valign.models.files.hub import HUB_ID, fetched, local_folder
from valign.trackers import check_trackers

WRITTEN = ("--out", "-o", "--csv", "--parquet", "--latex", "--sheet", "--anchor", "--keys", "--runs")  # paths that need not exist
Check = Callable[[str, str], None]  # flag, value -> UserError
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "hip", "meta", "privateuseone")
TUNINGS = ("valign.adapters.registry:ADAPTERS", "valign.optimizers.registry:OPTIMIZERS", "valign.optimizers.registry:PERTURBATIONS")
ADDRESS = ("http://", "https://")
JUDGES = ("oracle", "phrases")  # of answers, by name
JUDGE = re.compile(r"(?P<place>.+?)@https?://.+")


def refuse_values(
    args: Sequence[str],
    paths: Collection[str],
    named: Mapping[str, Sequence[str]],
    *,
    own: Collection[str] = (),
    checks: Mapping[str, Check] = {},
    elsewhere: bool = False,
) -> None:
    """Refuse names that nothing has, and paths that are not there.

    Args:
        paths: Flags of the command that take a path.
        named: Flags that take names, joined by ``+``, and what has them: names, or tables as ``"module:TABLE"``.
        own: Flags that mean something else in this command than in all others.
        checks: What else refuses the value of a flag, in the place of what all commands have in `EVERYWHERE`.
        elsewhere: The device may be that of another machine.
    Raises: UserError that names the flag, the value and what is spelt most like it.
    """
    for flag, value in given_values(args):
        if not value or flag in own:
            continue
        if flag in checks:
            checks[flag](flag, value)
        elif flag in named:
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


def named_places(command: Any) -> dict[str, Check]:
    """The checks of a command's own options that take a folder, or a model, with a name before it."""
    checks = {"[NAME=]FOLDER": refuse_named_folder, "NAME=FOLDER": refuse_named_folder, "NAME=PLACE": refuse_named_subject}
    return {flag: checks[one.metavar] for one in command.params if one.metavar in checks for flag in one.opts if flag[0] == "-"}


def refuse_named_folder(flag: str, value: str) -> None:
    """Refuse NAME=FOLDER, or FOLDER, that is not there."""
    place = value.rpartition("=")[2]
    if not _there(value) and not _there(place):
        raise UserError(f"{flag} {place} does not exist. Check the path.")


def refuse_named_subject(flag: str, value: str) -> None:
    """Refuse NAME=PLACE whose place `refuse_subject` refuses."""
    name, separator, place = value.partition("=")
    if not name or not separator:
        raise UserError(f"{flag} must be NAME=PLACE, got {value!r}.")
    refuse_subject(flag, place)


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
    if name in known or "://" in name or Path(name).expanduser().exists():
        return
    if HUB_ID.fullmatch(name) and local_folder(name) is not None:
        return
    raise UserError(
        f"{flag} {name} must be a folder of a chat model, a diffusers pipeline or an adapter, got none of them. Check the path; "
        f"bundled are {', '.join(known)}.{close_to(name, known)}"
    )


def refuse_chat_folder(flag: str, name: str) -> None:
    """Refuse what is neither the folder of a chat model nor ``chat/STAGE`` of the chat world."""
    known = ["chat", *(f"chat/{stage}" for stage in table_names("valign.worlds.chat:STAGES"))]
    if name not in known and not Path(name).expanduser().exists():
        raise UserError(
            f"{flag} {name} does not exist. Give a chat model's folder, or one of {', '.join(known)}.{close_to(name, known)}"
        )


def refuse_pipeline(flag: str, name: str) -> None:
    """Refuse what is not a diffusion model, whatever flag names it."""
    refuse_model(name)


def refuse_encoder(flag: str, name: str) -> None:
    """Refuse what is neither a folder nor the id of a transformers model; ``minilm`` and the worlds' names are bundled."""
    if name not in ("minilm", *bundled()) and not Path(name).expanduser().exists():
        if "/" not in name and (near := close_to(name, ["minilm", *bundled()])):
            raise UserError(f"{flag} {name} does not exist. Give a model's folder, or a hub id such as owner/name.{near}")
        fetched(name, "config.json")


def refuse_clip(flag: str, name: str) -> None:
    """Refuse what is neither a CLIP's folder nor that of a world."""
    known = ["none", "oracle", *bundled()]
    if name not in known and not Path(name).expanduser().exists():
        raise UserError(f"{flag} {name} does not exist. Give a CLIP's folder, or one of {', '.join(known)}.{close_to(name, known)}")


def refuse_chat(flag: str, place: str) -> None:
    """Refuse what is neither an address nor the folder of a chat model."""
    if not place.startswith(ADDRESS) and not Path(place).expanduser().exists():
        raise UserError(f"{flag} must be an endpoint's address (http://...) or the folder of a chat model, got {place!r}.")


def refuse_judge(flag: str, name: str) -> None:
    """Refuse what is neither a judge of answers, nor an address, nor a folder."""
    place = name.removeprefix("guard=")
    if name not in JUDGES and not place.startswith(ADDRESS) and not Path(place).expanduser().exists():
        raise UserError(
            f"{flag} must be {', '.join(JUDGES)}, guard=FOLDER or ADDRESS, FOLDER or ADDRESS of a chat model; got {name!r}."
            f"{close_to(name, JUDGES)} Check the name or the path."
        )


def refuse_address(flag: str, place: str) -> None:
    """Refuse what is not the address of an endpoint."""
    if not place.startswith(ADDRESS):
        raise UserError(f"{flag} must be an endpoint's address, such as http://localhost:8000/v1, got {place!r}.")


def refuse_unset(flag: str, name: str) -> None:
    """Refuse an environment variable that holds nothing."""
    if not os.environ.get(name):
        raise UserError(f"{flag}: the variable {name} must hold the endpoint's key, got nothing. Export it.")


def refuse_unpaired(flag: str, text: str) -> None:
    """Refuse another form than NAME=VALUE."""
    name, separator, _ = text.partition("=")
    if not name or not separator:
        raise UserError(f"{flag} must be NAME=VALUE, got {text!r}.")


def refuse_tracker(flag: str, name: str) -> None:
    """Refuse a tracker that accelerate does not bring, or whose package is missing."""
    check_trackers([name])


def refuse_other_tables(args: Sequence[str], flags: Collection[str]) -> None:
    """Refuse ``--column OPTION.NAME=THEIRS`` of an option that the command does not have. Args: flags: All that it has."""
    for flag, text in given_values(args):
        table, separator, _ = text.partition("=")[0].partition(".")
        if flag == "--column" and separator and f"--{table}" not in flags:
            raise UserError(
                f"--column {text} must name a table's option before the dot, got {table}.{close_to(f'--{table}', flags)}"
            )


def refuse_layout(flag: str, name: str) -> None:
    """Refuse what is not a layout of prompt files."""
    from valign.data.prompts.layouts import LAYOUTS

    check_choice(flag, name, LAYOUTS)


def refuse_fidelity(flag: str, name: str) -> None:
    """Refuse what reads no images."""
    check_choice(flag, name, ["oracle", "none", *bundled()])


def refuse_categories(policy: str, names: Sequence[str]) -> None:
    """Refuse categories that a policy does not have. Args: policy: As ``--policy`` names it."""
    if names:
        from valign.policy import load_policy

        rules = load_policy(policy)
        for name in names:
            rules.category(name)


def refuse_other_base(model: str, adapters: Iterable[str | Path], *, anyway: bool) -> None:
    """Refuse adapters whose records name another model than the pipeline in this folder, by the files alone.

    Args:
        model: As ``--model`` names it. Of a world's model, and of one that is not here yet, loading says it.
        adapters: Folders or files.
        anyway: Only warn.
    """
    folder = None if model in bundled() else local_folder(model)
    if folder is None or not (folder / "model_index.json").is_file():
        return
    from valign.models.files.adapter_base import check_record
    from valign.models.files.adapter_index import index_adapter
    from valign.models.files.fingerprint import fingerprint_folder

    family = FAMILIES.get(str(read_json(folder / "model_index.json").get("_class_name")))
    for adapter in adapters:
        found = index_adapter(adapter)
        if found.metadata:
            own = {"base": str(folder), "base_fingerprint": fingerprint_folder(folder), "family": family}
            check_record(found.folder, found.metadata, own, anyway=anyway)


# flags that mean the same in every command
EVERYWHERE: Mapping[str, Check] = {
    **dict.fromkeys(("--policy", "-p", "--guard", "-g"), refuse_policy),
    **dict.fromkeys(("--detector", "--filter-detector", "--check"), refuse_detector),
    **dict.fromkeys(("--suite", "-s"), refuse_suite),
    **dict.fromkeys(("--before", "--after"), refuse_subject),
    **dict.fromkeys(("--key-env", "--api-key-env", "--judge-key-env"), refuse_unset),
    **dict.fromkeys(("--column", "--fill"), refuse_unpaired),
    "--clip": refuse_clip,
    "--fidelity": refuse_fidelity,
    "--chat": refuse_chat,
    "--judge": refuse_judge,
    "--endpoint": refuse_address,
    "--judge-images": refuse_named_folder,
    "--tracker": refuse_tracker,
}


def _there(value: str) -> bool:
    """A path, or a name that stands for one."""
    return value in (*bundled(), "shipped") or Path(value).expanduser().exists()


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
