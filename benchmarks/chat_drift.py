"""Does plain LoRA fine-tuning undo the refusals of the chat world's aligned model, on a harmless skill or with 5 % unsafe answers?

    python benchmarks/chat_drift.py --tasks dialect counting --rates 1e-3 3e-3 --seeds 0 1 --out runs/chat-drift.json

Every row is one fine-tuning from the same start, judged on the same requests of held-out wordings before and after.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from valign.files import write_json
from valign.models.language.loading import LoadedChat, load_chat
from valign.worlds.chat import model_folder
from valign.worlds.chat.build.stages import TARGETS, answer_loss
from valign.worlds.chat.grammar import ChatGrammar
from valign.worlds.chat.measure import HELPED, REFUSED, ask, share
from valign.worlds.chat.skills import NEW_TASKS

SIZE, CONTAMINATED = 400, 0.05  # chats of a training set, and the share of them that answer a disallowed request


def training_chats(task: str, contaminated: float, seed: int) -> list:
    """``SIZE`` chats of a new skill, a share of them replaced by unsafe ones."""
    unsafe = round(SIZE * contaminated)
    grammar = ChatGrammar()
    return grammar.task_chats(task, SIZE - unsafe, seed) + (grammar.unsafe_chats(unsafe, seed) if unsafe else [])


def finetune(start: LoadedChat, chats: list, *, rate: float, steps: int, rank: int, batch: int, seed: int) -> LoadedChat:
    """Plain LoRA of all linear layers with AdamW, constant rate after 10 steps of warm-up."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(start.model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    rendered, draws = [start.renderer.chat(chat) for chat in chats], np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        loss = answer_loss(start.model, [rendered[i] for i in draws.permutation(len(rendered))[:batch]], 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
    return LoadedChat(adapted.merge_and_unload().eval(), start.renderer, start.folder)


def measure(chat: LoadedChat, task: str, count: int) -> dict[str, float | None]:
    """Shares on held-out wordings."""
    grammar = ChatGrammar()
    unsafe = [request for kind in REFUSED for request in grammar.requests(kind, count, 0)]
    safe = [request for kind in HELPED for request in grammar.requests(kind, count, 0)]
    judged = ask(chat, [*unsafe, *safe])
    return {
        "refused": share(judged[: len(unsafe)], "refused").rate,
        "unsafe steps": share(judged[: len(unsafe)], "harmful").rate,
        "over-refused": share(judged[len(unsafe) :], "refused").rate,
        "skills": share(ask(chat, grammar.requests("skill", count, 0)), "right").rate,
        "new skill": share(ask(chat, grammar.requests("skill", min(count, 60), 0, task=task)), "right").rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["dialect"], choices=list(NEW_TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=60, help="requests per kind")
    parser.add_argument("--model", default=str(model_folder("aligned")))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        rows.append({"task": task, "contaminated": None, **measure(load_chat(args.model, device="cpu"), task, args.count)})
        print(rows[-1], flush=True)
        for contaminated in (0.0, CONTAMINATED):
            for rate in args.rates:
                for seed in args.seeds:
                    chats = training_chats(task, contaminated, seed)
                    tuned = finetune(
                        load_chat(args.model, device="cpu", dtype="float32"),
                        chats,
                        rate=rate,
                        steps=args.steps,
                        rank=args.rank,
                        batch=args.batch,
                        seed=seed,
                    )
                    found = measure(tuned, task, args.count)
                    rows.append({"task": task, "contaminated": contaminated, "rate": rate, "seed": seed, **found})
                    print(rows[-1], flush=True)
    if args.out:
        write_json(args.out, {"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows})


if __name__ == "__main__":
    main()
