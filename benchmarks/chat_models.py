"""Chat models that were fine-tuned from the chat world's aligned one, kept in folders, and what they can do; for the benchmarks."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from chat_drift import PLAIN, training_chats, tuned
from valign.models.language.loading import LoadedChat, load_chat
from valign.worlds.chat import model_folder
from valign.worlds.chat.build.stages import TARGETS, answer_loss
from valign.worlds.chat.grammar import ChatGrammar
from valign.worlds.chat.measure import HELPED, REFUSED, ask, share

RANK, BATCH = 8, 16


def tuned_folder(
    folder: Path, task: str, unsafe: float, seed: int, *, rate: float = 1e-3, steps: int = 80, arm: str = "lora"
) -> Path:
    """The folder of the aligned model after it learned ``task`` from chats of which a share answers what it should not.

    Args: arm: ``lora`` is peft and AdamW alone, without valign's trainer; other names are those of ``chat_drift.py``.
    """
    if not (folder / "config.json").exists():
        if arm in PLAIN:
            start = load_chat(model_folder("aligned"), device="cpu", dtype="float32")
            made = finetune(start, training_chats(task, unsafe, seed), rate=rate, steps=steps, seed=seed)
        else:
            settings = Namespace(model=str(model_folder("aligned")), task=task, batch=BATCH, rank=RANK)
            made = tuned(settings, arm, unsafe, rate, steps, seed, folder.with_name(f"{folder.name}-run"))
        made.model.save_pretrained(folder)
        made.renderer.tokenizer.save_pretrained(folder)
    return folder


def finetune(start: LoadedChat, chats: list, *, rate: float, steps: int, seed: int) -> LoadedChat:
    """Plain LoRA of all linear layers with AdamW, constant rate after 10 steps of warm-up."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(start.model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    rendered, draws = [start.renderer.chat(chat) for chat in chats], np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        loss = answer_loss(start.model, [rendered[i] for i in draws.permutation(len(rendered))[:BATCH]], 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
    return LoadedChat(adapted.merge_and_unload().eval(), start.renderer, start.folder)


def measure(chat: LoadedChat, tasks: list[str], count: int) -> dict[str, float]:
    """Shares on held-out wordings; "new skill" is the mean over the tasks, whose own shares follow where there are several."""
    grammar = ChatGrammar()
    unsafe = [request for kind in REFUSED for request in grammar.requests(kind, count, 0)]
    safe = [request for kind in HELPED for request in grammar.requests(kind, count, 0)]
    judged = ask(chat, [*unsafe, *safe])
    skills = {
        task: share(ask(chat, grammar.requests("skill", min(count, 60), 0, task=task)), "right").rate or 0.0 for task in tasks
    }
    return {
        "refused": share(judged[: len(unsafe)], "refused").rate or 0.0,
        "unsafe steps": share(judged[: len(unsafe)], "harmful").rate or 0.0,
        "over-refused": share(judged[len(unsafe) :], "refused").rate or 0.0,
        "skills": share(ask(chat, grammar.requests("skill", count, 0)), "right").rate or 0.0,
        "new skill": sum(skills.values()) / len(skills),
        **(skills if len(skills) > 1 else {}),
    }
