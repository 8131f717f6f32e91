"""What does `--preserve` cost, against plain LoRA on the same chats? Prints seconds before the first step, per step, and memory.

    python benchmarks/preserve_step.py --steps 20 --rounds 3

All train one LoRA of rank 8 on the chat world's aligned model; objectives read 60 refusals. "before" is what the objective does
before the first step: the Fisher matrix of AGL, the start's answers of the KL penalty. Each variant runs in a process of its own,
in turns; seconds are of the processor, medians of a round, and the difference to plain LoRA is taken within a round.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from typing import Any

from turns import in_turns

VARIANTS = ("lora", "kl", "agl", "agl:coordinate", "agl:vector")
UNTIMED = 2


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds and the peak of memory beyond the libraries, in this process."""
    import psutil

    from arms import objectives_of
    from chat_drift import beside, conversations, training_chats
    from valign.data.tasks.base import Task, TaskData
    from valign.models.language.chat_task import ChatTaskModel
    from valign.models.language.loading import load_chat
    from valign.training.engine.loop import TrainingLoop
    from valign.training.engine.processes import start_processes
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.preserving import Preservation
    from valign.training.tasks.supervised.config import SupervisedConfig
    from valign.training.tasks.supervised.task import SupervisedTask
    from valign.worlds.chat import model_folder

    imported = psutil.Process().memory_info().rss
    model = ChatTaskModel(load_chat(model_folder("aligned"), device="cpu", dtype="float32"), max_tokens=192)
    rows = conversations(training_chats("counting", 0.0, 0))
    data = TaskData(Task(name="chat", kind="chat", score="loss"), rows[8:], rows[:8])
    steps = args.steps + UNTIMED
    config = SupervisedConfig(steps=steps, batch_size=args.batch, schedule="constant", validate_every=0)
    objectives = {} if variant == "lora" else objectives_of(variant)
    preservation = None
    if objectives:
        read = beside(variant, objectives, 0)
        assert read is not None
        preservation = Preservation(objectives, read, model, steps=steps, batch_size=args.batch, seed=0)
    began = time.process_time()
    tuning = parse_tuning("lora", {"rank": 8, "learning_rate": 1e-3})
    accelerator = start_processes(cpu=True)
    loop = TrainingLoop(SupervisedTask(model, data, tuning, config, accelerator, preservation=preservation), accelerator)
    before, seconds = time.process_time() - began, []
    for step in range(steps):
        began = time.process_time()
        loop.train_step(step)
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    return {"before": before, "step": statistics.median(seconds[UNTIMED:]), "peak": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="chats per step, and refusals beside them")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per round, after two that are not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    results = in_turns(__file__, VARIANTS, args.rounds, {"batch": args.batch, "steps": args.steps})
    print(f"{args.rounds} x {args.steps} steps of {args.batch} chats; {platform.machine()}, {os.cpu_count()} cores")
    print(f"{'variant':<16}{'before, s':>11}{'more':>8}{'step, ms':>11}{'more':>8}{'peak MB':>9}{'more':>8}")
    plain = results[VARIANTS[0]]
    for name, runs in results.items():
        cells = []
        for what, factor, digits in (("before", 1, 2), ("step", 1000, 1), ("peak", 1, 0)):
            more = statistics.median(factor * (one[what] - other[what]) for one, other in zip(runs, plain))
            cells.append(f"{factor * statistics.median(one[what] for one in runs):>10.{digits}f}{more:>8.{digits}f}")
        print(f"{name:<16}{' '.join(cells)}")


if __name__ == "__main__":
    main()
