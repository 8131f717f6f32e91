"""The baselines that every comparison must contain, as adapters in one format: UCE, ESD-x, ESD-u, one joint DPO adapter.

All take their concepts from the policy, so that everybody removes the same words. Negative prompt and Safe Latent Diffusion need
no adapter; they are guidances (`valign.models.diffusion.guidance`).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from valign.editing.uce import ConceptEdit, edit_concepts
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.base import DiffusionModel
from valign.models.files.adapter_files import save_adapter
from valign.policy import Policy
from valign.runs import Run


def policy_concepts(policy: Policy, categories: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(names, safe counterparts)`` of the policy's concepts that alignment may know, in the order of the file.

    Args:
        categories: Ids; none means all. Held-out concepts are left out: a baseline may not know what the others may not.
    Raises: UserError for an unknown category.
    """
    chosen = [policy.category(name) for name in categories] if categories else policy.categories
    concepts = {concept.name: concept.safe for category in chosen for concept in category.concepts if not concept.held_out}
    return tuple(concepts), tuple(concepts.values())


def make_uce(model: DiffusionModel, edit: ConceptEdit, out: Path, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Compute the edit and write ``out/adapter`` and ``out/run.json``; a finished run is returned as it is."""
    inputs = {"model": model.fingerprint()}
    run = Run.open(out, step="uce", recipe={**asdict(edit), "metadata": dict(metadata or {})}, inputs=inputs)
    if run.done:
        return out / "adapter"
    shutil.rmtree(out / "adapter", ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
    started = perf_counter()
    factors = edit_concepts(model, edit)
    seconds = perf_counter() - started
    origin = {**base_record(model), "method": "uce"}
    record = {**origin, "edit": asdict(edit), **(metadata or {})}
    save_adapter(out / "adapter", factors, metadata=record, prefix=model.components["denoiser"])
    run.finish(
        modules=len(factors),
        rank=max(lora.rank for lora in factors.values()),
        parameters=sum(lora.down.numel() + lora.up.numel() for lora in factors.values()),
        seconds=seconds,
    )
    return out / "adapter"


def concept_edit(policy: Policy, categories: Sequence[str] = (), *, guide: str = "empty", **options: Any) -> ConceptEdit:
    """The policy's concepts as an edit: ``guide="empty"`` moves them to no content (the authors' default), ``"safe"`` each to its
    safe counterpart."""
    concepts, safe = policy_concepts(policy, categories)
    return replace(ConceptEdit(concepts=concepts, guides=safe if guide == "safe" else ("",)), **options)
