"""The columns of `bench_methods`: what is free, what was trained over several runs, and the guard before some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.evaluation import System, adapter_system, value_system
from valign.evaluation.composed import guarded_system, system_of_runs
from valign.experiments.alignguard import WEIGHTS
from valign.experiments.methods.trained import LIVO, RETRIEVER, Made, MethodsConfig
from valign.guard import Guard, probe_retriever
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.value_encoder import load_value_encoder
from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
from valign.models.heads.text_probe import load_probe
from valign.policy import Policy
from valign.recipes.align import baselines
from valign.recipes.alignguard import JOINT

DESCRIBED = {
    "uce": "each concept's keys and values moved to its safe counterpart's (closed form)",
    "esd-x": "LoRA in cross-attention, trained away from all concepts",
    "esd-u": "LoRA outside cross-attention, trained away from all concepts",
    "dpo": f"one LoRA on all pairs at weight {WEIGHTS[JOINT]:g}",
    "alignguard": "an expert per category, merged",
    LIVO: "a value token where a principle is found; half of the time for bias",
}


@dataclass(frozen=True)
class MethodSystems:
    """Makes the compared systems, all with the same sampling settings."""

    model: DiffusionModel
    policy: Policy
    config: MethodsConfig

    def all(self, made: Sequence[dict[str, Made]]) -> list[System]:
        """The base first. ``made`` has what each run trained, by name."""
        free = baselines(self.model, self.policy, self.config.align)
        adapted = {
            name: system_of_runs([self.adapted(name, run[name].folder) for run in made])
            for name in ("uce", "esd-x", "esd-u", "dpo", "alignguard")
        }
        livo, guard = self.livo(made), Guard.from_policy(self.policy)
        behind = {"guard": free[0], "guard-alignguard": adapted["alignguard"], "guard-livo": livo}
        return [*free, *adapted.values(), livo, *(guarded_system(inner, guard, name=name) for name, inner in behind.items())]

    def livo(self, made: Sequence[dict[str, Made]], **options: Any) -> System:
        """All runs' value encoders. Args: options: of `valued`."""
        return system_of_runs([self.valued(run[LIVO].folder, run[RETRIEVER].folder, **options) for run in made])

    def adapted(self, name: str, folder: Path) -> System:
        weight = WEIGHTS[JOINT] if name == "dpo" else 1.0
        sampling = self.config.sampling
        return adapter_system(self.model, folder, sampling, name=name, description=DESCRIBED[name], weight=weight)

    def valued(self, folder: Path, probe: Path, *, name: str = LIVO, mixing: float = 0.5) -> System:
        """The value encoder in ``folder``, for the prompts in which the probe of the same run finds a principle."""
        encoder = load_value_encoder(folder, self.model)
        pipeline = ValueGuidedPipeline(self.model, encoder, probe_retriever(self.policy, load_probe(probe, self.model)))
        return value_system(pipeline, self.config.sampling, name=name, mixing=mixing, description=DESCRIBED[LIVO])
