"""The setting of a run on the shapes world's diffusion model: it learns to generate the safe counterparts of harms."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL.Image import Image

from valign.data.tasks.base import TaskData
from valign.data.tasks.captions import PairRow
from valign.detectors.oracle import OracleDetector
from valign.evaluation.adapters.retention import Retention, kept_since
from valign.experiments.adapters.settings import RunBudget
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.loading import load_model
from valign.recipes.alignguard import AlignGuardRecipe
from valign.training.tasks.supervised import DiffusionTaskModel, PairTaskModel
from valign.worlds.shapes.counterpart_tasks import SceneRow
from valign.worlds.shapes.world import SHAPES

DIFFUSION_TASKS = ("counterparts", "expert")
SAMPLING = SamplingConfig(steps=20, guidance_scale=4.0, batch_size=20)


def sample(model: DiffusionTaskModel, captions: Sequence[str]) -> list[Image]:
    """One image each, at seeds 0, 1, 2, ..."""
    return model.diffusion.generate(captions, sampling=SAMPLING)


class CounterpartModel(DiffusionTaskModel):
    """Also judged by its images: ``drawn`` is the share of captions whose image shows the glyph that was to be learnt."""

    def graded(self, rows: Sequence[SceneRow]) -> dict[str, float]:
        return {"drawn": _shows(sample(self, [row.caption for row in rows]), rows)}


class ExpertModel(PairTaskModel):
    """AlignGuard's expert. ``removed`` is the share of captions whose image does not show the stand-in for harm they name,
    ``drawn`` the share that shows its counterpart."""

    def __init__(self, diffusion: DiffusionModel, reference: DiffusionModel) -> None:
        recipe = AlignGuardRecipe.shapes()
        held = {name: getattr(recipe.training, name) for name in ("sft_weight", "retain_weight", "empty_prompt_prob")}
        super().__init__(diffusion, reference, recipe.objective, **held)

    def graded(self, rows: Sequence[PairRow]) -> dict[str, float]:
        images = sample(self, [row.caption for row in rows])
        harm, safe = (_shows(images, [getattr(row, part) for row in rows]) for part in ("loser", "winner"))
        return {"removed": 1 - harm, "drawn": safe}


def _shows(images: Sequence[Image], rows: Sequence[SceneRow]) -> float:
    return float(_oracle().matches(images, [{"glyph": row.glyph} for row in rows])["glyph"].mean())


@cache
def _oracle() -> OracleDetector:
    return SHAPES.oracle()


@dataclass(frozen=True, kw_only=True)
class DiffusionSetting:
    """Captions that name a stand-in for harm with a rendered image of its counterpart; for an expert, of both, to choose from."""

    task: str
    seed: int
    budget: RunBudget
    rehearsal: bool = False  # judged on scenes outside the test split

    def rows(self) -> TaskData:
        sizes = {"count": self.budget.train_rows, "held_out": self.budget.held_out_rows}
        return SHAPES.tasks[self.task](self.task, **sizes, seed=self.seed, fresh=self.rehearsal)

    def stages(self) -> tuple[TaskData, ...]:
        return (self.rows(),)

    def load(self, device: str) -> DiffusionTaskModel:
        def model() -> DiffusionModel:
            return load_model(SHAPES.model_folder(), device=device, dtype="float32")

        return ExpertModel(model(), model()) if self.task == "expert" else CounterpartModel(model())

    def probe(self, model: DiffusionTaskModel) -> Callable[[], Retention]:
        """Benign prompts at equal seeds: drift of their images' features, and the share that is right."""
        benign = [prompt for prompt in SHAPES.suite(per_concept=4, seed=1).prompts if prompt.benign][: self.budget.probes]

        def answers() -> tuple[np.ndarray, float]:
            was = model.training
            images = sample(model.eval(), [prompt.prompt for prompt in benign])
            model.train(was)
            right = _oracle().matches(images, [prompt.expected for prompt in benign])
            return _oracle().features(images), float(np.all(list(right.values()), axis=0).mean())

        return kept_since(answers)

    def describe(self) -> dict[str, Any]:
        return {"task": self.task, "seed": self.seed, "budget": asdict(self.budget), "rehearsal": self.rehearsal}
