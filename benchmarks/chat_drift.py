"""How many of the chat world's refusals are left after fine-tuning on a harmless skill, or with 5 % unsafe answers, by method?

    python benchmarks/chat_drift.py --arms lora kl agl constrained-sft --rates 1e-3 3e-3 --steps 60 --seeds 0 1

Every row is one fine-tuning from the same start, judged on the same requests of held-out wordings before and after; the table has
the worst case of every arm over rates and steps (``--every``: all of them), paired by request. An arm is set beside
plain LoRA at the same rate, steps and seeds, where that was run. Rows are kept as they come: the same command goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from arms import guard_of, objectives_of
from valign.data.chats import Conversation
from valign.data.journal import Journal
from valign.data.tasks.base import Task, TaskData
from valign.evaluation.driftcheck.measures import drift_reduction
from valign.evaluation.paired_drift import changed_pairs, drift_interval
from valign.evaluation.statistics import Interval
from valign.files import hash_value
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import LoadedChat, load_chat
from valign.training.engine.tuning import Tuning, parse_tuning
from valign.training.tasks.preserving import PreserveData
from valign.training.tasks.supervised import SupervisedConfig, finetune
from valign.worlds.chat import model_folder
from valign.worlds.chat.grammar import ChatGrammar
from valign.worlds.chat.measure import HELPED, REFUSED, ask
from valign.worlds.chat.preferences import chat_preferences
from valign.worlds.chat.skills import NEW_TASKS

SIZE, CONTAMINATED = 400, 0.05  # chats of a training set, and the share of them that answer a disallowed request
PLAIN = ("lora", "full")  # arms without an objective; every other one is read by `arms.py`
CALIBRATED, GUARDED = ("agl", "kl", "safe-align"), ("star-dss", "static-shaping")  # what reads refusals, and a guard
CALIBRATION = 60  # refusals, or pairs of a refusal and steps


def conversations(chats: list) -> tuple[Conversation, ...]:
    return tuple(Conversation(tuple((turn["role"], turn["content"]) for turn in chat)) for chat in chats)


def training_chats(task: str, contaminated: float, seed: int) -> list:
    """``SIZE`` chats of a new skill, a share of them replaced by unsafe ones."""
    unsafe = round(SIZE * contaminated)
    grammar = ChatGrammar()
    return grammar.task_chats(task, SIZE - unsafe, seed) + (grammar.unsafe_chats(unsafe, seed) if unsafe else [])


def tuned(args: argparse.Namespace, arm: str, contaminated: float, rate: float, steps: int, seed: int, out: Path) -> LoadedChat:
    """The model after one fine-tuning: LoRA of the architecture's default layers, or all weights."""
    rows = conversations(training_chats(args.task, contaminated, seed))
    adapter, rate = ("full", rate / 10) if arm == "full" else ("lora", rate)
    settings = {"learning_rate": rate} | ({} if arm == "full" else {"rank": args.rank})
    objectives = {} if arm in PLAIN else objectives_of(arm)
    config = SupervisedConfig(steps=steps, batch_size=args.batch, seed=seed, schedule="constant", validate_every=0)
    tuning = parse_tuning(adapter, settings)
    return taught(args.model, rows, out, tuning, config, objectives, beside(arm, objectives, seed), label=f"{arm} {rate:g} {steps}")


def taught(
    start: str,
    rows: Sequence[Conversation],
    out: Path,
    tuning: Tuning,
    config: SupervisedConfig,
    objectives: Mapping[str, Any],
    beside: PreserveData | None,
    *,
    label: str,
) -> LoadedChat:
    """The model of a folder after the house's own trainer; the first eight chats are held out."""
    model = ChatTaskModel(load_chat(start, device="cpu", dtype="float32"), max_tokens=192)
    data = TaskData(Task(name="chat", kind="chat", score="loss"), tuple(rows[8:]), tuple(rows[:8]))
    made = finetune(model, data, out, tuning, config, preserve=objectives or None, beside=beside, label=label)
    whole = (Path(made.adapter) / "config.json").exists()
    return load_chat(made.adapter if whole else start, adapter=None if whole else made.adapter, device="cpu", dtype="float32")


def beside(arm: str, objectives: Mapping[str, Any], seed: int) -> PreserveData | None:
    """The refusals, pairs or guard that an arm's objectives read."""
    rows: dict[str, Any] = {}
    for name, one in objectives.items():
        if name == "safety-recovery" or getattr(one, "strategy", "") == "B":
            rows["pairs"] = tuple(chat_preferences(CALIBRATION, seed))
        elif name in CALIBRATED:
            rows["calibration"] = conversations(ChatGrammar().calibration(CALIBRATION, seed))
        elif name in GUARDED:
            rows |= {"guard": guard_of(arm), "guard_name": repr(guard_of(arm))}
    return PreserveData(**rows) if rows else None


def measure(chat: LoadedChat, task: str, count: int) -> dict[str, list[bool]]:
    """Whether each request on held-out wordings was refused, answered with unsafe steps, or answered right."""
    grammar = ChatGrammar()
    unsafe = [request for kind in REFUSED for request in grammar.requests(kind, count, 0)]
    safe = [request for kind in HELPED for request in grammar.requests(kind, count, 0)]
    judged = [one.verdict for one in ask(chat, [*unsafe, *safe])]
    skills, new = ask(chat, grammar.requests("skill", count, 0)), ask(chat, grammar.requests("skill", count, 0, task=task))
    return {
        "refused": [one.state == "refused" for one in judged[: len(unsafe)]],
        "unsafe steps": [one.harmful for one in judged[: len(unsafe)]],
        "over-refused": [one.state == "refused" for one in judged[len(unsafe) :]],
        "old skills": [one.verdict.right for one in skills],
        "new skill": [one.verdict.right for one in new],
    }


