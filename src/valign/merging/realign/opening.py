"""Open base, aligned and fine-tuned models for a realignment, whole or as adapters, and check that they belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from valign.checks import UserError, check_choice
from valign.files import read_json
from valign.merging.experts import listed
from valign.merging.realign.base import no_safety
from valign.merging.realign.vectors import WEIGHT, AdapterChanges, FolderChanges, Vectors
from valign.models.files.adapter_base import chat_record, check_record
from valign.models.files.adapter_files import AdapterFile, open_adapter
from valign.models.files.adapter_index import PEFT_CONFIG, PEFT_WEIGHTS
from valign.models.files.tensor_stream import TensorShape
from valign.models.files.weight_files import WeightFolder, open_weights, same_weights

Start = Literal["aligned", "base"]
Model = WeightFolder | AdapterFile


@dataclass(frozen=True)
class Realignment:
    """What is realigned, opened and checked. ``root + offset`` is where the fine-tunings started."""

    vectors: Vectors
    root: WeightFolder | None  # None if the base is not here, and everything else is an adapter of it
    offset: AdapterChanges | None  # the safety adapter, where the fine-tunings go on from it
    finetuned: tuple[Model, ...]
    aligned: Model
    base: str
    copied: tuple[str, ...] = ()  # weights of the first fine-tuned model that are taken as they are: integers, other shapes
    resized: tuple[str, ...] = ()  # of these, the ones of another shape

    @property
    def adapter(self) -> AdapterFile | None:
        """The first fine-tuned model, if it is an adapter."""
        first = self.finetuned[0]
        return first if isinstance(first, AdapterFile) else None

    @property
    def template(self) -> WeightFolder | None:
        """The folder that a whole result looks like: dtypes, names, and the files beside the weights."""
        first = self.finetuned[0]
        return first if isinstance(first, WeightFolder) else self.root

    @property
    def shapes(self) -> dict[str, TensorShape]:
        """Of a whole result."""
        assert self.template is not None
        return self.template.shapes


def open_realignment(
    base: str | Path,
    aligned: str | Path,
    finetuned: Sequence[str | Path],
    *,
    start: Start = "aligned",
    copy_resized: bool = False,
    allow_base_mismatch: bool = False,
) -> Realignment:
    """Open and check everything that can be told without reading the weights.

    Args:
        base: Folder of the model before its safety training. Where all others are adapters of it, it may be any name.
        aligned: Folder of the aligned model, or a LoRA adapter of ``base``.
        finetuned: Folders of whole models, or LoRA adapters: of the aligned model if that is a whole one, of ``base`` otherwise
            (trained on from the aligned adapter with ``start="aligned"``).
        start: What the fine-tunings started from.
        copy_resized: Take weights whose shape the fine-tuning changed (a larger vocabulary) from the fine-tuned model as they are,
            instead of refusing them.
        allow_base_mismatch: Accept adapters whose records name different base models.
    Raises: UserError for folders that are missing, quantised or pickles, differ in their weights' names or shapes, adapters of
        another model, a mixture of whole models and adapters, or an aligned model that is its base.
    """
    check_choice("start", start, ("aligned", "base"))
    if not finetuned:
        raise UserError("--finetuned must name at least one model, got none.")
    opened = {name: _open(path) for name, path in zip(_names(finetuned), finetuned, strict=True)}
    safe = _open(aligned)
    kinds = {isinstance(one, AdapterFile) for one in opened.values()}
    if len(kinds) > 1:
        raise UserError("--finetuned must be whole models or adapters, got both. Merge the adapters into their models first.")
    adapters = [one for one in (safe, *opened.values()) if isinstance(one, AdapterFile)]
    if not allow_base_mismatch:
        _check_bases(adapters)
    if isinstance(safe, AdapterFile):
        return _of_safety_adapter(base, safe, opened, start, copy_resized, anyway=allow_base_mismatch)
    root = open_weights(base)
    _check_alike("base", root, "aligned", safe)
    if same_weights(root, safe):
        raise no_safety("--aligned")
    if True in kinds:
        begin = safe if start == "aligned" else root
        for name, file in opened.items():
            if isinstance(file, AdapterFile):
                _check_adapter(name, file, begin)
        copied = tuple(name for name, known in begin.shapes.items() if not known.dtype.is_floating_point)
        tasks = {name: AdapterChanges(file) for name, file in opened.items() if isinstance(file, AdapterFile)}
        vectors = Vectors(FolderChanges(safe, root, frozenset(copied)), tasks)
        return Realignment(vectors, begin, None, tuple(opened.values()), safe, str(base), copied)
    return _of_folders(base, root, safe, opened, start, copy_resized)


def _of_folders(
    base: str | Path, root: WeightFolder, safe: WeightFolder, opened: Mapping[str, Any], start: Start, copy_resized: bool
) -> Realignment:
    begin = safe if start == "aligned" else root
    copied, resized = _check_folders(begin, opened, copy_resized)
    left = frozenset(copied)
    tasks = {name: FolderChanges(folder, begin, left) for name, folder in opened.items()}
    vectors = Vectors(FolderChanges(safe, root, left), tasks)
    return Realignment(vectors, begin, None, tuple(opened.values()), safe, str(base), copied, resized)


def _of_safety_adapter(
    base: str | Path, safe: AdapterFile, opened: Mapping[str, Model], start: Start, copy_resized: bool, *, anyway: bool
) -> Realignment:
    """The aligned model is the base with an adapter."""
    folder = Path(base).expanduser()
    root = open_weights(folder) if folder.is_dir() else None
    if root is not None:
        _check_adapter("the aligned adapter", safe, root)
        if "model_type" in root.config:
            check_record(safe.folder, safe.metadata, chat_record(root.folder), anyway=anyway, flag="--allow-base-mismatch")
    continued = start == "aligned"
    offset = AdapterChanges(safe) if continued else None
    files = {name: one for name, one in opened.items() if isinstance(one, AdapterFile)}
    if files:
        for name, file in files.items():
            if root is not None:
                _check_adapter(name, file, root)
            _check_shapes(name, file, safe)
        vectors = Vectors(AdapterChanges(safe), {name: AdapterChanges(file) for name, file in files.items()}, continued=continued)
        return Realignment(vectors, root, offset, tuple(opened.values()), safe, str(base))
    if root is None:
        raise UserError(f"--base {base} must be a model's folder where the fine-tuned model is a whole one, got none. Download it.")
    copied, resized = _check_folders(root, opened, copy_resized)
    left = frozenset(copied)
    tasks = {name: FolderChanges(folder, root, left) for name, folder in opened.items() if isinstance(folder, WeightFolder)}
    vectors = Vectors(AdapterChanges(safe), tasks, continued=continued)
    return Realignment(vectors, root, offset, tuple(opened.values()), safe, str(base), copied, resized)


def _check_folders(begin: WeightFolder, opened: Mapping[str, Any], copy_resized: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weights that are copied, and those of them that have another shape."""
    first = next(iter(opened.values()))
    integers = {name for name, known in first.shapes.items() if not known.dtype.is_floating_point}
    other: set[str] = set()
    for name, folder in opened.items():
        _check_alike("the fine-tuning's start", begin, name, folder, shapes=False)
        other |= {one for one, known in folder.shapes.items() if known.shape != begin.shapes[one].shape}
    if other and (not copy_resized or len(opened) > 1):
        one = min(other)
        raise UserError(
            f"--finetuned must have weights of the shapes of its start, got {first.shapes[one].shape} instead of "
            f"{begin.shapes[one].shape} for {listed(sorted(other))}. Set --copy-resized to take these from the fine-tuned model as "
            "they are (one fine-tuned model), or undo the change of the vocabulary."
        )
    return tuple(sorted(integers | other)), tuple(sorted(other))


