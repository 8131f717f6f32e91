"""Write a merge to disk while it streams: an adapter folder, with all options and sources beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from valign.checks import UserError
from valign.files import write_text
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.experts import Expert
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.models.files.layouts import PREFIXES

KEPT = ("base", "family", "prediction", "policy", "policy_hash")  # of the experts' own records, where all agree


def merge_metadata(method: str, experts: Sequence[Expert], options: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of a merge: method, options, and name, weight and hash of every expert. JSON-able, without clock or paths."""
    records = [expert.file.metadata for expert in experts]
    metadata: dict[str, Any] = {"merge_method": method, "options": dict(options)}
    for key in (*KEPT, "base_fingerprint"):
        values = [record.get(key) for record in records]
        if values[0] is not None and all(value == values[0] for value in values):  # one that is silent leaves it unknown
            metadata[key] = values[0]
    metadata["weights_sum"] = sum(expert.weight for expert in experts)
    metadata["sources"] = [
        {
            "name": expert.name,
            "weight": expert.weight,
            "sha256": expert.file.fingerprint(),
            **{key: expert.file.metadata[key] for key in ("category", "base_fingerprint") if key in expert.file.metadata},
        }
        for expert in experts
    ]
    return metadata


def kernels_of(experts: Sequence[Expert]) -> dict[str, tuple[int, int] | None]:
    """The kernel of every module of the experts that is a convolution: merges work on changes laid flat."""
    entries = experts[0].file.entries.items()
    return {module: kernel for module, entry in entries if (kernel := getattr(entry, "kernel", None)) is not None}


def write_merge(
    stream: Iterator[tuple[str, Delta]],
    out: Path,
    metadata: Mapping[str, Any],
    *,
    prefix: str = PREFIXES[0],
    kernels: Mapping[str, tuple[int, int] | None] | None = None,
    errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write the adapter with its model card, and ``merge_config.yml``, into ``out``, one module in memory at a time.

    Args:
        metadata: Of `merge_metadata`.
        prefix: Of the keys of the adapter, as in the experts' files.
        kernels: Of modules that are convolutions; see `kernels_of`.
        errors: The dictionary that the merge fills while it streams; its mean and worst end up in the summary.
    Returns: ``modules``, ``parameters``, ``ranks`` (lowest, highest), and ``error_mean``, ``error_worst``, ``error_worst_module``.
    """
    summary: dict[str, Any] = {"modules": 0, "parameters": 0, "ranks": []}

    def counted() -> Iterator[tuple[str, LoraFactors]]:
        for module, lora in stream:
            if isinstance(lora, DenseDelta):
                raise UserError(f"{out}: an adapter must be low-rank, got a dense change of {module}. Set the rank of the merge.")
            summary["modules"] += 1
            summary["parameters"] += lora.down.numel() + lora.up.numel()
            summary["ranks"] = [min([lora.rank, *summary["ranks"]]), max([lora.rank, *summary["ranks"]])]
            yield module, replace(lora, kernel=(kernels or {}).get(module))

    save_adapter(out, counted(), metadata=metadata, prefix=prefix)
    if errors:
        worst = max(sorted(errors), key=lambda module: errors[module])
        summary |= {"error_mean": sum(errors.values()) / len(errors), "error_worst": errors[worst], "error_worst_module": worst}
    config = yaml.safe_dump({**metadata, "result": summary}, sort_keys=False, allow_unicode=True)
    write_text(out / "merge_config.yml", config)
    return summary
