"""Fine-tune a model on a task into a folder: the checks, the run record, the adapter and the head."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from safetensors.torch import save_file

from valign.adapters import AdapterHandle, LoraHandle, adapter_bytes, export_lora
from valign.checks import UserError
from valign.data.tasks.base import TaskData
from valign.files import atomic_folder, atomic_path, hash_file, hash_value, write_json
from valign.memory import AUTOCAST
from valign.models.files.adapter_base import chat_record
from valign.models.files.adapter_files import public_record, save_adapter
from valign.models.files.adapter_index import PROVENANCE
from valign.models.files.model_card import FINETUNE
from valign.models.heads.task_model import TaskModel
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import LoadedChat
from valign.progress import console
from valign.runs import Run
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.previews import Previews
from valign.training.engine.processes import on_main, start_processes
from valign.training.engine.tuning import Tuning
from valign.training.tasks.preserving import Preservation, PreserveData
from valign.training.tasks.supervised.answer_previews import AnswerPreviews
from valign.training.tasks.supervised.config import SupervisedConfig
from valign.training.tasks.supervised.diffusion_task import DiffusionTaskModel
from valign.training.tasks.supervised.judging import judge
from valign.training.tasks.supervised.task import SupervisedTask


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished fine-tuning left behind."""

    adapter: str  # the folder that peft loads, or transformers after full fine-tuning
    steps: int
    best_step: int  # whose weights are kept
    stopped: str  # "" (all steps run) or "patience"
    score: str  # name of the task's score
    scores: Mapping[str, float] = field(default_factory=dict)  # on the held-out rows, "loss" among them
    trained: int = 0  # numbers that the method has learnt, without the head
    adapter_bytes: int = 0


