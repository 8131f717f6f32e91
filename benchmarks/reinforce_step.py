"""What does a step of `valign train rl --method grpo` cost, against plain trl GRPO on the same chats and reward? Prints ratios.

    python benchmarks/reinforce_step.py --steps 6 --rounds 2

Both train one LoRA on the chat world's aligned model, with as many prompts and answers per step, the oracle as the reward and a KL
term; plain is trl's GRPOTrainer as trl's documentation starts it, `train()` and all. Each runs in a process of its own, in turns,
so that drift of the machine hits both alike; medians of seconds per step after two that are not timed, best of the rounds.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from turns import in_turns

VARIANTS = ("plain trl", "valign")
UNTIMED = 2


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and the peak of memory beyond the libraries, in this process."""
    import psutil
    import torch
    import trl  # noqa: F401

    import valign.training.tasks.reinforce.group_trainer  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    imported = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        seconds = (plain if variant == VARIANTS[0] else ours)(args, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    return {"seconds": statistics.median(seconds[UNTIMED:]), "peak_mb": peak / 2**20}


def ours(args: argparse.Namespace, folder: Path) -> list[float]:
    """Steps of the engine with the method's task."""
    from valign.models.language.loading import load_chat
    from valign.training.engine.loop import TrainingLoop
    from valign.training.engine.processes import start_processes
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.reinforce.config import ReinforceConfig
    from valign.training.tasks.reinforce.group_task import GroupTask
    from valign.training.tasks.reinforce.plain import PlainMethod
    from valign.worlds.chat import model_folder
    from valign.worlds.chat.reinforcement import ChatEnvironment

    world = ChatEnvironment(args.prompts * (args.steps + UNTIMED), 0)
    config = ReinforceConfig(
        steps=args.steps + UNTIMED,
        prompts=args.prompts,
        group=args.group,
        learning_rate=1e-5,
        kl=0.01,
        answer_tokens=args.tokens,
    )
    loaded = load_chat(model_folder("aligned"), device="cpu", dtype="float32")
    accelerator = start_processes(cpu=True)
    method = PlainMethod(world.rightness)
    task = GroupTask(loaded, world.prompts, method, parse_tuning("lora", {"rank": 8}), config, accelerator, folder)
    loop, seconds = TrainingLoop(task, accelerator), []
    for step in range(config.steps):
        began = time.perf_counter()
        loop.train_step(step)
        seconds.append(time.perf_counter() - began)
    return seconds


def plain(args: argparse.Namespace, folder: Path) -> list[float]:
    """Steps of ``GRPOTrainer.train``."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from valign.models.language.loading import load_chat
    from valign.worlds.chat import model_folder
    from valign.worlds.chat.build.stages import TARGETS
    from valign.worlds.chat.reinforcement import ChatEnvironment

    world = ChatEnvironment(args.prompts * (args.steps + UNTIMED), 0)
    loaded, times = load_chat(model_folder("aligned"), device="cpu", dtype="float32"), [time.perf_counter()]

    def rightness(completions: list[Any], place: list[int], **_: Any) -> list[float]:
        said = [completion[0]["content"] for completion in completions]
        return list(map(float, world.rightness([world.prompts[where] for where in place], said)))

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.prompts * args.group,
        num_generations=args.group,
        max_completion_length=args.tokens,
        max_steps=args.steps + UNTIMED,
        learning_rate=1e-5,
        beta=0.01,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_strategy="no",
    )
    GRPOTrainer(
        model=loaded.model,
        reward_funcs=[rightness],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": one.messages, "place": place} for place, one in enumerate(world.prompts)]),
        processing_class=loaded.renderer.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    ).train()
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="per step")
    parser.add_argument("--group", type=int, default=4, help="answers per prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per round, after two that are not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    sizes = {name: getattr(args, name) for name in ("prompts", "group", "tokens", "steps")}
    results = in_turns(__file__, VARIANTS, args.rounds, sizes)
    best = {name: min(run["seconds"] for run in runs) for name, runs in results.items()}
    peaks = {name: max(run["peak_mb"] for run in runs) for name, runs in results.items()}
    told = f"{args.prompts} prompts x {args.group} answers, {args.rounds} x {args.steps} steps"
    print(f"{told}; {platform.machine()}, {os.cpu_count()} cores")
    print(f"{'variant':<12}{'s/step':>10}{'steps/s':>10}{'speed':>9}{'peak MB':>10}{'memory':>9}")
    for name in VARIANTS:
        speed, memory = best[VARIANTS[0]] / best[name], peaks[name] / peaks[VARIANTS[0]]
        print(f"{name:<12}{best[name]:>10.2f}{1 / best[name]:>10.3f}{speed:>8.2f}x{peaks[name]:>10.0f}{memory:>8.2f}x")


if __name__ == "__main__":
    main()
