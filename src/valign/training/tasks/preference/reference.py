"""Reference errors of every fixed draw, computed once; `precompute_ref_draws` saves a forward per step for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from valign.files import atomic_path, hash_value
from valign.progress import track
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.pair_step import PairStep


@dataclass(frozen=True)
class ReferenceTable:
    """``errors[pair, draw]`` of winner and loser under the base model; two numbers a draw are all that the loss needs of it."""

    errors: Float[Tensor, "pair draw two"]

    def at(self, visits: Sequence[tuple[int, int]]) -> Float[Tensor, " image"]:
        """Errors of ``(pair, visit)``, winners first."""
        pairs, draws = zip(*visits, strict=True)
        chosen = self.errors[torch.tensor(pairs), torch.tensor(draws) % self.errors.shape[1]]
        return chosen.T.flatten()


def reference_table(step: PairStep, source: PairSource, folder: Path, *, safe_caption: bool, batch: int) -> ReferenceTable:
    """Read the table from ``folder`` if it is there, else compute it (each process its part) and write it.

    The file's name is a hash of all that the errors depend on: base weights, precision, data, pairs, draws.
    """
    config, draws = source.config, source.config.precompute_ref_draws
    key = {
        "base": source.model.fingerprint(),
        "dtype": [str(source.dtype), step.accelerator.mixed_precision],
        "data": source.cache.fingerprint(),
        "rows": source.rows.tolist(),
        "draws": [config.seed, draws, config.empty_prompt_prob, config.flip, safe_caption],
    }
    path = folder / f"reference-{hash_value(key)[:16]}.safetensors"
    accelerator = step.accelerator
    if reduce_sum(accelerator, torch.tensor(float(path.exists()), device=accelerator.device)) == accelerator.num_processes:
        return ReferenceTable(load_file(path)["errors"].to(accelerator.device))
    places = [(pair, draw) for pair in range(len(source)) for draw in range(draws)]
    mine = places[accelerator.process_index :: accelerator.num_processes]
    errors = torch.zeros(len(source), draws, 2, device=accelerator.device)
    for start in track(range(0, len(mine), batch), "reference errors", total=-(-len(mine) // batch)):
        part = mine[start : start + batch]
        pairs, visits = (torch.tensor(column) for column in zip(*part, strict=True))
        found = step.errors(source.visit(part, safe_caption=safe_caption), reference=True)
        errors[pairs, visits] = torch.stack(found.chunk(2), dim=1)
    errors = reduce_sum(accelerator, errors)
    if accelerator.is_main_process:
        with atomic_path(path) as temporary:
            save_file({"errors": errors.cpu()}, temporary)
    return ReferenceTable(errors)
