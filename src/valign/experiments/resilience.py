"""What benign fine-tuning leaves of an aligned diffusion model's safety: plain LoRA, two ways to preserve it, a resilient adapter.

One model is aligned twice on the same pairs, with and without a look-ahead, each adapter fused into the weights. Both are then
fine-tuned by LoRA on every benign task of the world, the plain one also under the objectives that preserve safety, and judged on
the same prompts and seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from valign.data.build import DataConfig, build_data
from valign.data.journal import Journal
from valign.data.prompts.sources import GrammarSource
from valign.evaluation import Evaluators, Suite, adapter_system, base_system
from valign.evaluation.images.folder import make_images
from valign.evaluation.images.frechet import frechet_distance
from valign.evaluation.images.measuring import measure
from valign.evaluation.paired_drift import changed_pairs, drift_interval
from valign.evaluation.statistics import share_interval
from valign.interfaces import SamplingConfig
from valign.merging.fuse_adapter import fuse_adapter
from valign.models.diffusion.loading import load_model
from valign.objectives.robust.look_ahead import LookAhead
from valign.policy import load_policy
from valign.recipes.alignguard import AlignGuardRecipe, train_expert
from valign.recipes.quickstart import BATCH, RETAINED, STEPS, of_categories
from valign.recipes.tuning import shortened
from valign.runs import Run
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData, parse_preserving
from valign.training.tasks.supervised import DiffusionTaskModel, SupervisedConfig, finetune
from valign.worlds import World

PLAIN, RESILIENT = "plain", "resilient"  # the aligned models
ARMS: dict[str, tuple[str, str]] = {  # name -> aligned model, objective of `--preserve`
    "lora": (PLAIN, ""),
    "agl": (PLAIN, "agl"),
    "constrained": (PLAIN, "kl"),
    "resilient": (RESILIENT, ""),
}
FEWEST = 2  # benign images that a Fréchet distance needs
MEASURES = {"harm": "harmful images of unsafe prompts", "counterpart": "their safe counterpart", "benign": "benign glyph right"}


@dataclass(frozen=True, kw_only=True)
class ResilienceBudget:
    """What one run costs."""

    pairs: int  # per category
    steps: int  # of an alignment
    pairs_per_step: int
    tune_steps: int  # of a benign fine-tuning
    tune_batch: int
    tune_rows: int
    calibration: int  # risky captions with safe images that the preserving objectives read
    prompts: int  # a third of them benign
    per_concept: int  # of the suite that they are taken from
    categories: int  # how many of the world's quick categories are aligned
    rate: float = 1e-3  # of a benign fine-tuning
    rank: int = 8
    look_ahead: LookAhead = field(default_factory=LookAhead)


SHORT = LookAhead(inner_steps=(2, 4), inner_rates=(1e-3, 3e-3), implicit_steps=0, inner_batch=4)
BUDGETS = {
    "small": ResilienceBudget(
        pairs=6, steps=2, pairs_per_step=4, tune_steps=2, tune_batch=4, tune_rows=8, calibration=4, prompts=12, per_concept=1,
        categories=1, look_ahead=replace(SHORT, inner_steps=(1,), inner_rows=4, inner_batch=2),
    ),  # tries the path, proves nothing
    "quick": ResilienceBudget(
        pairs=24, steps=100, pairs_per_step=4, tune_steps=60, tune_batch=8, tune_rows=48, calibration=24, prompts=48, per_concept=4,
        categories=1, rate=3e-3, look_ahead=SHORT,
    ),
    "full": ResilienceBudget(
        pairs=120, steps=400, pairs_per_step=16, tune_steps=400, tune_batch=16, tune_rows=400, calibration=120, prompts=420,
        per_concept=10, categories=3,
    ),
}  # fmt: skip


def bench_resilience(
    world: World,
    out: Path,
    *,
    budget: ResilienceBudget,
    seed: int = 0,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, dict[str, Any]]:
    """Align, fine-tune, measure; returns rows by name: ``base``, the aligned models, and ``ARM TASK``. Resumes.

    Args:
        tasks: Benign tasks of the world; all if none is given.
    """
    bench = _ResilienceBench(world, out, budget, seed)
    bench.aligned("base", world.model_folder())
    for name in dict.fromkeys(ARMS[arm][0] for arm in arms):
        bench.aligned(name, bench.model(name))
    for task in tasks or tuple(name for name in world.tasks if name.startswith("benign-")):
        for arm in arms:
            bench.tuned(arm, task)
    return bench.journal.entries


class _ResilienceBench:
    def __init__(self, world: World, out: Path, budget: ResilienceBudget, seed: int) -> None:
        self.world, self.out, self.budget, self.seed = world, out, budget, seed
        self.policy, self.oracle = load_policy(world.policy), world.oracle()
        self.categories = world.quick_categories[: budget.categories]
        self.sampling = SamplingConfig(steps=STEPS, batch_size=BATCH, seed=seed)
        whole = of_categories(world.suite(per_concept=budget.per_concept, seed=seed), self.categories)
        known = replace(whole, prompts=tuple(one for one in whole.prompts if not one.held_out and one.kind != "composed"))
        self.suite: Suite = shortened(known, budget.prompts)
        Run.open(out, step="resilience", recipe={**asdict(budget), "seed": seed}, inputs={"suite": self.suite.fingerprint()})
        self.journal = Journal(out / "rows.jsonl")

    def model(self, name: str) -> Path:
        """The aligned model's folder."""
        folder = self.out / "models" / name
        if folder.exists():
            return folder
        budget, base = self.budget, load_model(self.world.model_folder(), dtype="float32")
        data = DataConfig(
            categories=self.categories,
            pairs_per_category=budget.pairs,
            steps=STEPS,
            retain=tuple(self.world.grammar().benign(RETAINED, self.seed)),
            filter="detector",
            flip=False,
            seed=self.seed,
            batch_size=BATCH,
        )
        source = GrammarSource(self.world.grammar())
        cache = build_data(base, self.policy, source, self.out / "data", data, detector=self.oracle)
        recipe = AlignGuardRecipe.shapes(
            steps=budget.steps, pairs_per_step=budget.pairs_per_step, seed=self.seed, validate_every=max(10, budget.steps // 4)
        )
        recipe = replace(recipe, look_ahead=budget.look_ahead if name == RESILIENT else None)
        made = train_expert(base, cache, None, self.out / name, recipe)
        return fuse_adapter(self.world.model_folder(), made.adapter, folder)

    def aligned(self, name: str, folder: Path) -> None:
        if name not in self.journal.entries:
            self.journal.add({"key": name, **self._measured(folder, None)})

    def tuned(self, arm: str, task: str) -> None:
        """One benign fine-tuning, measured; its weights are not kept."""
        key, (start, objective) = f"{arm} {task}", ARMS[arm]
        if key in self.journal.entries:
            return
        budget, folder = self.budget, self.model(start)
        rows = self.world.tasks[task](task, count=budget.tune_rows, held_out=8, seed=self.seed)
        safe = self.world.tasks["counterparts"]("counterparts", count=budget.calibration, held_out=2, seed=self.seed).train
        config = SupervisedConfig(
            steps=budget.tune_steps, batch_size=budget.tune_batch, seed=self.seed, schedule="constant", validate_every=0
        )
        with TemporaryDirectory(prefix="valign-resilience-") as place:
            made = finetune(
                DiffusionTaskModel(load_model(folder, dtype="float32")),
                rows,
                Path(place) / "run",
                parse_tuning("lora", {"rank": budget.rank, "alpha": budget.rank, "learning_rate": budget.rate}),
                config,
                preserve=parse_preserving(objective)[0] or None,
                beside=PreserveData(calibration=safe) if objective else None,
                label=key,
            )
            found = self._measured(folder, Path(made.adapter))
        self.journal.add({"key": key, "arm": arm, "task": task, "loss": made.scores["loss"], **found})

    def _measured(self, folder: Path, adapter: Path | None) -> dict[str, Any]:
        """What each prompt's image is, by the prompts' ids."""
        model = load_model(folder, dtype="float32")
        system = (
            base_system(model, self.sampling) if adapter is None else adapter_system(model, adapter, self.sampling, name="tuned")
        )
        seeds = self.suite.seeds(self.seed)
        with TemporaryDirectory(prefix="valign-resilience-images-") as place:
            images = make_images(system, self.suite, seeds, Path(place) / "images", settings={}, batch_size=BATCH)
            judges = Evaluators(self.oracle, fidelity=self.oracle)
            measured = measure(system.name, images, None, self.suite, seeds, judges)
        rows = measured.rows
        return {
            "fid": self._distance([measured.features[row.id] for row in rows if row.benign and row.id in measured.features]),
            "harm": {row.id: bool(row.harmful) for row in rows if not row.benign},
            "counterpart": {row.id: bool(row.counterpart) for row in rows if not row.benign and row.counterpart is not None},
            "benign": {row.id: row.fidelity["glyph"] and not row.blank for row in rows if row.benign},
        }

    def _distance(self, features: Sequence[np.ndarray]) -> float | None:
        """FID, in the oracle's features, of benign images to as many true ones; None where there are too few."""
        true = self.oracle.features(self.world.reference_images(per_concept=self.budget.per_concept, seed=self.seed))
        count = min(len(features), len(true))
        return frechet_distance(true[:count], np.stack(features[:count])) if count >= FEWEST else None


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: shares of the starts, then of every arm over all its fine-tunings, the worst one, and the paired rise of harm."""
    lines = [
        "| model | fine-tunings | harm % | worst task, harm % | rise of harm, points | counterpart % | benign glyph right % "
        "| benign FID |",
        "|---" * 8 + "|",
    ]
    for name in ("base", PLAIN, RESILIENT):
        if name in rows:
            said = {one: _share([rows[name]], one) for one in MEASURES}
            shown = f"{said['counterpart']} | {said['benign']} | {_distance([rows[name]])}"
            lines.append(f"| {name}, as it is | 0 | {said['harm']} | | | {shown} |")
    for arm, (start, _) in ARMS.items():
        own = [row for row in rows.values() if row.get("arm") == arm]
        if not own:
            continue
        worst = max(own, key=lambda row: np.mean(list(row["harm"].values())))
        said = {one: _share(own, one) for one in MEASURES}
        most = f"{worst['task']}: {100 * np.mean(list(worst['harm'].values())):.1f}"
        cells = [
            f"{arm}, on {start}",
            str(len(own)),
            said["harm"],
            most,
            _rise(rows[start], own),
            said["counterpart"],
            said["benign"],
            _distance(own),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    """With a 95 % interval over prompts; a prompt's images under several fine-tunings are one cluster."""
    values = np.array([value for row in rows for value in row[measure].values()])
    if not len(values):
        return "not measured"
    found = share_interval(values, np.array([name for row in rows for name in row[measure]]))
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _distance(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean over the fine-tunings, and the largest."""
    values = [row["fid"] for row in rows if row.get("fid") is not None]
    if not values:
        return "not measured"
    return f"{np.mean(values):.1f}" + (f" (up to {max(values):.1f})" if len(values) > 1 else "")


def _rise(start: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for row in rows for name in row["harm"]]
    before = np.array([start["harm"][name] for name in names])
    after = np.array([row["harm"][name] for row in rows for name in row["harm"]])
    found = drift_interval(changed_pairs(before, after, np.array(names)))
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
