"""What is checked, by name: a chat model or a diffusion model, with an adapter or without, before loading anything."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from valign.checks import UserError
from valign.evaluation.chats.systems import check_same_base
from valign.files import read_json
from valign.models.files.adapter_index import PEFT_WEIGHTS, WEIGHTS
from valign.models.files.hub import local_folder
from valign.models.files.origin import model_origins
from valign.worlds import CHAT_WORLDS, WORLDS

Kind = Literal["chat", "diffusion"]
DENOISER = ("cross_attention_dim", "in_channels", "sample_size", "block_out_channels")  # equal in models of one base


@dataclass(frozen=True)
class Subject:
    """A model's folder and an adapter's, which is added to it; ``name`` is what the user called it."""

    name: str
    kind: Kind
    folder: Path
    adapter: Path | None = None


def find_subjects(before: str, after: str, *, base: str = "") -> tuple[Subject, Subject]:
    """The two sides of a comparison.

    Args:
        before, after: A folder of a transformers chat model, a diffusers pipeline (or its hub id, if it is cached), an
            adapter's folder or that of the run that made it; ``shapes``; ``chat``, or ``chat:STAGE`` of the chat world.
        base: The model under adapters; the other side's, if left out.
    Raises: UserError for a place that is none of these, an adapter without a base, and sides that are not one model before and
        after a change.
    """
    found = [_place(name) for name in (before, after)]
    whole = [one for one in ([_place(base)] if base else []) + found if isinstance(one, Subject)]
    if base and (not isinstance(found_base := _place(base), Subject)):
        raise UserError(f"--base must be a whole model, got the adapter {found_base}. Name the model that it was made for.")
    if not whole:
        raise UserError("--base must name the model under the adapters, got nothing. Name it, or give one side as a whole model.")
    sides = [
        one if isinstance(one, Subject) else replace(whole[0], name=name, adapter=one) for name, one in zip((before, after), found)
    ]
    _same_base(sides)
    return sides[0], sides[1]


def _same_base(sides: Sequence[Subject]) -> None:
    first, second = sides
    if first.kind != second.kind:
        raise UserError(
            f"{first.name} and {second.name} must be of one kind, got {first.kind} and {second.kind}. Compare models of one kind."
        )
    if first.folder == second.folder:
        return
    if first.kind == "chat":
        check_same_base(first.folder, second.folder)
        return
    configs = [read_json(one.folder / "unet" / "config.json") for one in sides]
    differing = [name for name in DENOISER if configs[0].get(name) != configs[1].get(name)]
    if differing or not set(model_origins(first.folder)) & set(model_origins(second.folder)):
        what = f"another {differing[0]}" if differing else "another autoencoder"
        raise UserError(f"{first.name} and {second.name} must be one model before and after a change, got {what}.")


def _place(name: str) -> Subject | Path:
    """A whole model, or the folder of an adapter."""
    world, _, stage = name.partition(":")
    if name in WORLDS:
        return Subject(name, "diffusion", WORLDS[name].model_folder())
    if world in CHAT_WORLDS:
        chats = CHAT_WORLDS[world]
        if stage in chats.adapters:
            return chats.adapter_folder(stage)
        return Subject(name, "chat", chats.model_folder(stage) if stage else chats.model_folder())
    folder = Path(name).expanduser()
    for path in (folder, folder / "adapter"):
        if (path / "model_index.json").exists():
            return Subject(name, "diffusion", path)
        if (path / WEIGHTS).exists() or (path / PEFT_WEIGHTS).exists():
            return path
        if (path / "config.json").exists():
            return Subject(name, "chat", path)
    cached = None if folder.is_dir() else local_folder(name)
    if cached is None:
        raise UserError(
            f"{name} must be a folder of a chat model, a diffusers pipeline or an adapter, got none of them. "
            f"Check the path; bundled are {', '.join((*WORLDS, *CHAT_WORLDS))}."
        )
    return Subject(name, "diffusion", cached)
