"""The fragility audit of a chat model: benign LoRA fine-tunings by the house's own trainer, judged on held-out requests."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from valign.adapters import AdapterOptions, default_targets
from valign.audits.fragility import FragilityCell, FragilityGrid, TrainedCell, fragility_audit
from valign.audits.page import write_fragility_page
from valign.checks import UserError
from valign.data.tasks.base import TaskData
from valign.evaluation.chats.answers import ask_all
from valign.evaluation.chats.cases import ChatCase, cases_fingerprint
from valign.evaluation.chats.judges import AnswerVerdict, ChatJudge
from valign.evaluation.chats.systems import chat_folder_fingerprint, local_system
from valign.files import hash_value, read_json, write_json
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.runs import Run, versions
from valign.training.engine.tuning import Tuning
from valign.training.tasks.preserving import PreserveData
from valign.training.tasks.supervised import SupervisedConfig, finetune

ALL = "all"  # targets: every linear module


def audit_chat(
    folder: Path,
    data: Callable[[ChatTaskModel], TaskData],
    cases: Sequence[ChatCase],
    judge: ChatJudge,
    grid: FragilityGrid,
    tuning: Tuning,
    out: Path,
    *,
    preserve: Mapping[str, Any] | None = None,
    beside: PreserveData | None = None,
    max_tokens: int = 512,
    answer_tokens: int = 128,
    answer_batch: int = 64,
    device: str = "auto",
    name: str = "",
) -> dict[str, Any]:
    """Sweep the settings of ``grid`` and write ``out/fragility.json`` and ``out/report.html``; no weights are left.

    Args:
        data: The benign training data, read by the model's own renderer.
        tuning: Adapter and optimizer; the grid sets its rank, where it has one, and its learning rate.
        preserve, beside: Objectives that keep safety, and their rows: the audit of a defence.
        name: Of the model, in the report; its folder if empty.
    Raises: UserError for what `fragility_audit` refuses, and if the model's files changed meanwhile.
    """
    if len(grid.ranks) > 1 and not hasattr(tuning.adapter, "rank"):
        raise UserError(f"--ranks must be one value for {tuning.name}, which has no rank, got {len(grid.ranks)}. Give one.")
    start = chat_folder_fingerprint(folder)

    def subject() -> ChatTaskModel:
        return ChatTaskModel(load_chat(folder, device=device, dtype="float32"), max_tokens=max_tokens)

    rows = data(subject())
    run = Run.open(
        out,
        step="fragility",
        recipe={
            **{name: value for name, value in asdict(grid).items() if name != "max_minutes"},
            "method": tuning.recipe(),
            "preserve": {name: asdict(one) for name, one in (preserve or {}).items()},
            "judge": asdict(judge.card),
            "answer_tokens": answer_tokens,
        },
        inputs={
            "model": start,
            "data": rows.fingerprint(),
            "cases": cases_fingerprint(cases),
            "beside": hash_value(beside.record() if beside is not None else None),
        },
    )
    if run.done and (out / "fragility.json").exists():
        return dict(read_json(out / "fragility.json"))

    def train(cell: FragilityCell, place: Path) -> TrainedCell:
        model = subject()
        config = SupervisedConfig(
            steps=cell.steps,
            batch_size=grid.batch_size,
            seed=cell.seed,
            schedule="constant",
            validate_every=0,
            checkpoint_every=0,
        )
        made = finetune(
            model,
            rows,
            place / "run",
            tuned(tuning, cell),
            config,
            targets=chosen_targets(model, cell.targets),
            preserve=preserve,
            beside=beside,
            label=cell.name,
        )
        return TrainedCell(adapter=Path(made.adapter), trained=made.trained, loss=float(made.scores["loss"]))

    def measure(adapter: Path | None) -> list[AnswerVerdict]:
        options = {"max_tokens": answer_tokens, "batch_size": answer_batch, "device": device}
        whole = adapter is not None and (adapter / "config.json").exists()
        system = local_system("model", adapter if whole else folder, adapter=None if whole else adapter, **options)  # type: ignore[arg-type]
        place = out / "start" if adapter is None else adapter.parent / "answers"
        return judge.judge(cases, ask_all(system, cases, place))

    texts = [message["content"] for row in rows.train for message in row.messages if message["role"] == "user"]  # type: ignore[attr-defined]
    found = fragility_audit(grid, cases, train, measure, out, trained_on=texts)
    if chat_folder_fingerprint(folder) != start:
        raise UserError(f"{folder} must stay as it is during an audit, got other files. Run the audit again.")
    record: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    record |= {
        "model": name or str(folder),
        "method": tuning.name,
        "preserve": sorted(preserve or {}),
        "judge": asdict(judge.card),
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


def chosen_targets(model: ChatTaskModel, name: str) -> tuple[str, ...]:
    """Endings of linear modules: the architecture's default, all of them, or those named."""
    import torch

    if name == "default":
        return default_targets(model.network, ())
    if name != ALL:
        return tuple(name.split("+"))
    head = model.network.get_output_embeddings()  # type: ignore[operator]
    found = {
        path.rpartition(".")[2]
        for path, module in model.network.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return tuple(sorted(found))
