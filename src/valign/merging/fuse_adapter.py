"""An adapter added to the weights of its model for good: a folder like any other model's, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor

from valign.checks import UserError, check_range
from valign.files import atomic_folder
from valign.models.diffusion.adapter_base import check_base
from valign.models.files.adapter_files import open_adapter
from valign.models.files.finite import check_finite
from valign.models.files.weight_files import copy_rest, open_weights, write_shards

WEIGHT = ".weight"


def fuse_adapter(model: Path, adapter: Path, out: Path, *, weight: float = 1.0, anyway: bool = False) -> Path:
    """Write the model of the folder ``model`` with ``weight`` times the adapter's change in its denoiser; returns ``out``.

    Args: anyway: Also take an adapter whose record names another model.
    Raises: UserError if the adapter was made for another model or does not fit this one, or ``out`` exists.
    """
    check_range("fuse_adapter.weight", weight)
    weights, file = open_weights(model), open_adapter(adapter)
    shapes, changed = weights.shapes, set(file.modules)
    check_base(model, file, anyway=anyway)
    for module, factors in file.items():
        known = shapes.get(module + WEIGHT)
        if known is None or known.shape[0] != factors.shape[0]:
            raise UserError(f"{adapter} must fit {model}, got a change of {module}, which the model has not in this shape.")

    def make(name: str) -> Tensor:
        module = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or module not in changed:
            return weights.read(name)
        before = weights.read(name)
        change = file.factors(module).delta() * weight
        found = (before.to(torch.float32) + change.reshape(before.shape)).to(before.dtype)
        check_finite(f"{model} with {adapter}", {name: found})
        return found

    with atomic_folder(out) as work:
        place = work / weights.folder.relative_to(weights.model)
        place.mkdir(parents=True, exist_ok=True)
        write_shards(place, weights.stem, shapes, make)
        copy_rest(weights, work)
    return out
