"""The merging step of the chain: experts in, one adapter out, by any of the merges, with a run record."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_choice
from valign.data.prompts.pairs import PromptPair
from valign.files import hash_value
from valign.merging import (
    MERGES,
    Expert,
    co_merge,
    collect_votes,
    merge_metadata,
    save_selection,
    selection_report,
    write_merge,
)
from valign.models.diffusion.base import DiffusionModel
from valign.runs import Run


def calibration_prompts(pairs: Sequence[PromptPair], categories: Sequence[str]) -> dict[str, list[str]]:
    """Unsafe training prompts by category, in the order of the data."""
    return {name: [pair.unsafe for pair in pairs if name in pair.categories] for name in categories}


def merge_experts(
    model: DiffusionModel,
    experts: Sequence[Expert],
    pairs: Sequence[PromptPair],
    out: Path,
    *,
    merge: str = "co-merge",
    per_category: int = 64,
    seed: int = 0,
    scores: Callable[[], Mapping[str, float]] | None = None,
) -> Path:
    """Merge the experts at their weights; returns the adapter's folder, ``out/adapter``. A finished merge is not repeated.

    Args:
        merge: A name in `MERGES`.
        per_category: Training prompts of each expert's category that vote in Co-Merge.
        scores: Share of harmful images by expert, lower is better; called only if ``merge`` is ``"best-single"``.
    Raises: UserError for another name, best-single without scores, and whatever the merge refuses.
    """
    check_choice("merge", merge, MERGES)
    if merge == "best-single" and scores is None:
        raise UserError("merge must not be best-single without scores of the experts. Choose another, or use `valign merge`.")
    inputs = {expert.name: expert.file.fingerprint() for expert in experts}
    recipe: dict[str, Any] = {"merge": merge, "weights": [expert.weight for expert in experts]}
    if merge == "co-merge":
        prompts = calibration_prompts(pairs, [expert.name for expert in experts])
        inputs, recipe = inputs | {"prompts": hash_value(prompts)}, recipe | {"per_category": per_category}
    run = Run.open(out, step="merge", recipe=recipe, inputs=inputs, seed=seed)
    if run.done and (out / "adapter").is_dir():
        return out / "adapter"
    shutil.rmtree(out / "adapter", ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
    options: dict[str, Any] = {}
    if merge == "co-merge":
        votes = collect_votes(model, experts, prompts, per_category=per_category, seed=seed)
        report = selection_report(votes)
        save_selection(report, out)
        made = write_merge(
            co_merge(experts, votes),
            out / "adapter",
            merge_metadata(merge, experts, {"per_category": per_category, "seed": seed, "granularity": "output"}),
        )
        made["shares"] = dict(zip(report.experts, report.shares))
    else:
        if scores is not None and merge == "best-single":
            options["scores"] = scores()
        if merge == "dare-ties":
            options["seed"] = seed
        streamed = MERGES[merge](experts, **options)  # type: ignore[operator]
        made = write_merge(streamed, out / "adapter", merge_metadata(merge, experts, options))
    run.finish(**made)
    return out / "adapter"
