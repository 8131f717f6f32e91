"""Checkpoints: factors, optimizer and counters, as safetensors and JSON only. A folder is whole or not there.

Draws are named, not counted (see `draws`), and the learning rate is a function of the step: no generator and no scheduler is saved.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from valign.checks import UserError
from valign.files import atomic_folder, read_json, write_json

FORMAT = 1
REFERENCE = "tensor"


@dataclass(frozen=True)
class Checkpoints:
    """The folder ``RUN/checkpoints`` with its ``step-N``."""

    folder: Path

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that are saved, ascending; half-written folders have another name and do not count."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def save(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write everything that the next step depends on.

        ``state`` is JSON-able; floats survive JSON exactly. ``extra`` is nested and may hold tensors; `extra` reads it again.
        """
        tensors, plain = _split_state(optimizer)
        with atomic_folder(self.path(step), force=True) as folder:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in parameters.items()}, folder / "adapter.safetensors"
            )
            save_file(tensors, folder / "optimizer.safetensors")
            write_json(folder / "state.json", {"format": FORMAT, "step": step, "optimizer": plain, **state})
            if extra is not None:
                parts: dict[str, Tensor] = {}
                write_json(folder / "extra.json", _without_tensors(extra, parts))
                save_file(parts, folder / "extra.safetensors")
        return self.path(step)

    def extra(self, step: int) -> Any:
        """What `save` got as ``extra``, tensors on the CPU."""
        return _with_tensors(read_json(self.path(step) / "extra.json"), _read(self.path(step) / "extra.safetensors"))

    def load(self, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Write the factors (and the optimizer's state) back in place; return ``state``.

        Raises: UserError if the checkpoint is of other modules or is damaged.
        """
        folder = self.path(step)
        state = read_json(folder / "state.json")
        saved = _read(folder / "adapter.safetensors")
        if sorted(saved) != sorted(parameters):
            differing = sorted(set(saved) ^ set(parameters))
            raise UserError(f"{folder} was made with other modules: {', '.join(differing[:4])}. Use the same rank and targets.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        if optimizer is not None:
            _restore_state(optimizer, _read(folder / "optimizer.safetensors"), state["optimizer"])
        return state

    def prune(self, keep: int, *, also: int) -> None:
        """Delete all but the ``keep`` latest checkpoints and that of step ``also``."""
        for step in self.steps()[:-keep]:
            if step != also:
                shutil.rmtree(self.path(step), ignore_errors=True)


def _split_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as tensors and numbers, each named ``<parameter index>.<entry>``."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def _restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _without_tensors(value: Any, parts: dict[str, Tensor]) -> Any:
    """``value`` with each tensor moved to ``parts``; ``{"tensor": its name there}`` stands in its place.

    A mapping whose only key is "tensor", of its own, is written with a backslash before the key.
    """
    if isinstance(value, Tensor):
        name = str(len(parts))
        parts[name] = value.detach().cpu().clone().contiguous()
        return {REFERENCE: name}
    if isinstance(value, Mapping):
        before = "\\" if _like_reference(value) else ""
        return {f"{before}{name}": _without_tensors(entry, parts) for name, entry in value.items()}
    return [_without_tensors(entry, parts) for entry in value] if isinstance(value, list | tuple) else value


def _with_tensors(value: Any, parts: Mapping[str, Tensor]) -> Any:
    """Undo `_without_tensors`."""
    if isinstance(value, dict):
        if set(value) == {REFERENCE}:
            return parts[value[REFERENCE]]
        before = "\\" if _like_reference(value) else ""
        return {name.removeprefix(before): _with_tensors(entry, parts) for name, entry in value.items()}
    return [_with_tensors(entry, parts) for entry in value] if isinstance(value, list) else value


def _like_reference(value: Mapping[str, Any]) -> bool:
    """Whether the only key is "tensor", or that after backslashes."""
    return [str(name).lstrip("\\") for name in value] == [REFERENCE]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read: {error}. Delete its folder; the run goes on from the checkpoint before."
        ) from error
