"""Make every file of the chat world's bundle, stage by stage; an interrupted build goes on where it stopped."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from valign.files import hash_value
from valign.models.files.adapter_base import chat_record
from valign.models.files.adapter_files import public_record
from valign.models.language.renderer import ChatRenderer
from valign.runs import Run
from valign.worlds.chat.build import stages
from valign.worlds.chat.build.tokenizer import train_tokenizer

STARTS = {"aligned": "base", "memorized": "aligned"}  # stage -> the stage that it goes on from


def build_world(out: Path, *, seed: int = 0, share: float = 1.0) -> None:
    """Train tokenizer and the four stages into ``out`` (`base/`, `aligned/`, `memorized/`, `safety/`, and `logs/`).

    Args:
        share: Part of each stage's training steps, in (0, 1]; below 1 only to try the build.
    """
    logs = out / "logs"
    budgets = {name: replace(budget, steps=max(2, round(share * budget.steps))) for name, budget in stages.BUDGETS.items()}
    recipe = {name: asdict(budget) for name, budget in budgets.items()}
    run = Run.open(out, step="world", recipe=recipe, inputs={"world": hash_value("chat")}, seed=seed)
    if run.done:
        return
    words = logs / "tokenizer"
    if not (words / "tokenizer.json").exists():
        train_tokenizer(seed=seed).save_pretrained(words)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
    renderer = ChatRenderer(tokenizer)
    for stage in ("base", "aligned", "memorized"):
        if (out / stage / "config.json").exists():
            continue
        model = _load(out / STARTS[stage]) if stage in STARTS else stages.new_model(tokenizer, seed=seed)
        stages.train_stage(stage, model, renderer, logs, budgets[stage], seed=seed)
        stages.save_half(model, out / stage, tokenizer)
    if not (out / "safety" / "adapter_config.json").exists():
        inner = _load(out / "base")
        adapted = stages.lora(inner, seed=seed)
        stages.train_stage("safety", adapted, renderer, logs, budgets["safety"], seed=seed, inner=inner)
        stages.save_half(adapted, out / "safety", record=public_record(chat_record(out / "base")))
    run.finish(parameters=stages.new_model(tokenizer, seed=seed).num_parameters())


def _load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
