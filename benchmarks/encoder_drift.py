"""How much detection does the guard's encoder lose when it is fine-tuned on harmless texts, and what do the methods give back?

    python benchmarks/encoder_drift.py --data DATA --arms lora full kl agl "agl*0.01" --rates 1e-3 3e-3 --seeds 0 1 2

The aligned model is the packaged guard: all-MiniLM with the layers and the head that were trained for detection. Every row is one
fine-tuning from there by a linear head of its own on SST-2 or TREC; then the same encoder goes back under the guard's frozen head
and the learned stage judges prompts of held-out concepts at its shipped threshold. Calibration prompts come from other concepts.
An arm is an adapter (``lora``, ``full``, ``head``: the encoder stays) or an objective of `--preserve` over LoRA as `arms.py` reads
them: ``agl:vector*10``. The table has the worst case of every arm
over rates and steps by AUROC, seeds put together, paired by prompt. Rows are kept as they come: the same command goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from arms import objectives_of
from valign.data.journal import Journal
from valign.data.prompts.labelled import capped, read_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.data.tasks.base import TaskData
from valign.data.tasks.texts import GLUE, TextTask, read_data
from valign.evaluation.guards.rates import auroc
from valign.evaluation.paired_drift import changed_pairs, drift_interval
from valign.evaluation.statistics import t_interval
from valign.files import hash_value
from valign.guard.head.learned import SHIPPED, LearnedStage
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.guard_text import PromptRow, load_guard_text_model
from valign.models.heads.prompt_head import Head, load_head
from valign.models.heads.task_model import Target
from valign.policy import Policy, load_policy
from valign.recipes.guard_head import TEST_FOLD
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.guard_head.fit import targets
from valign.training.tasks.preserving import PreserveData
from valign.training.tasks.supervised import SupervisedConfig, finetune

TASKS = {
    "sst2": GLUE["sst2"],
    "trec": TextTask(name="trec", kind="classification", texts=("sentence",), target="label", folder="trec"),
}
ADAPTERS = ("lora", "full", "head")  # arms without an objective
CALIBRATED_BY = ("coprov2", "overt")  # sources of the calibration prompts
JUDGED = ("coprov2", "overt", "diffusiondb_prompts")  # and of those that are judged
TRAINED, HELD_OUT = 2000, 236  # texts of a task


@cache
def prompts(data: Path, source: str) -> list[LabelledPrompt]:
    return without_repeats(read_rows([data / source], load_policy("default")))


def judged_rows(data: Path, count: int) -> list[LabelledPrompt]:
    """Prompts of groups that the head was not trained on, at most ``count`` of each source and label."""
    rows = [row for source in JUDGED for row in prompts(data, source) if row.fold == TEST_FOLD]
    return capped(rows, count, seed=0)


def calibration_rows(data: Path, count: int, policy: Policy, seed: int) -> tuple[PromptRow, ...]:
    """About ``count`` prompts of other groups, as many safe as unsafe, with the labels of their sets."""
    rows = [row for source in CALIBRATED_BY for row in prompts(data, source) if row.fold != TEST_FOLD]
    rows = capped(rows, -(-count // (2 * len(CALIBRATED_BY))), seed=seed)
    goal, _ = targets(rows, policy.category_ids())
    return tuple(PromptRow(row.prompt, tuple(map(int, line))) for row, line in zip(rows, goal.tolist()))


@cache
def task_data(data: Path, task: str, seed: int) -> TaskData:
    return read_data(TASKS[task], data / TASKS[task].folder, train_rows=TRAINED, held_out_rows=HELD_OUT, seed=seed)


def tuned(args: argparse.Namespace, guard: Head, which: Mapping[str, Any], out: Path) -> tuple[Head, MiniLM, float]:
    """The guard after one fine-tuning by the house's own trainer, and the accuracy on the task's held-out texts."""
    arm, seed = which["arm"], which["seed"]
    data = task_data(args.data, which["task"], seed)
    model = load_guard_text_model(guard, Target.of(data), seed=seed)
    adapter, rate = ("full", which["rate"] / 10) if arm == "full" else (arm if arm in ADAPTERS else "lora", which["rate"])
    settings: dict[str, Any] = {"learning_rate": rate} | ({"rank": args.rank} if adapter == "lora" else {})
    preserve = {} if arm in ADAPTERS else objectives_of(arm)
    rows = calibration_rows(args.data, args.calibration, load_policy("default"), seed) if preserve else ()
    made = finetune(
        model,
        data,
        out,
        parse_tuning(adapter, settings),
        SupervisedConfig(steps=which["steps"], batch_size=args.batch, seed=seed, validate_every=0, checkpoint_every=0),
        preserve=preserve or None,
        beside=PreserveData(calibration=rows) if rows else None,
        label=" ".join(map(str, which.values())),
    )
    return *model.trained_guard(), made.scores["accuracy"]


def measure(guard: Head, encoder: MiniLM, rows: Sequence[LabelledPrompt]) -> dict[str, list[Any]]:
    """The learned stage's decision about each prompt, at the shipped threshold, and its score."""
    verdicts = LearnedStage.from_policy(load_policy("default"), encoder, guard).check_many([row.prompt for row in rows])
    return {"fired": [int(one.fired) for one in verdicts], "score": [round(float(one.ranking or 0), 7) for one in verdicts]}


def _labels(rows: Sequence[LabelledPrompt]) -> np.ndarray:
    return np.array([row.label == 1 for row in rows])


