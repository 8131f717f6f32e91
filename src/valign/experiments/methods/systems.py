"""The columns of `bench_methods`: the base, every method at its best, LiVO, and the guard before some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from valign.evaluation import System, adapter_system, base_system, value_system
from valign.evaluation.composed import guarded_system, system_of_runs
from valign.experiments.methods.trained import DPO, LIVO, RETRIEVER, ComparedConfig, Trained
from valign.guard import Guard, probe_retriever
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.value_encoder import load_value_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
from valign.models.heads.text_probe import load_probe
from valign.policy import Policy

VALUED = "a value token where a principle is found; half of the time for bias"


@dataclass(frozen=True)
class MethodSystems:
    """Makes the compared systems, all with the same sampling settings."""

    model: DiffusionModel
    policy: Policy
    config: ComparedConfig

    def all(self, tuned: Mapping[str, System]) -> list[System]:
        """The base first, then ``tuned`` in its order, then the guard before some of them."""
        base, guard = base_system(self.model, self.config.sampling), Guard.from_policy(self.policy)
        behind = {"guard": base, **{f"guard-{name}": tuned[name] for name in (DPO, LIVO)}}
        return [base, *tuned.values(), *(guarded_system(inner, guard, name=name) for name, inner in behind.items())]

    def livo(self, runs: Sequence[Trained], **options: Any) -> System:
        """All runs' value encoders. Args: options: of `valued`."""
        return system_of_runs([self.valued(run.made[LIVO].folder, run.made[RETRIEVER].folder, **options) for run in runs])

    def joint(self, folder: Path) -> System:
        """A checkpoint of plain DPO, at weight 1."""
        return adapter_system(self.model, folder, self.config.sampling, name="dpo", description="one LoRA on all pairs")

    def valued(
        self,
        folder: Path,
        probe: Path,
        *,
        name: str = LIVO,
        mixing: float = 0.5,
        threshold: float | None = None,
        description: str = VALUED,
    ) -> System:
        """The value encoder in ``folder``, for the prompts in which the probe of the same run finds a principle.

        Args: threshold: Probability of harm from which it does; the probe's own for None.
        """
        read = load_probe(probe, self.model)
        if threshold is not None:
            read = replace(read, threshold=threshold)
        pipeline = ValueGuidedPipeline(self.model, load_value_encoder(folder, self.model), probe_retriever(self.policy, read))
        return value_system(pipeline, self.config.sampling, name=name, mixing=mixing, description=description)
