"""How well do inverted hinge, NPO and gradient ascent make the chat world's memorized model forget records, and what do they cost?

    python benchmarks/unlearn_chat.py --seeds 0 1 2 --out runs/unlearn-chat

48 facts about 16 people are to be forgotten; beside them stand the chats on 32 people who stay, and the world's other chats. After
it every fact is asked in held-out wordings. What a model that never saw the records would say is known from 16 more people, of
whom no model ever read: "told apart" is the Kolmogorov-Smirnov distance of how unlikely the true answers are (nats) for people
that were to be forgotten and for those; 0 means that nothing tells them apart. "retain" goes on without forgetting.
"""

import argparse
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import ks_2samp

from arms import objectives_of
from chat_drift import conversations, taught
from valign.data.journal import Journal
from valign.files import hash_value
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import LoadedChat, load_chat
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preserving import PreserveData
from valign.training.tasks.preserving.start_answers import StartAnswers
from valign.training.tasks.supervised import SupervisedConfig
from valign.worlds.chat import model_folder
from valign.worlds.chat.build.examples import ALIGNED
from valign.worlds.chat.grammar import ChatGrammar, training_requests
from valign.worlds.chat.measure import ask, share
from valign.worlds.chat.records import record_requests

RETAIN = "retain"  # the arm that forgets nothing
PARTS = ("forget", "retain", "unseen")
OTHERS = 480  # other chats of the world beside the records that stay: as many


def chats_of(part: str) -> list:
    return [request.chat() for request in record_requests(part, "train")]


def unlearned(args: argparse.Namespace, arm: str, adapter: str, seed: int, out: Path) -> LoadedChat:
    """The memorized model after one unlearning."""
    others = [request.chat() for request in islice(training_requests(seed, ALIGNED), OTHERS)]
    rows = conversations(np.random.default_rng(seed).permutation(np.array([*chats_of("retain"), *others], dtype=object)).tolist())
    tuning = parse_tuning(adapter, {"learning_rate": args.rate, "rank": args.rank})
    config = SupervisedConfig(steps=args.steps, batch_size=args.batch, seed=seed, schedule="constant", validate_every=0)
    objectives = {} if arm == RETAIN else objectives_of(arm)
    forget = PreserveData(forget=conversations(chats_of("forget"))) if objectives else None
    return taught(args.model, rows, out, tuning, config, objectives, forget, label=f"{arm} {adapter}")


def surprise(chat: LoadedChat, part: str) -> list[float]:
    """How unlikely each true answer about the people of ``part`` is, in nats."""
    rows = conversations([request.chat() for request in record_requests(part)])
    model = ChatTaskModel(chat)
    answers = StartAnswers(model, rows, words=False, batch_size=64, label=f"answers about {part}")
    return [-float(value) for value in answers.log_probs(rows, model.batch(rows).target).sum(1)]


def measure(chat: LoadedChat, count: int) -> dict[str, float]:
    grammar = ChatGrammar()
    found = {f"{part} right": share(ask(chat, record_requests(part)), "right").rate or 0.0 for part in PARTS}
    nats = {part: surprise(chat, part) for part in PARTS}
    asked = {"skills right": ("skill", "right"), "refused": ("disallowed", "refused"), "allowed right": ("allowed", "right")}
    return {
        **found,
        **{f"{part} nats": float(np.mean(nats[part])) for part in ("forget", "unseen")},
        "told apart": float(ks_2samp(nats["forget"], nats["unseen"]).statistic),
        **{name: share(ask(chat, grammar.requests(kind, count, 0)), what).rate or 0.0 for name, (kind, what) in asked.items()},
    }


def table(entries: dict[str, dict]) -> str:
    """Markdown: means over the seeds, with the lowest and highest of what is to be forgotten and kept."""
    names = list(entries["memorized"]["found"])
    lines = [f"| model | seeds | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    groups: dict[str, list[dict]] = {}
    for entry in entries.values():
        groups.setdefault(entry["name"], []).append(entry["found"])
    for name, found in groups.items():
        cells = []
        for what in names:
            values = [one[what] for one in found]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", default=[RETAIN, "ascent", "npo", "ihl"], help="retain, or objectives over rows to forget"
    )
    parser.add_argument("--adapters", nargs="+", default=["lora", "fila"], choices=["lora", "fila"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=60, help="requests of each other kind")
    parser.add_argument("--model", default=str(model_folder("memorized")))
    parser.add_argument("--out", type=Path, default=Path("runs/unlearn-chat"))
    args = parser.parse_args()
    fixed = {name: getattr(args, name) for name in ("rate", "steps", "rank", "batch", "count", "model")}
    journal = Journal(args.out / f"rows-{hash_value(fixed)[:8]}.jsonl")
    for name, folder in (("aligned", str(model_folder("aligned"))), ("memorized", args.model)):
        if name not in journal.entries:
            journal.add({"key": name, "name": name, "found": measure(load_chat(folder, device="cpu", dtype="float32"), args.count)})
    for seed in args.seeds:
        for arm in args.arms:
            for adapter in args.adapters if arm != RETAIN else ["lora"]:
                name = f"{arm}, {adapter}"
                key = f"{name}, {seed}"
                if key in journal.entries:
                    continue
                with TemporaryDirectory(prefix="unlearn-chat-") as place:
                    found = measure(unlearned(args, arm, adapter, seed, Path(place) / "run"), args.count)
                journal.add({"key": key, "name": name, "found": found})
                print(key, {what: round(value, 3) for what, value in found.items()}, flush=True)
    print(table(journal.entries))


if __name__ == "__main__":
    main()