def finetune(
    model: TaskModel,
    data: TaskData,
    out: Path,
    tuning: Tuning,
    config: SupervisedConfig,
    *,
    targets: tuple[str, ...] = (),
    preserve: Mapping[str, Any] | None = None,
    beside: PreserveData | None = None,
    previews: int = 0,
    label: str = "fine-tune",
) -> FinetuneResult:
    """Train ``model`` on ``data``; write ``out/adapter``, ``out/head.safetensors`` with ``head.json``, ``metrics.jsonl``,
    ``checkpoints`` and ``run.json``.

    A finished run is returned as it is, an interrupted one goes on from its last checkpoint, with the same bytes on a CPU. The best
    validated step is kept, judged on the held-out rows; these are also what the result's scores are measured on, so with
    ``validate_every`` they are a little too good.

    Args:
        targets: Endings of the linear modules to adapt; none is the architecture's default.
        preserve: Objectives that keep the model's safety, as `parse_preserving` gives them.
        beside: Rows that these read.
        previews: Held-out chats whose answers before and after are written to ``out/answers.jsonl``; for chat models.

    Several processes of ``accelerate launch`` share the rows of every step, each with a whole model; the first writes.

    Raises: UserError if the run is of another recipe or input, targets match nothing, the loss is not finite, or there is nothing
        to learn; in several processes, for an adapter that changes while it trains, or a perturbation.
    """
    if config.sample_every and not isinstance(model, DiffusionTaskModel):
        raise UserError(f"sample_every must be 0 for a model that makes no images, got {config.sample_every}. Leave it out.")
    accelerator = start_processes(
        mixed_precision=AUTOCAST[config.memory.precision], trackers=config.trackers, folder=out, cpu=model.device.type == "cpu"
    )
    tuning = tuning.eight_bit() if config.memory.eight_bit else tuning
    if accelerator.num_processes > 1 and (tuning.adapter.adaptive or tuning.perturbation is not None):
        raise UserError(
            f"{tuning.name} must train in one process, got {accelerator.num_processes}: what it decides on the way may differ "
            "between them. Start it without accelerate launch."
        )
    recipe = {
        "config": config.recipe(),
        "method": tuning.recipe(),
        "task": asdict(data.task),
        "targets": list(targets),
        "reading": model.reading(),
    }
    inputs = {"model": model.fingerprint, "data": data.fingerprint()}
    preservation = None
    if preserve:
        preservation = Preservation(
            preserve,
            beside or PreserveData(),
            model,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            forgetting_start=tuning.adapter.forgets,
        )
        recipe["preserve"] = preservation.recipe()
        inputs["preserve"] = hash_value(preservation.data.record())
    elif beside is not None and beside != PreserveData():
        raise UserError("Rows to keep or to forget must go with an objective that reads them, got none. Name one by --preserve.")
    run = on_main(accelerator, lambda: Run.open(out, step="finetune", recipe=recipe, inputs=inputs, seed=config.seed))
    if run.done:
        return FinetuneResult(**run.results)
    rows = [*data.train, *data.held_out]
    if cut := model.cut(rows):
        console.print(
            f"{cut} of {len(rows)} texts are longer than the tokens that the model reads: their ends are cut off", style="yellow"
        )
    model.prepare(rows)
    if config.memory.gradient_checkpointing:
        model.checkpoint_gradients()
    shown = AnswerPreviews.of(model, data.held_out, previews, out)
    on_main(accelerator, lambda: shown.write("before"))
    samples = _samples(model, data, config, out)
    task = SupervisedTask(
        model,
        data,
        tuning,
        config,
        accelerator,
        targets=targets,
        preservation=preservation,
        validation=data.held_out,
        label=label,
    )
    loop = TrainingLoop(task, accelerator, out=out, previews=samples)
    stopped = loop.run()
    best = loop.keep_best()

    def finish() -> FinetuneResult:
        folder = out / "adapter"
        shutil.rmtree(folder, ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
        made = {"recipe": FINETUNE, "data": inputs["data"], "rows": len(data.train), "options": recipe}
        _save_adapter(folder, model, task.handle, made)
        _save_head(out, model)
        shown.write("after")
        result = FinetuneResult(
            adapter=str(folder),
            steps=loop.done,
            best_step=best,
            stopped=stopped,
            score=data.task.score,
            scores=judge(model, data.held_out, batch_size=config.eval_batch),
            trained=task.handle.numbers(),
            adapter_bytes=adapter_bytes(folder),
        )
        run.finish(**asdict(result))
        return result

    return on_main(accelerator, finish)


@dataclass(frozen=True)
class _Still:
    """A diffusion model that generates without dropout while it is trained."""

    model: DiffusionTaskModel

    def generate(self, prompts: Sequence[str], **options: Any) -> list[Image]:
        self.model.eval()
        try:
            return self.model.diffusion.generate(prompts, **options)
        finally:
            self.model.train()

    def fingerprint(self) -> str:
        return self.model.fingerprint


def _samples(model: TaskModel, data: TaskData, config: SupervisedConfig, out: Path) -> Previews | None:
    """Image grids of the base model and of the adapter as it stands."""
    if not config.sample_every or not isinstance(model, DiffusionTaskModel):
        return None
    captions = tuple(dict.fromkeys(getattr(row, "caption", "") for row in (*data.held_out, *data.train)))
    found = Previews(_Still(model), out / "samples", config.sample_prompts or captions[:4], config.sample_steps)
    found.remember_base()
    return found


def _save_adapter(folder: Path, model: TaskModel, handle: AdapterHandle, made: Mapping[str, Any]) -> None:
    """LoRA on a diffusion model as the rest of the house writes it, which diffusers loads; all else as peft has it."""
    if isinstance(model, ChatTaskModel):
        return save_chat_adapter(folder, handle, model.loaded)
    if not isinstance(model, DiffusionTaskModel) or not isinstance(handle, LoraHandle):
        return handle.save(folder)
    prefix = model.diffusion.components["denoiser"]
    metadata = {**model.provenance(), **made}
    save_adapter(folder, model.adapted_modules(export_lora(handle.network)), metadata=metadata, prefix=prefix)


def save_chat_adapter(folder: Path, handle: AdapterHandle, base: LoadedChat) -> None:
    """The weights with the record of the model that they are for, and the tokenizer: the template goes where the weights go."""
    with atomic_folder(folder) as temporary:
        handle.save(temporary / "weights")
        for path in (temporary / "weights").iterdir():
            path.rename(temporary / path.name)
        (temporary / "weights").rmdir()
        base.renderer.tokenizer.save_pretrained(str(temporary))
        write_json(temporary / PROVENANCE, public_record(chat_record(base.folder)))


def _save_head(out: Path, model: TaskModel) -> None:
    """The head's two tensors, and what its outputs mean; nothing for a language model."""
    if model.head is None:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
    with atomic_path(out / "head.safetensors") as temporary:
        save_file(tensors, temporary)
    meaning: dict[str, Any] = asdict(model.target)
    write_json(out / "head.json", {**meaning, "reading": model.reading(), "sha256": hash_file(out / "head.safetensors")})