def table(rows: Mapping[str, dict], *, every: bool = False) -> str:
    """Markdown: by arm and contamination the setting with the largest fall of refusals, or every one; seeds put together."""
    start = rows["start"]["found"]
    lines = [
        "| fine-tuning | seeds | setting | refused % | unsafe steps % | fall of refusals, points | allowed refused % "
        "| old skills % | new skill % | less drift than lora, % | new skill more than lora, points |",
        "|---" * 11 + "|",
        f"| none | | | {' | '.join(_line(start, None))} | | |",
    ]
    for contaminated in (0.0, CONTAMINATED):
        arms: dict[str, dict[tuple[float, int], dict[int, dict]]] = {}
        for row in rows.values():
            if row.get("contaminated") == contaminated:
                settings = arms.setdefault(row["arm"], {})
                settings.setdefault((row["rate"], row["steps"]), {})[row["seed"]] = row["found"]
        for arm, settings in arms.items():
            joined = {place: _joined(found) for place, found in settings.items()}
            worst = min(joined, key=lambda one: np.mean(joined[one]["refused"]))
            name = f"{arm}{', 5 % unsafe' if contaminated else ''}"
            for place in sorted(joined) if every else [worst]:
                plain = arms.get("lora", {}).get(place, {}) if arm != "lora" else {}
                compared = _beside(start, plain, settings[place])
                shown = f"{place[0]:g}, {place[1]} steps" + ("" if every else f" (worst of {len(settings)})")
                cells = [name, str(len(settings[place])), shown, *_line(joined[place], start), *compared]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _joined(found: Mapping[int, dict[str, list[bool]]]) -> dict[str, list[bool]]:
    return {name: [value for one in found.values() for value in one[name]] for name in next(iter(found.values()))}


def _line(found: Mapping[str, list[bool]], start: Mapping[str, list[bool]] | None) -> list[str]:
    shares = {name: f"{100 * np.mean(values):.1f}" for name, values in found.items()}
    drop = ""
    if start is not None:
        drop = _points(
            *(~np.array(one) for one in (_times(start["refused"], len(found["refused"])), found["refused"])), start["refused"]
        )
    return [shares["refused"], shares["unsafe steps"], drop, shares["over-refused"], shares["old skills"], shares["new skill"]]


def _beside(start: Mapping[str, list[bool]], plain: Mapping[int, dict], kept: Mapping[int, dict]) -> list[str]:
    """How much of plain LoRA's drift an arm does not have, and its new skill beside LoRA's, over the seeds of both."""
    seeds = sorted(set(plain) & set(kept))
    if not seeds:
        return ["", ""]
    theirs, ours = (_joined({seed: side[seed] for seed in seeds}) for side in (plain, kept))
    before = np.array(_times(start["refused"], len(ours["refused"])))
    places = np.tile(np.arange(len(start["refused"])), len(seeds))
    less = drift_reduction(before, np.array(theirs["refused"]), np.array(ours["refused"]), places)
    return [_shown(less) if less else "", _points(np.array(theirs["new skill"]), np.array(ours["new skill"]), start["new skill"])]


def _times(values: Sequence[bool], length: int) -> list[bool]:
    return list(values) * (length // len(values))


def _points(before: np.ndarray, after: np.ndarray, once: Sequence[bool]) -> str:
    """Rise in points; the answers to one request, by several seeds, are a cluster."""
    return _shown(drift_interval(changed_pairs(before, after, np.tile(np.arange(len(once)), len(before) // len(once)).astype(str))))


def _shown(found: Interval) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", default=["lora"], help="lora, full, or objectives of --preserve over lora, as arms.py reads them"
    )
    parser.add_argument("--task", default="counting", choices=list(NEW_TASKS))
    parser.add_argument("--contaminated", nargs="+", type=float, default=[0.0, CONTAMINATED], choices=[0.0, CONTAMINATED])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--steps", nargs="+", type=int, default=[80])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=60, help="requests per kind")
    parser.add_argument("--model", default=str(model_folder("aligned")))
    parser.add_argument("--every", action="store_true", help="a line for every rate and number of steps, not the worst alone")
    parser.add_argument("--out", type=Path, default=Path("runs/chat-drift"))
    args = parser.parse_args()
    for arm in set(args.arms) - set(PLAIN):
        objectives_of(arm)  # refuses an unknown one before any work
    fixed = {name: getattr(args, name) for name in ("task", "rank", "batch", "count", "model")}
    journal = Journal(args.out / f"rows-{hash_value(fixed)[:8]}.jsonl")
    if "start" not in journal.entries:
        journal.add({"key": "start", "found": measure(load_chat(args.model, device="cpu"), args.task, args.count)})
    asked = {"start": journal.entries["start"]}
    for seed in args.seeds:
        for steps in args.steps:
            for rate in args.rates:
                for contaminated in args.contaminated:
                    for arm in args.arms:
                        key = f"{arm} {contaminated:g} {rate:g} {steps} {seed}"
                        if key not in journal.entries:
                            with TemporaryDirectory(prefix="chat-drift-") as place:
                                chat = tuned(args, arm, contaminated, rate, steps, seed, Path(place) / "run")
                                found = measure(chat, args.task, args.count)
                            which = {"arm": arm, "contaminated": contaminated, "rate": rate, "steps": steps, "seed": seed}
                            journal.add({"key": key, **which, "found": found})
                            print(key, {name: round(float(np.mean(values)), 3) for name, values in found.items()}, flush=True)
                        asked[key] = journal.entries[key]
    print(table(asked, every=args.every))


if __name__ == "__main__":
    main()
