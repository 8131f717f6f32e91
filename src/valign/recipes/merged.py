"""The merging step of the chain: experts in, one adapter out, by any of the merges, with a run record."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from valign.checks import check_choice
from valign.data.prompts.pairs import PromptPair
from valign.files import hash_value
from valign.merging import MERGES, Calibration, Expert, MergeContext, kernels_of, merge_metadata, write_merge
from valign.models.diffusion.base import DiffusionModel
from valign.runs import Run


def calibration_prompts(pairs: Sequence[PromptPair], categories: Sequence[str]) -> dict[str, list[str]]:
    """Unsafe training prompts by category, in the order of the data."""
    return {name: [pair.unsafe for pair in pairs if name in pair.categories] for name in categories}


def merges_without_scores() -> list[str]:
    """Names of the merges that need no score of each expert."""
    return [name for name, kind in MERGES.items() if "scores" not in {item.name for item in fields(kind)}]


def merge_experts(
    model: DiffusionModel,
    experts: Sequence[Expert],
    pairs: Sequence[PromptPair],
    out: Path,
    *,
    merge: str = "sum",
    captions: Sequence[str] = (),
    edits: Sequence[tuple[str, str]] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    kept: Path | None = None,
) -> Path:
    """Merge the experts at their weights; returns the adapter's folder, ``out/adapter``. A finished merge is not repeated.

    Args:
        merge: A name in `MERGES`.
        captions: Benign prompts, for a merge that preserves; the pairs' safe prompts if none are given.
        edits: Concepts and what to generate in their place, for a merge that preserves.
        options: Of the merge, by name.
        kept: Folder where merges of these experts at other weights find what does not depend on the weights.
    Raises: UserError for another name, a merge that needs scores of each expert, and whatever the merge refuses.
    """
    check_choice("merge", merge, merges_without_scores())
    kind = MERGES[merge]
    given = dict(options or {})
    own = ({"seed": seed} if "seed" in {item.name for item in fields(kind)} else {}) | given
    inputs = {expert.name: expert.file.fingerprint() for expert in experts}
    recipe: dict[str, Any] = {"merge": merge, "weights": [expert.weight for expert in experts], "options": given}
    calibration = None
    if kind.calibrated:
        prompts = calibration_prompts(pairs, [expert.name for expert in experts])
        calibration, inputs = Calibration(model=lambda: model, prompts=prompts), inputs | {"prompts": hash_value(prompts)}
        if kind.preserves:
            preserved = tuple(captions) or tuple(dict.fromkeys(pair.safe for pair in pairs))
            calibration = replace(calibration, captions=preserved, edits=edits)
            inputs |= {"captions": hash_value(preserved), "edits": hash_value(list(edits))}
    run = Run.open(out, step="merge", recipe=recipe, inputs=inputs, seed=seed)
    if run.done and (out / "adapter").is_dir():
        return out / "adapter"
    shutil.rmtree(out / "adapter", ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
    method, context = kind(**own), MergeContext(calibration=calibration, folder=out, kept=kept)
    metadata = merge_metadata(merge, experts, {name: getattr(method, name) for name in kind.recorded})
    made = write_merge(
        method(experts, context), out / "adapter", metadata, prefix=experts[0].file.prefix, kernels=kernels_of(experts)
    )
    run.finish(**made, **context.results)
    return out / "adapter"
