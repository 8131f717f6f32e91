"""The setting of a run on the shapes world's miniature CLIP: glyphs that it cannot name, all at once or some after others."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from valign.data.tasks.base import TaskData
from valign.evaluation.adapters.retention import Retention, kept_since
from valign.experiments.adapters.settings import RunBudget
from valign.models.encoders.clip import ClipEncoder
from valign.models.heads.clip_task import ClipTaskModel
from valign.models.heads.task_model import Target
from valign.worlds.shapes import clip_folder
from valign.worlds.shapes.glyph_tasks import LEARNT, TEMPLATE, captioned, glyph_data

MOST_SHOTS = 16  # training images of a glyph: the most in the papers on few shots
GLYPHS = {  # task -> classes of its stages
    "glyphs": (LEARNT,),
    "glyph-stream": tuple(LEARNT[first : first + 3] for first in range(0, len(LEARNT), 3)),
}


@dataclass(frozen=True, kw_only=True)
class GlyphSetting:
    """The glyphs of a task are told apart by the similarity of image and name."""

    task: str
    seed: int
    budget: RunBudget
    rehearsal: bool = False  # judged on images outside the test split

    def rows(self) -> TaskData:
        shots = min(MOST_SHOTS, self.budget.train_rows // len(LEARNT))
        return glyph_data(self.task, shots=shots, held_out=self.budget.held_out_rows, seed=self.seed, fresh=self.rehearsal)

    def stages(self) -> tuple[TaskData, ...]:
        whole = self.rows()

        def part(glyphs: tuple[str, ...]) -> TaskData:
            train, held_out = (tuple(row for row in rows if row.target in glyphs) for rows in (whole.train, whole.held_out))
            return TaskData(whole.task, train, held_out)

        return tuple(map(part, GLYPHS[self.task]))

    def load(self, device: str) -> ClipTaskModel:
        return ClipTaskModel(ClipEncoder(clip_folder(), device=device), Target.of(self.rows()), template=TEMPLATE)

    def probe(self, model: ClipTaskModel) -> Callable[[], Retention]:
        """Images of other glyphs: drift of their vectors and their captions', and how many find their own caption among all."""
        known = captioned(self.budget.probes)

        @torch.no_grad()
        def answers() -> tuple[np.ndarray, float]:
            was = model.training
            model.eval()
            images, texts = model.vectors(model.images(known.rows)), model.texts(known.captions)
            model.train(was)
            right = (images @ texts.T).argmax(1).cpu() == torch.arange(len(texts))
            return torch.cat([images, texts]).cpu().numpy(), float(right.double().mean())

        return kept_since(answers)

    def describe(self) -> dict[str, Any]:
        known = {"task": self.task, "seed": self.seed, "budget": asdict(self.budget), "rehearsal": self.rehearsal}
        return {**known, "stages": [list(glyphs) for glyphs in GLYPHS[self.task]]}
