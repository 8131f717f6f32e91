"""The setting of a run in the comparison of adapters: model, data and probe, the same for all methods at one task and seed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file

from valign.data.tasks.base import TaskData, TaskRow, split
from valign.data.tasks.images import IMAGES, read_images
from valign.data.tasks.texts import GLUE, TextRow, named_task, read_data
from valign.evaluation.adapters.retention import Probe, Retention, kept_since
from valign.files import read_json
from valign.models.heads.image_model import load_image_model, new_image_model
from valign.models.heads.task_model import Target, TaskModel
from valign.models.language.text_model import TextModel, load_text_model
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.supervised import SupervisedConfig, finetune

PROBES = {"stsb": "mrpc"}  # task -> the task whose held-out pairs show what was kept; stsb for all others
BASES = {"cifar10": "mnist", "mnist": "cifar10"}  # task -> what the small ViT was trained on
BASE_STEPS, MOST_BASE_STEPS = 10, 6000  # of the small ViT, times those of a run: what is to be kept must first be there
REHEARSED = 0.25  # share of the training rows that judges learning rates


@dataclass(frozen=True, kw_only=True)
class RunBudget:
    """The same for every method. ``quick`` takes about a minute per run on one core of a laptop."""

    steps: int
    batch_size: int
    train_rows: int
    held_out_rows: int
    max_tokens: int
    probes: int  # pairs, or images, for retention
    timed: int  # steps of the paired timing
    rate: float  # factor on every method's learning rate: a short training of a small model wants higher ones

    def config(self, seed: int) -> SupervisedConfig:
        """No validation: every method is judged at its last step, on rows that chose nothing."""
        return SupervisedConfig(steps=self.steps, batch_size=self.batch_size, seed=seed, validate_every=0, checkpoint_every=0)

    def for_images(self) -> "RunBudget":
        """A step of the small ViT is cheap: more of them, of more rows."""
        return replace(self, steps=2 * self.steps, batch_size=4 * self.batch_size, train_rows=5 * self.train_rows)

    def for_glyphs(self) -> "RunBudget":
        """A step of the miniature CLIP is cheap, too: a larger batch."""
        return replace(self, batch_size=4 * self.batch_size)

    def for_diffusion(self) -> "RunBudget":
        """Judging and probing generate an image per row: fewer rows."""
        return replace(self, held_out_rows=self.held_out_rows // 10, probes=self.probes // 4)


BUDGETS: dict[str, RunBudget] = {
    "tiny": RunBudget(steps=10, batch_size=4, train_rows=64, held_out_rows=40, max_tokens=16, probes=20, timed=3, rate=5.0),
    "quick": RunBudget(steps=100, batch_size=8, train_rows=400, held_out_rows=400, max_tokens=32, probes=100, timed=15, rate=5.0),
    "full": RunBudget(
        steps=1000, batch_size=16, train_rows=4000, held_out_rows=1000, max_tokens=64, probes=500, timed=25, rate=2.0
    ),
}


@runtime_checkable
class Setting(Protocol):
    """Model, data and probe of one task and seed."""

    @property
    def task(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def budget(self) -> RunBudget: ...
    def rows(self) -> TaskData: ...  # all training and held-out rows
    def stages(
        self,
    ) -> tuple[TaskData, ...]: ...  # learnt in turn; each has all classes of `rows`, or some
    def load(self, device: str) -> TaskModel: ...
    def probe(
        self, model: Any
    ) -> Callable[[], Retention]: ...  # measures the untrained model; the result, called after training, says what was kept
    def describe(self) -> dict[str, Any]: ...  # JSON-able, without folders


@dataclass(frozen=True, kw_only=True)
class TextSetting:
    """A GLUE task on a text encoder."""

    model: str
    data: Path
    task: str
    seed: int
    budget: RunBudget
    rehearsal: bool = False  # judged on a quarter of the training rows, which then train nothing: to choose learning rates

    def rows(self) -> TaskData:
        return _texts(self.data, self.task, self.seed, self.budget, self.rehearsal)

    def stages(self) -> tuple[TaskData, ...]:
        return (self.rows(),)

    def load(self, device: str) -> TextModel:
        target = Target.of(self.rows())
        return load_text_model(self.model, target, max_tokens=self.budget.max_tokens, seed=self.seed, device=device)

    def probe(self, model: TextModel) -> Callable[[], Retention]:
        """Pairs of another task: drift of their vectors, and whether cosines still tell how alike they are."""

        def encode(texts: Any) -> np.ndarray:
            return model.encode(texts).numpy()

        rows, ranks = _pairs(self.data, PROBES.get(self.task, "stsb"), self.budget.probes)
        probe = Probe.of(encode, rows, ranks)
        return lambda: probe.measure(encode)

    def describe(self) -> dict[str, Any]:
        return {"task": self.task, "seed": self.seed, "budget": asdict(self.budget), "rehearsal": self.rehearsal}


@dataclass(frozen=True, kw_only=True)
class ImageSetting:
    """Images on a small ViT that this project has trained on other images, in ``bases``."""

    bases: Path
    data: Path
    task: str
    seed: int
    budget: RunBudget
    rehearsal: bool = False

    def rows(self) -> TaskData:
        return _images(self.data, self.task, self.seed, self.budget, self.rehearsal)

    def stages(self) -> tuple[TaskData, ...]:
        return (self.rows(),)

    def load(self, device: str) -> TaskModel:
        base = train_base(BASES[self.task], self.data, self.bases, self.budget)
        return load_image_model(base / "adapter", Target.of(self.rows()), seed=self.seed, device=device)

    def probe(self, model: Any) -> Callable[[], Retention]:
        """The old task's held-out images: drift of their vectors, and the accuracy of the old head on them."""
        base = self.bases / BASES[self.task]
        rows = _images(self.data, BASES[self.task], 0, self.budget, False).held_out[: self.budget.probes]
        head, labels = load_file(base / "head.safetensors"), read_json(base / "head.json")["labels"]
        truth = np.array([labels.index(row.target) for row in rows])

        def answers() -> tuple[np.ndarray, float]:
            vectors = _vectors(model, rows)
            said = torch.from_numpy(vectors) @ head["weight"].T + head["bias"]
            return vectors, float((said.argmax(1).numpy() == truth).mean())

        return kept_since(answers)

    def describe(self) -> dict[str, Any]:
        return {"task": self.task, "seed": self.seed, "budget": asdict(self.budget), "rehearsal": self.rehearsal}


