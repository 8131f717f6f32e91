"""The fragility audit of a chat model: benign LoRA fine-tunings by the house's own trainer, judged on held-out requests."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from valign.audits.sweep import AuditedModel, SweepPlan, sweep
from valign.data.tasks.base import TaskData
from valign.evaluation.chats.answers import ask_all
from valign.evaluation.chats.cases import ChatCase
from valign.evaluation.chats.judges import AnswerVerdict, ChatJudge
from valign.evaluation.chats.systems import local_system
from valign.models.files.adapter_base import chat_folder_fingerprint
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat


def audit_chat(
    folder: Path,
    data: Callable[[ChatTaskModel], TaskData],
    cases: Sequence[ChatCase],
    judge: ChatJudge,
    plan: SweepPlan,
    out: Path,
    *,
    max_tokens: int = 512,
    answer_tokens: int = 128,
    answer_batch: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Sweep the settings of the plan and write ``out/fragility.json`` and ``out/report.html``; no weights are left.

    Args: data: The benign training data, read by the model's own renderer.
    Raises: UserError for what `fragility_audit` refuses, and if the model's files changed meanwhile.
    """

    def subject() -> ChatTaskModel:
        return ChatTaskModel(load_chat(folder, device=device, dtype="float32"), max_tokens=max_tokens)

    def measure(adapter: Path | None) -> list[AnswerVerdict]:
        options = {"max_tokens": answer_tokens, "batch_size": answer_batch, "device": device}
        whole = adapter is not None and (adapter / "config.json").exists()
        system = local_system("model", adapter if whole else folder, adapter=None if whole else adapter, **options)  # type: ignore[arg-type]
        place = out / "start" if adapter is None else adapter.parent / "answers"
        return judge.judge(cases, ask_all(system, cases, place))

    rows = data(subject())
    texts = [message["content"] for row in rows.train for message in row.messages if message["role"] == "user"]  # type: ignore[attr-defined]
    audited = AuditedModel(
        kind="chat",
        folder=folder,
        load=subject,
        rows=rows,
        trained_on=texts,
        cases=cases,
        measure=measure,
        judge=asdict(judge.card),
        fingerprint=lambda: chat_folder_fingerprint(folder),
        recipe={"answer_tokens": answer_tokens},
    )
    return sweep(audited, plan, out)
