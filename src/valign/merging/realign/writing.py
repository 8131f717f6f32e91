"""Write a realigned model: whole, in shards that a stopped call goes on from, or as an adapter."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from valign.checks import UserError, check_choice, check_range
from valign.files import read_json, write_json
from valign.merging.compress import compress, compress_dense, trimmed
from valign.merging.deltas import Delta, DenseDelta, add, inner, minus
from valign.merging.realign.base import Change, RealignContext, RealignMethod, no_safety
from valign.merging.realign.opening import Model, Realignment
from valign.merging.realign.vectors import WEIGHT, WeightVectors, finite
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.models.files.adapter_index import PEFT_WEIGHTS
from valign.models.files.finite import all_finite
from valign.models.files.weight_files import SHARD, WeightFolder, copy_rest, write_shards
from valign.progress import track
from valign.runs import Run

Form = Literal["auto", "model", "adapter"]
RECORD = "realign.json"  # beside a whole model's weights


def realign(
    method: RealignMethod,
    what: Realignment,
    out: Path,
    *,
    name: str,
    form: Form = "auto",
    rank: int | None = None,
    shard_size: int = SHARD,
    objective: Any = None,
) -> dict[str, Any]:
    """Realign into the new folder ``out``, one weight in memory at a time; return what was done.

    The work is done in a hidden folder beside ``out`` that takes its name at the end: a stopped call goes on from the last finished
    shard, a mistake leaves nothing. A finished run of the same things is only returned.

    Args:
        method: A row of `REALIGN` with its options.
        name: Of the method, for the record.
        form: ``"adapter"`` for LoRA adapters only; ``"auto"`` is an adapter where the fine-tuned models are and the result is
            exactly low-rank, or ``rank`` is set, and a whole model otherwise.
        rank: Of the adapter in every module; the relative error is reported. None: whatever it needs.
        shard_size: Bytes of a file of weights.
        objective: `SafetyPreferences` of a method that learns.
    Returns: ``form``, ``weights`` (their number), ``moved`` (norm of realigned minus fine-tuned, as a share of the fine-tuning's),
        ``kept`` (how far the result goes along the fine-tuning, as a share of it), ``files`` or ``ranks``, and what the method
        found.
    Raises: UserError for what the method refuses, a result that is not finite, an adapter that would have to be dense, or an
        ``out`` that is something else.
    """
    chosen = chosen_form(method, what, form, rank)
    recipe = {"method": name, **method.record(), "form": chosen, "rank": rank, "shard_size": shard_size}
    inputs = {"vectors": what.vectors.fingerprint(), **({"root": what.root.fingerprint()} if what.root else {})}
    if objective is not None:
        inputs["objective"] = objective.fingerprint()
    seed = getattr(method, "seed", 0)
    if out.exists() and any(out.iterdir()):
        if not (out / "run.json").exists():
            raise UserError(f"{out} exists and is not a realignment. Choose another --out, or delete it first.")
        run = Run.open(out, step=f"realign {name}", recipe=recipe, inputs=inputs, seed=seed)
        if run.done:
            return run.results
    _apart(out, what)
    work = out.with_name(f".{out.name}.partial")
    run = Run.open(work, step=f"realign {name}", recipe=recipe, inputs=inputs, seed=seed)
    context = RealignContext(folder=work, objective=objective)
    try:
        change = method.prepare(what.vectors, context)
        tally = Tally(work / "tally.json")
        if chosen == "model":
            made = _write_model(what, change, work, tally, shard_size)
        else:
            made = _write_adapter(what, change, work, tally, rank, _record(name, method, what))
        if not tally.safety and method.uses_safety:
            raise no_safety("--aligned")
    except (UserError, ValueError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    results = {
        "form": chosen,
        "weights": len(what.vectors),
        "moved": tally.moved(),
        "kept": tally.kept(),
        **made,
        **context.results,
    }
    write_json(work / RECORD, {**_record(name, method, what), **results})
    for rest in (work / "survey.json", work / "tally.json", *work.rglob(".*.tmp")):  # the last were left by a killed call
        rest.unlink(missing_ok=True)
    run.finish(**results)
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)
    return results


def chosen_form(method: RealignMethod, what: Realignment, form: Form, rank: int | None) -> Literal["model", "adapter"]:
    """What `realign` writes. Raises: UserError for a form that these models cannot have."""
    check_choice("form", form, ("auto", "model", "adapter"))
    if rank is not None:
        check_range("rank", rank, low=1)
    if what.adapter is None:
        if form == "adapter" or rank is not None:
            raise UserError("A realignment of whole models must be a whole model, got form 'adapter' or a rank. Leave them out.")
        return "model"
    dense = method.adds_safety and isinstance(what.aligned, WeightFolder)
    if form == "adapter" and dense and rank is None:
        raise UserError(
            "An adapter must be low-rank, got a dense safety vector, the difference of two whole models. Set a rank to cut it off "
            "(the error is reported), or write a whole model."
        )
    if form == "model" or (form == "auto" and dense and rank is None):
        if what.root is None:
            raise UserError("A whole result must have a base to add to, got none. Name its folder by --base.")
        if rank is not None:
            raise UserError("A whole result has no rank, got one. Leave it out, or write an adapter.")
        return "model"
    return "adapter"


class Tally:
    """How far the result is from the fine-tuned models, summed over the weights as they are written; kept for a resumed call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[str, list[float]] = read_json(path) if path.exists() else {}

    def add(self, at: WeightVectors, change: Delta) -> None:
        task = at.tasks[0] if len(at.tasks) == 1 else add([one.folded(1 / len(at.tasks)) for one in at.tasks])
        gap = minus(change, task)
        self.sums[at.name] = [inner(at.safety, at.safety), inner(task, task), inner(gap, gap), inner(gap, task)]

    def save(self) -> None:
        """To go on from after a finished shard."""
        write_json(self.path, self.sums)

    @property
    def safety(self) -> float:
        """Squared norm of the safety vector."""
        return sum(row[0] for row in self.sums.values())

    def moved(self) -> float | None:
        """Norm of realigned minus (mean) fine-tuned, over that of the fine-tuning; None if that is zero."""
        task, gap = self._sum(1), self._sum(2)
        return (gap / task) ** 0.5 if task > 0 else None

    def kept(self) -> float | None:
        """How far the result goes along the (mean) fine-tuning, as a share of it: 1 is all of it, 0 none; None if that is zero."""
        task = self._sum(1)
        return 1 + self._sum(3) / task if task > 0 else None

    def _sum(self, place: int) -> float:
        return sum(row[place] for row in self.sums.values())


def _write_model(what: Realignment, change: Change, work: Path, tally: Tally, shard_size: int) -> dict[str, Any]:
    template, root = what.template, what.root
    assert template is not None
    assert root is not None
    place = work / template.folder.relative_to(template.model)
    place.mkdir(parents=True, exist_ok=True)
    offset = what.offset
    held = set(offset.names) if offset else set()
    asked = set(what.vectors.names)
    shapes = template.shapes
    progress = track(_endless(), "writing weights", total=len(shapes))

    def make(name: str) -> Tensor:
        next(progress)
        if name in what.copied or (name not in asked and name not in held):
            return template.read(name)
        weight = finite(root, name)
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        if name in asked:
            at = what.vectors.read(name)
            moved = change(at)
            tally.add(at, moved)
            total += moved.delta().reshape(total.shape)
        if offset is not None and name in held:
            total += offset.delta(name).delta().reshape(total.shape)
        return _rounded(total, shapes[name].dtype, name)

    files = write_shards(place, template.stem, shapes, make, limit=shard_size, before=tally.save)
    progress.close()  # type: ignore[attr-defined]
    copy_rest(template, work)
    return {"files": files, "copied": list(what.resized)}


def _endless() -> Iterator[None]:
    while True:
        yield None


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises: UserError if the result, or its rounding, is not finite."""
    result = tensor.to(dtype)
    if not all_finite(result):
        raise UserError(f"The realigned {name} must be finite in {dtype}, got NaN or infinity. Lower the strength.")
    return result


def _write_adapter(
    what: Realignment, change: Change, work: Path, tally: Tally, rank: int | None, record: Mapping[str, Any]
) -> dict[str, Any]:
    file, offset = what.adapter, what.offset
    assert file is not None
    errors: dict[str, float] = {}
    ranks: list[int] = []
    modules = {f"{module}{WEIGHT}" for one in what.finetuned for module in one.entries}  # type: ignore[union-attr]
    if offset is not None:
        modules |= set(offset.names)
    elif not isinstance(what.aligned, WeightFolder):
        modules |= set(what.vectors.safety.names)
    outside = 0.0

    def stream() -> Iterator[tuple[str, LoraFactors]]:
        nonlocal outside
        for at in track(what.vectors.items(), "writing modules", total=len(what.vectors)):
            if at.name not in modules:
                outside += inner(at.safety, at.safety)
                tally.sums[at.name] = [inner(at.safety, at.safety), 0.0, 0.0, 0.0]
                continue
            moved = change(at)
            tally.add(at, moved)
            parts = [moved, offset.delta(at.name)] if offset is not None and at.name in offset.names else [moved]
            lora = _low_rank(add(parts), rank, at.name, errors)
            if lora.rank:
                ranks.append(lora.rank)
                module = at.name.removesuffix(WEIGHT)
                yield module, replace(lora, kernel=file.entries[module].kernel if module in file.entries else None)

    save_adapter(work, stream(), metadata=record, prefix=file.prefix, peft=file.tensors.path.name == PEFT_WEIGHTS)
    found: dict[str, Any] = {"ranks": [min(ranks), max(ranks)]}
    if errors:
        found["error_mean"], found["error_worst"] = sum(errors.values()) / len(errors), max(errors.values())
    if outside:
        found["safety_outside"] = outside / tally.safety  # share of the safety vector's energy that the adapter cannot hold
    return found


def _low_rank(delta: Delta, rank: int | None, name: str, errors: dict[str, float]) -> LoraFactors:
    if isinstance(delta, DenseDelta):
        if rank is None:
            raise UserError(f"An adapter must be low-rank, got a dense change of {name}. Set a rank, or write a whole model.")
        lora, errors[name] = compress_dense(delta.matrix, rank)
        return lora
    lora = trimmed(delta)
    if rank is None or lora.rank <= rank:
        return lora
    lora, errors[name] = compress(lora, rank)
    return lora


def _record(name: str, method: RealignMethod, what: Realignment) -> dict[str, Any]:
    """Provenance, JSON-able, without clock."""
    first = what.adapter.metadata if what.adapter else {}
    kept = {key: first[key] for key in ("base_fingerprint", "family", "prediction", "policy", "policy_hash") if key in first}
    # an adapter is of the model that its fine-tuning's was of: the aligned one, if that is a whole model
    base = str(what.root.model) if what.root is not None else what.base
    return {
        "method": f"realign {name}",
        "options": method.record(),
        "base": first.get("base", base),
        "aligned": _called(what.aligned),
        "finetuned": [_called(one) for one in what.finetuned],
        **kept,
    }


def _called(model: Model) -> dict[str, str]:
    folder = model.model if isinstance(model, WeightFolder) else model.folder
    return {"name": folder.resolve().name, "sha256": model.fingerprint()}


def _apart(out: Path, what: Realignment) -> None:
    """The result must not be one of its inputs, nor lie within one."""
    for model in (what.root, what.aligned, *what.finetuned):
        folder = None if model is None else model.model if isinstance(model, WeightFolder) else model.folder
        if folder is not None and out.resolve() == folder.resolve():
            raise UserError(f"--out must be another folder than the models, got {out}. Choose another.")