@cache
def train_base(task: str, data: Path, bases: Path, budget: RunBudget) -> Path:
    """The small ViT trained whole on ``task``, once per folder; resumes."""
    rows = read_images(IMAGES[task], data)
    steps = min(BASE_STEPS * budget.steps, MOST_BASE_STEPS)
    config = SupervisedConfig(steps=steps, batch_size=budget.batch_size, checkpoint_every=100, validate_every=0)
    model = new_image_model(Target.of(rows), seed=0)
    finetune(model, rows, bases / task, parse_tuning("full", {"learning_rate": 1e-3}), config, label=f"small ViT on {task}")
    return bases / task


@torch.no_grad()
def _vectors(model: TaskModel, rows: Sequence[TaskRow]) -> np.ndarray:
    was = model.training
    model.eval()
    parts = [model.vectors(model.batch(rows[first : first + 64]).inputs).cpu() for first in range(0, len(rows), 64)]
    model.train(was)
    return torch.cat(parts).numpy()


@cache
def _texts(folder: Path, task: str, seed: int, budget: RunBudget, rehearsal: bool) -> TaskData:
    found, setting = named_task(task, folder)
    data = read_data(found, setting, train_rows=budget.train_rows, held_out_rows=budget.held_out_rows, seed=seed)
    return _rehearsed(data) if rehearsal else data


@cache
def _images(folder: Path, task: str, seed: int, budget: RunBudget, rehearsal: bool) -> TaskData:
    sizes = {"train_rows": budget.train_rows, "held_out_rows": budget.held_out_rows}
    data = read_images(IMAGES[task], folder, seed=seed, **sizes)
    return _rehearsed(data) if rehearsal else data


def _rehearsed(data: TaskData) -> TaskData:
    train, judged = split(data.train, REHEARSED)
    return TaskData(data.task, tuple(train), tuple(judged))


@cache
def _pairs(folder: Path, task: str, count: int) -> tuple[tuple[TextRow, ...], tuple[str, ...]]:
    """Pairs, and the classes from unlike to alike where they have some."""
    found = read_data(*named_task(task, folder), held_out_rows=count)
    return found.held_out, found.labels if GLUE[task].kind == "classification" else ()  # type: ignore[return-value]
