"""What the fragility audits of chat and diffusion models share: settings made into fine-tunings, the run's record, the report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from valign.adapters import AdapterOptions, default_targets
from valign.audits.fragility import MOST_INCOHERENT, FragilityCell, FragilityGrid, Measure, TrainedCell, fragility_audit
from valign.audits.page import write_fragility_page
from valign.checks import UserError
from valign.data.tasks.base import TaskData
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint
from valign.files import hash_value, read_json, write_json
from valign.models.heads.task_model import TaskModel
from valign.runs import Run, versions
from valign.training.engine.tuning import Tuning
from valign.training.tasks.preserving import PreserveData
from valign.training.tasks.supervised import SupervisedConfig, finetune

ALL = "all"  # targets: every linear module


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How a model is fine-tuned, whatever it is.

    Args:
        tuning: Adapter and optimizer; the grid sets its rank, where it has one, and its learning rate.
        preserve, beside: Objectives that keep safety, and their rows: the audit of a defence.
        name: Of the model, in the report; its folder if empty.
    """

    grid: FragilityGrid
    tuning: Tuning
    preserve: Mapping[str, Any] = field(default_factory=dict)
    beside: PreserveData | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditedModel:
    """The model that is audited, and who judges it.

    Args:
        kind: ``chat`` or ``diffusion``.
        folder: Its name in the report, unless the plan has one.
        load: Gives the model to be trained, fresh.
        rows: Its benign data.
        trained_on: Texts of the data.
        measure: Verdicts on the cases, of the start for None, or of what is in an adapter's folder.
        judge: The card of who judges.
        fingerprint: Of the model's files; called before and after.
        recipe: What else shapes the result.
    """

    kind: str
    folder: Path
    load: Callable[[], TaskModel]
    rows: TaskData
    trained_on: Sequence[str]
    cases: Sequence[ChatCase]
    measure: Measure
    judge: Mapping[str, Any]
    fingerprint: Callable[[], str]
    recipe: Mapping[str, Any]
    most_incoherent: float = MOST_INCOHERENT


def sweep(model: AuditedModel, plan: SweepPlan, out: Path) -> dict[str, Any]:
    """Run the audit and write ``out/fragility.json`` and ``out/report.html``; a finished one is returned as it is.

    Raises: UserError for what `fragility_audit` refuses, and if the model's files changed meanwhile.
    """
    grid, tuning, rows, cases = plan.grid, plan.tuning, model.rows, model.cases
    if len(grid.ranks) > 1 and not hasattr(tuning.adapter, "rank"):
        raise UserError(f"--ranks must be one value for {tuning.name}, which has no rank, got {len(grid.ranks)}. Give one.")
    start = model.fingerprint()
    run = Run.open(
        out,
        step="fragility",
        recipe={
            **{name: value for name, value in asdict(grid).items() if name != "max_minutes"},
            "method": tuning.recipe(),
            "preserve": {name: asdict(one) for name, one in plan.preserve.items()},
            "judge": dict(model.judge),
            **model.recipe,
        },
        inputs={
            "model": start,
            "data": rows.fingerprint(),
            "cases": cases_fingerprint(cases),
            "beside": hash_value(plan.beside.record() if plan.beside is not None else None),
        },
    )
    if run.done and (out / "fragility.json").exists():
        return dict(read_json(out / "fragility.json"))

    def train(cell: FragilityCell, place: Path) -> TrainedCell:
        subject = model.load()
        config = SupervisedConfig(
            steps=cell.steps,
            batch_size=grid.batch_size,
            seed=cell.seed,
            schedule="constant",
            validate_every=0,
            checkpoint_every=0,
        )
        made = finetune(
            subject,
            rows,
            place / "run",
            tuned(tuning, cell),
            config,
            targets=chosen_targets(subject, cell.targets),
            preserve=plan.preserve,
            beside=plan.beside,
            label=cell.name,
        )
        return TrainedCell(adapter=Path(made.adapter), trained=made.trained, loss=float(made.scores["loss"]))

    found = fragility_audit(
        grid, cases, train, model.measure, out, trained_on=model.trained_on, most_incoherent=model.most_incoherent
    )
    name = plan.name or str(model.folder)
    if model.fingerprint() != start:
        raise UserError(f"{name} must stay as it is during an audit, got other files. Run the audit again.")
    record: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    record |= {
        "kind": model.kind,
        "model": name,
        "method": tuning.name,
        "preserve": sorted(plan.preserve),
        "judge": dict(model.judge),
        "prompts": {"risky": sum(case.risky for case in cases), "harmless": sum(not case.risky for case in cases)},
        "rows": len(rows.train),
        "versions": versions(),
    }
    write_fragility_page(out / "report.html", record)
    write_json(out / "fragility.json", record)
    run.finish(settings=len(found.points), failed=len(found.failed))
    return record


def tuned(tuning: Tuning, cell: FragilityCell) -> Tuning:
    """The method with the setting's learning rate and, where it has one, rank; LoRA's alpha is the rank, so its scale stays 1."""
    changes: dict[str, Any] = {"learning_rate": cell.rate}
    for name in ("rank", "alpha"):
        if hasattr(tuning.adapter, name):
            changes[name] = cell.rank
    adapter: AdapterOptions = replace(tuning.adapter, **changes)  # type: ignore[type-var]
    optimizer = tuning.optimizer if tuning.optimizer.learning_rate is None else replace(tuning.optimizer, learning_rate=cell.rate)  # type: ignore[type-var]
    return replace(tuning, adapter=adapter, optimizer=optimizer)


def chosen_targets(model: TaskModel, name: str) -> tuple[str, ...]:
    """Endings of linear modules: the architecture's default, all of them, or those named."""
    if name == "default":
        return default_targets(model.network, ())
    if name != ALL:
        return tuple(name.split("+"))
    own = getattr(model.network, "get_output_embeddings", None)
    head = own() if own is not None else None
    linear = (path for path, module in model.network.named_modules() if isinstance(module, torch.nn.Linear) and module is not head)
    return tuple(sorted({_ending(path) for path in linear}))


def _ending(path: str) -> str:
    """The last name that is not a mere number, with what follows it: ``to_out.0``."""
    before, _, last = path.rpartition(".")
    return f"{_ending(before)}.{last}" if last.isdigit() and before else last
