"""The columns of `bench_methods`: the base, every method at its best, LiVO, and the guard before some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.evaluation import System, adapter_system, base_system, value_system
from valign.evaluation.composed import guarded_system, system_of_runs
from valign.experiments.methods.trained import LIVO, RETRIEVER, MethodsConfig, Trained
from valign.experiments.methods.tuned import DPO
from valign.guard import Guard, probe_retriever
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.value_encoder import load_value_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
from valign.models.heads.text_probe import load_probe
from valign.policy import Policy


@dataclass(frozen=True)
class MethodSystems:
    """Makes the compared systems, all with the same sampling settings."""

    model: DiffusionModel
    policy: Policy
    config: MethodsConfig

    def all(self, tuned: Mapping[str, System], runs: Sequence[Trained]) -> list[System]:
        """The base first, then ``tuned`` in its order."""
        base, livo, guard = base_system(self.model, self.config.sampling), self.livo(runs), Guard.from_policy(self.policy)
        behind = {"guard": base, f"guard-{DPO}": tuned[DPO], "guard-livo": livo}
        return [base, *tuned.values(), livo, *(guarded_system(inner, guard, name=name) for name, inner in behind.items())]

    def livo(self, runs: Sequence[Trained], **options: Any) -> System:
        """All runs' value encoders. Args: options: of `valued`."""
        return system_of_runs([self.valued(run.made[LIVO].folder, run.made[RETRIEVER].folder, **options) for run in runs])

    def joint(self, folder: Path) -> System:
        """A checkpoint of plain DPO, at weight 1."""
        return adapter_system(self.model, folder, self.config.sampling, name="dpo", description="one LoRA on all pairs")

    def valued(self, folder: Path, probe: Path, *, name: str = LIVO, mixing: float = 0.5) -> System:
        """The value encoder in ``folder``, for the prompts in which the probe of the same run finds a principle."""
        encoder = load_value_encoder(folder, self.model)
        pipeline = ValueGuidedPipeline(self.model, encoder, probe_retriever(self.policy, load_probe(probe, self.model)))
        described = "a value token where a principle is found; half of the time for bias"
        return value_system(pipeline, self.config.sampling, name=name, mixing=mixing, description=described)