def area(found: Mapping[str, Sequence[float]], unsafe: np.ndarray) -> float:
    score = np.array(found["score"])
    return auroc(score[unsafe], score[~unsafe]).value


def table(entries: Mapping[str, dict[str, Any]], rows: Sequence[LabelledPrompt]) -> str:
    """Markdown: by task and arm the setting with the lowest AUROC, seeds put together."""
    start, unsafe = entries["start"]["found"], _labels(rows)
    lines = [
        "| task | fine-tuning | seeds | worst of its settings | accuracy % | AUROC | loss of AUROC given back % | recall % "
        "| fall of recall, points | false alarms % | rise of false alarms, points |",
        "|---" * 11 + "|",
        f"| | none | | | | {area(start, unsafe):.4f} | | {' | '.join(_flagged([start], start, rows))} |",
    ]
    for task in dict.fromkeys(entry["task"] for entry in entries.values() if "task" in entry):
        arms: dict[str, dict[tuple[float, int], list[dict[str, Any]]]] = {}
        for entry in entries.values():
            if entry.get("task") == task:
                arms.setdefault(entry["arm"], {}).setdefault((entry["rate"], entry["steps"]), []).append(entry)
        areas = {
            arm: {place: {one["seed"]: area(one["found"], unsafe) for one in own} for place, own in settings.items()}
            for arm, settings in arms.items()
        }
        worst = {arm: min(places, key=lambda one: np.mean(list(places[one].values()))) for arm, places in areas.items()}
        for arm, place in worst.items():
            own, mine = arms[arm][place], areas[arm][place]
            plain = areas["lora"][worst["lora"]] if "lora" in arms and arm != "lora" else {}
            cells = [
                *(task, f"`{arm}`", str(len(own)), f"{place[0]:g}, {place[1]} steps (of {len(arms[arm])})"),
                f"{100 * np.mean([one['accuracy'] for one in own]):.1f}",
                f"{np.mean(list(mine.values())):.4f}",
                given_back(area(start, unsafe), plain, mine),
                *_flagged([one["found"] for one in own], start, rows),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def given_back(start: float, plain: Mapping[int, float], kept: Mapping[int, float]) -> str:
    """Share of plain LoRA's loss that a method does not have, over the seeds of both, with Student's interval over seeds; in %.

    Empty without such seeds, or where plain LoRA lost nothing on average.
    """
    seeds = sorted(set(plain) & set(kept))
    lost = float(np.mean([start - plain[seed] for seed in seeds])) if seeds else 0.0
    if lost <= 0:
        return ""
    shares = [100 * (kept[seed] - plain[seed]) / lost for seed in seeds]
    if len(seeds) < 2:
        return f"{shares[0]:.0f}"
    found = t_interval(np.array(shares))
    return f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"


def _flagged(
    found: Sequence[Mapping[str, Sequence[float]]], start: Mapping[str, Sequence[float]], rows: Sequence[LabelledPrompt]
) -> list[str]:
    """Share flagged of unsafe prompts, its fall, share flagged of safe ones, its rise; paired by prompt, groups as clusters."""
    cells = []
    for kind, sign in ((_labels(rows), -1), (~_labels(rows), 1)):
        before = np.tile(np.array(start["fired"], dtype=bool)[kind], len(found))
        after = np.concatenate([np.array(one["fired"], dtype=bool)[kind] for one in found])
        groups = np.tile(np.array([row.group for row in rows])[kind], len(found))
        moved = drift_interval(changed_pairs(before, after, groups) if sign > 0 else changed_pairs(after, before, groups))
        change = f"{100 * moved.value:.1f} [{100 * moved.low:.1f}, {100 * moved.high:.1f}]" if found[0] is not start else ""
        cells += [f"{100 * after.mean():.1f}", change]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue_sst2, trec and the sets of prompts")
    parser.add_argument("--arms", nargs="+", default=["lora"], help="lora, full, head, or objectives of --preserve over lora")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3], help="of LoRA; full fine-tuning takes a tenth of them")
    parser.add_argument("--steps", nargs="+", type=int, default=[60])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=60, help="prompts, about")
    parser.add_argument("--count", type=int, default=150, help="judged prompts of a source and label at most")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder-drift"))
    args = parser.parse_args()
    for arm in set(args.arms) - set(ADAPTERS):
        objectives_of(arm)  # refuses an unknown one before any work
    fixed = {name: getattr(args, name) for name in ("rank", "batch", "calibration", "count")}
    journal = Journal(args.out / f"rows-{hash_value(fixed)[:8]}.jsonl")
    guard, rows = load_head(SHIPPED), judged_rows(args.data, args.count)
    if "start" not in journal.entries:
        journal.add({"key": "start", "found": measure(guard, MiniLM(), rows)})
    for seed in args.seeds:
        for steps in args.steps:
            for rate in args.rates:
                for task in args.tasks:
                    for arm in args.arms:
                        which = {"task": task, "arm": arm, "rate": rate, "steps": steps, "seed": seed}
                        key = " ".join(map(str, which.values()))
                        if key in journal.entries:
                            continue
                        with TemporaryDirectory(prefix="encoder-drift-") as place:
                            head, encoder, right = tuned(args, guard, which, Path(place) / "run")
                        found = measure(head, encoder, rows)
                        journal.add({"key": key, **which, "accuracy": right, "found": found})
                        print(key, f"accuracy {right:.3f}, AUROC {area(found, _labels(rows)):.4f}", flush=True)
    print(table(journal.entries, rows))


if __name__ == "__main__":
    main()
