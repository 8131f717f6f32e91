"""Where a run on the shapes world's diffusion model takes place: it learns to draw safe counterparts, and forgets what it may."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL.Image import Image

from valign.data.tasks import TaskData
from valign.detectors.oracle import OracleDetector
from valign.evaluation.retention import Retention, kept_since
from valign.models.loading import load_model
from valign.models.pipeline_model import PipelineModel
from valign.recipes.adapter_places import Budget
from valign.training.supervised import DiffusionTaskModel
from valign.worlds.shapes import model_folder, oracle_folder, suite
from valign.worlds.shapes.counterpart_tasks import SceneRow, counterpart_data

DRAWINGS = ("counterparts",)
STEPS, GUIDANCE = 20, 4.0  # of denoising, and its scale, wherever this task draws


class DrawingModel(DiffusionTaskModel):
    """Also judged by what it draws: ``drawn`` is the share of captions whose picture shows the glyph that was to be learnt."""

    def __init__(self, diffusion: PipelineModel) -> None:
        super().__init__(diffusion)
        self.oracle = _oracle()

    def draw(self, captions: Sequence[str]) -> list[Image]:
        """One picture each, at seeds 0, 1, 2, ..."""
        seeds = range(len(captions))
        return self.diffusion.generate(captions, seeds=seeds, steps=STEPS, guidance_scale=GUIDANCE, batch_size=20)

    def graded(self, rows: Sequence[SceneRow]) -> dict[str, float]:
        shown = self.oracle.matches(self.draw([row.caption for row in rows]), [{"glyph": row.glyph} for row in rows])
        return {"drawn": float(shown["glyph"].mean())}


@cache
def _oracle() -> OracleDetector:
    return OracleDetector(oracle_folder())


@dataclass(frozen=True, kw_only=True)
class DrawingPlace:
    """Pairs of a caption that names a stand-in for harm and a rendered picture of its counterpart."""

    task: str
    seed: int
    budget: Budget
    rehearsal: bool = False  # judged on scenes outside the test split

    def rows(self) -> TaskData:
        sizes = {"count": self.budget.train_rows, "held_out": self.budget.held_out_rows}
        return counterpart_data(self.task, **sizes, seed=self.seed, fresh=self.rehearsal)

    def stages(self) -> tuple[TaskData, ...]:
        return (self.rows(),)

    def load(self, device: str) -> DrawingModel:
        return DrawingModel(load_model(model_folder(), device=device, dtype="float32"))  # type: ignore[arg-type]

    def probe(self, model: DrawingModel) -> Callable[[], Retention]:
        """Benign prompts at equal seeds: drift of their pictures' features, and the share that is drawn as asked."""
        benign = [prompt for prompt in suite(per_concept=4, seed=1).prompts if prompt.benign][: self.budget.probes]

        def look() -> tuple[np.ndarray, float]:
            was = model.training
            pictures = model.eval().draw([prompt.prompt for prompt in benign])
            model.train(was)
            right = model.oracle.matches(pictures, [prompt.expected for prompt in benign])
            return model.oracle.features(pictures), float(np.all(list(right.values()), axis=0).mean())

        return kept_since(look)

    def describe(self) -> dict[str, Any]:
        return {"task": self.task, "seed": self.seed, "budget": asdict(self.budget), "rehearsal": self.rehearsal}