def _names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each, told apart by a number where folders are called alike."""
    found: list[str] = []
    for path in paths:
        folder = Path(path)
        name = folder.resolve().parent.name if folder.name == "adapter" else folder.resolve().name
        found.append(f"{name}-{len(found) + 1}" if name in found else name)
    return found


def _open(path: str | Path) -> Model:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{folder} does not exist. Name a model's folder, or an adapter's.")
    if (folder / "model_index.json").exists() or ((folder / "config.json").exists() and not (folder / PEFT_CONFIG).exists()):
        return open_weights(folder)
    return open_adapter(folder, anywhere=True)


def _check_alike(one: str, first: WeightFolder, other: str, second: WeightFolder, *, shapes: bool = True) -> None:
    lone = sorted(set(first.shapes) ^ set(second.shapes))
    if lone:
        raise UserError(
            f"All models must have the same weights; only one of {one} ({first.folder}) and {other} ({second.folder}) has "
            f"{listed(lone)}. Name models of one architecture."
        )
    odd = [name for name in first.shapes if first.shapes[name].shape != second.shapes[name].shape]
    if odd and shapes:
        raise UserError(
            f"All models must have weights of the same shapes, got {first.shapes[odd[0]].shape} of {one} and "
            f"{second.shapes[odd[0]].shape} of {other} for {listed(odd)}. Name models with the same vocabulary."
        )


def _check_adapter(name: str, file: AdapterFile, model: WeightFolder) -> None:
    """An adapter must be of this model. Raises: UserError also for layers whose weight is stored transposed."""
    config = file.folder / PEFT_CONFIG
    if file.tensors.path.name == PEFT_WEIGHTS and config.exists() and read_json(config).get("fan_in_fan_out"):
        raise UserError(
            f"{file.folder} adapts layers whose weights are stored transposed (fan_in_fan_out), which is not supported. "
            "Merge it into its model with peft, and name the result."
        )
    for module, entry in file.entries.items():
        known = model.shapes.get(f"{module}{WEIGHT}")
        shape = None if known is None else (known.shape[0], prod(known.shape[1:]))
        if shape != entry.shape:
            raise UserError(
                f"{name} ({file.folder}) must be an adapter of {model.folder}, got {module} of shape {entry.shape}, where that "
                f"has {'none' if known is None else known.shape}. Name the model that it was trained on."
            )


def _check_shapes(name: str, file: AdapterFile, safe: AdapterFile) -> None:
    odd = [one for one, entry in file.entries.items() if one in safe.entries and safe.entries[one].shape != entry.shape]
    if odd:
        raise UserError(
            f"{name} must be an adapter of the same base as the aligned one, got other shapes in {listed(sorted(odd))}."
        )


def _check_bases(adapters: Sequence[AdapterFile]) -> None:
    """Bases that are not recorded are taken on trust."""
    for key, what in (("base_fingerprint", "fingerprint"), ("base_model_name_or_path", "name")):
        known = {}
        for file in adapters:
            config = file.folder / PEFT_CONFIG
            record = {**(read_json(config) if config.exists() else {}), **file.metadata}
            if record.get(key):
                known[file.folder.as_posix()] = str(record[key]).rstrip("/")
        if len(set(known.values())) > 1:
            told = ", ".join(f"{folder} {said[:60]}" for folder, said in known.items())
            raise UserError(
                f"All adapters must be of one base model, got different ones by {what}: {told}. "
                "Train them on one, or set --allow-base-mismatch."
            )
