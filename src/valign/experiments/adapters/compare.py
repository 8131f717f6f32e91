"""Many ways to fine-tune x tasks x seeds under one budget: one JSON per run, resumable, a table with tests, a page."""

import multiprocessing
import traceback
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from valign.adapters import ADAPTERS
from valign.checks import UserError, check_range
from valign.data.tasks.images import IMAGES
from valign.data.tasks.texts import GLUE
from valign.evaluation.adapters.page import markdown, write_page
from valign.evaluation.adapters.table import summarize
from valign.experiments.adapters.claims import judge_claims
from valign.experiments.adapters.runs import fingerprint, measure_overhead, rehearse, run_once
from valign.experiments.adapters.settings import BASES, PROBES, ImageSetting, RunBudget, Setting, TextSetting
from valign.experiments.adapters.shapes_diffusion import DIFFUSION_TASKS, DiffusionSetting
from valign.experiments.adapters.shapes_glyphs import GLYPHS, GlyphSetting
from valign.files import hash_value, read_json, write_json, write_text
from valign.progress import console, track
from valign.runs import versions
from valign.training.engine.tuning import Tuning, parse_tuning

FORMAT = 1
SHAPES = (*GLYPHS, *DIFFUSION_TASKS)  # of the shapes world: they need no data, and their models have no head to train alone
TASKS = (*GLUE, *IMAGES, *SHAPES)
REHEARSAL_SEED = 10_000  # seed of the rows and orders by which learning rates are chosen
REFERENCES = ("lora", "pissa", "milora", "dora")  # what every other method is tested against
COMBINED = ("lora+ggpo", "lora+mgpo", "full+dct-adamw", "full+galore", "full+trion")  # beside the adapters with AdamW


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and on what."""

    model: str
    data: Path | None  # where the tasks are; the shapes world's need none
    bases: Path  # small ViTs are trained here, for tasks of images
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: RunBudget
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> options
    rates: tuple[float, ...] = (1.0,)  # factors on each method's learning rate, of which the best is taken per task
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("methods", "tasks", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(f"{name} must be one or more, each once, got {', '.join(map(str, values)) or 'none'}.")
        for rate in self.rates:
            check_range("rates", rate, above=0.0)
        if not self.rates:
            raise UserError("rates must be one or more factors on the learning rates, got none.")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"tasks must be of {', '.join(TASKS)}, got {', '.join(unknown)}. Use `valign finetune` for your own.")
        files = [task for task in self.tasks if task not in SHAPES]
        if self.data is None and files:
            raise UserError(f"--data must be the folder of {', '.join(files)}, got none. Tasks without one: {', '.join(SHAPES)}.")
        if self.methods == ("head",) and not files:
            raise UserError(f"methods must have one besides head, got head alone: the models of {', '.join(self.tasks)} have none.")
        strange = sorted(set(self.settings) - set(self.methods))
        if strange:
            raise UserError(f"--set must name methods of the comparison, got {', '.join(strange)}. Add them to --methods.")

    def tuning(self, method: str) -> Tuning:
        """With its options, at its learning rate for this budget."""
        return parse_tuning(method, self.settings.get(method, {})).at(self.budget.rate)

    def setting(self, task: str, seed: int, *, rehearsal: bool = False) -> Setting:
        common: dict[str, Any] = {"task": task, "seed": seed, "rehearsal": rehearsal}
        if task in GLYPHS:
            return GlyphSetting(budget=self.budget.for_glyphs(), **common)
        if task in DIFFUSION_TASKS:
            return DiffusionSetting(budget=self.budget.for_diffusion(), **common)
        common["data"] = self.data
        if task in IMAGES:
            return ImageSetting(bases=self.bases, budget=self.budget.for_images(), **common)
        return TextSetting(model=self.model, budget=self.budget, **common)


def compare_adapters(comparison: Comparison, out: Path, *, overhead: bool = True) -> dict[str, Any]:
    """Do what is missing or failed in ``out``, then write ``summary.json``, ``table.md`` and ``report.html``; return the summary.

    A run is ``out/runs/TASK/METHOD/seed-N.json``, a cost ``out/overhead/METHOD.json``, a choice of learning rate
    ``out/rates/TASK/METHOD.json``. More methods, tasks and seeds may join later. A run that fails is recorded with its error and
    does not stop the others. Processes may share ``out`` if their tasks or seeds differ.

    Raises: UserError, before the first run, for an unknown method, option or task, missing data, or runs in ``out`` that were made
        with another budget, option, model or data.
    """
    for method in comparison.methods:
        comparison.tuning(method)
    others = {BASES.get(task) or PROBES.get(task, "stsb") for task in comparison.tasks if task not in SHAPES}
    for task in (*comparison.tasks, *sorted(others)):
        comparison.setting(task, comparison.seeds[0]).rows()  # tasks, and what the probes need, must be there
    sha256 = {task: comparison.setting(task, comparison.seeds[0]).load("cpu").fingerprint for task in comparison.tasks}
    tunings = {
        (task, method): comparison.tuning(method)
        for task in comparison.tasks
        for method in comparison.methods
        if method != "head" or task not in SHAPES
    }
    if comparison.rates != (1.0,):
        tunings = _rehearsed(comparison, tunings, out, sha256)
    cells = [(comparison.setting(task, seed), tuning) for seed in comparison.seeds for (task, _), tuning in tunings.items()]
    missing = [cell for cell in cells if not _finished(_file(out, *cell), fingerprint(*cell, sha256[cell[0].task]))]
    for setting, tuning in track(missing, "compare adapters", total=len(cells), done=len(cells) - len(missing)):
        _record(out, setting, tuning, sha256[setting.task], comparison.device)
    if overhead:
        _overheads(comparison, out, sha256)
    return report(out)


def all_methods() -> tuple[str, ...]:
    """Every adapter but those that need rows to forget, and some with another optimizer or a perturbation, as in the tables."""
    return (*(name for name, options in ADAPTERS.items() if not options.forgets), *COMBINED)


def report(out: Path) -> dict[str, Any]:
    """Tables and page from whatever runs ``out`` holds.

    Raises: UserError if none is finished.
    """
    records = [read_json(path) for path in sorted(out.glob("runs/*/*/seed-*.json"))]
    costs = {record["method"]: record for record in map(read_json, sorted(out.glob("overhead/*.json")))}
    if not any(record["status"] == "done" for record in records):
        raise UserError(f"{out} must hold a finished run, got none of {len(records)}. Look at the errors in {out}/runs.")
    order = [method for method in all_methods() if any(record["method"] == method for record in records)]
    summary = summarize(records, costs, references=REFERENCES, order=order)
    summary["claims"] = [asdict(verdict) for verdict in judge_claims(records, costs)]
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", markdown(summary))
    write_page(out / "report.html", summary)
    return summary


def _file(out: Path, setting: Setting, tuning: Tuning) -> Path:
    return out / "runs" / setting.task / tuning.name / f"seed-{setting.seed}.json"


def _finished(path: Path, key: str) -> bool:
    """Whether this run is done. Raises: UserError if the file is of another run."""
    if not path.exists():
        return False
    record = read_json(path)
    if record["key"] != key:
        raise UserError(
            f"{path} was made with another budget, option, model or data. Choose another output folder, or delete that file."
        )
    return bool(record["status"] == "done")


def _rehearsed(
    comparison: Comparison, tunings: Mapping[tuple[str, str], Tuning], out: Path, sha256: Mapping[str, str]
) -> dict[tuple[str, str], Tuning]:
    """Each method at the factor that is best on a part of the training rows of a seed of its own, per task; ``out/rates`` says why.

    Equal scores are told apart by the loss. A factor at which training fails is out; if all do, the runs will say so.
    """
    chosen = {}
    for (task, method), tuning in track(tunings.items(), "choose learning rates", total=len(tunings)):
        setting = comparison.setting(task, REHEARSAL_SEED, rehearsal=True)
        path, key = out / "rates" / task / f"{method}.json", fingerprint(setting, tuning, sha256[task])
        key = hash_value([key, comparison.rates])
        if not _finished(path, key):
            found: dict[float, dict[str, float]] = {}
            for rate in comparison.rates:
                try:
                    found[rate] = rehearse(
                        setting, tuning.at(rate), device=comparison.device, label=f"{method} on {task} x {rate:g}"
                    )
                except Exception as error:
                    console.print(f"failed: {method} on {task} x {rate:g}: {error}", style="red", highlight=False)
            best = max(found, key=lambda rate: (found[rate]["score"], -found[rate]["loss"]), default=comparison.rates[0])
            tried = [{"factor": rate, **entry} for rate, entry in found.items()]
            write_json(path, {"format": FORMAT, "key": key, "status": "done", "factor": best, "tried": tried})
        chosen[task, method] = tuning.at(read_json(path)["factor"])
    return chosen


def _record(out: Path, setting: Setting, tuning: Tuning, sha256: str, device: str) -> None:
    path = _file(out, setting, tuning)
    record: dict[str, Any] = {
        "format": FORMAT,
        "key": fingerprint(setting, tuning, sha256),
        "method": tuning.name,
        "recipe": tuning.recipe(),
        **setting.describe(),
        "score_name": setting.rows().task.score,
        "model_sha256": sha256,
        "data_sha256": setting.rows().fingerprint(),
        "versions": versions(),
    }
    try:
        measured = run_once(setting, tuning, device=device, label=f"{tuning.name} on {setting.task}, seed {setting.seed}")
        write_json(path, {**record, "status": "done", "measured": measured})
    except Exception as error:  # one method's failure must not take the others' results
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        console.print(f"failed: {tuning.name} on {setting.task}, seed {setting.seed}: {said}", style="red", highlight=False)
        write_json(path, {**record, "status": "failed", "error": said})


def _overheads(comparison: Comparison, out: Path, sha256: Mapping[str, str]) -> None:
    """Costs per step, each in a process of its own, on the first task and seed."""
    todo = []
    for method in comparison.methods:
        path = out / "overhead" / f"{method}.json"
        known: Any = read_json(path) if path.exists() else {"task": comparison.tasks[0], "seed": comparison.seeds[0]}
        setting = comparison.setting(known["task"], known["seed"])
        weights = sha256.get(setting.task) or setting.load("cpu").fingerprint  # of a task that an earlier call compared
        key = fingerprint(setting, comparison.tuning(method), weights)
        if not _finished(path, key):
            todo.append((method, path, setting, key))
    context = multiprocessing.get_context("spawn")
    for method, path, setting, key in track(
        todo, "cost per step", total=len(comparison.methods), done=len(comparison.methods) - len(todo)
    ):
        record = {"format": FORMAT, "key": key, "method": method, **setting.describe(), "versions": versions()}
        settings = dict(comparison.settings.get(method, {}))
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(measure_overhead, setting, method, settings, device=comparison.device).result()
            write_json(path, {**record, "status": "done", "measured": found})
        except Exception as error:
            console.print(f"failed: cost of {method}: {error}", style="red", highlight=False)
            write_json(path, {**record, "status": "failed", "error": f"{type(error).__name__}: {error}"})
