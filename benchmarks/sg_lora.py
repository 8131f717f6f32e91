"""Is an adapter that SG-LoRA makes from a description better than what it is made of, on a task that nobody trained on?

    python benchmarks/sg_lora.py                         # three seeds, about 10 minutes of one core
    python benchmarks/sg_lora.py --seeds 0 --steps 40 --generator-steps 200

A task is to name the glyph in images of one colour on one background: fifteen tasks, with descriptions such as "a red glyph in a
meadow", that the bundled miniature CLIP embeds. Each expert is a LoRA of rank 2 on the queries, keys and values of both towers,
trained on one task; all share the start. Three tasks, one of each colour, are held out of the library, others with each seed, and
every row of the table answers the same new images of theirs. The oracle is trained on the held-out task itself.
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from valign.adapters.sg_lora import SgLora, SgLoraConfig, TaskExpert, build_library, fingerprint, fit_sg_lora
from valign.data.tasks.base import Task, TaskData
from valign.data.tasks.images import LabelledImage
from valign.models.encoders.clip import ClipEncoder
from valign.models.heads.clip_task import ClipTaskModel
from valign.models.heads.task_model import Target
from valign.progress import track
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.supervised import SupervisedConfig, SupervisedTask, judge
from valign.worlds.shapes import clip_folder
from valign.worlds.shapes.glyph_tasks import LEARNT, TEMPLATE
from valign.worlds.shapes.renderer import BACKGROUNDS, PLACES, Item, Scene, render
from valign.worlds.shapes.vocabulary import BACKGROUND_PHRASES

TARGETS, RANK = ("q_proj", "k_proj", "v_proj"), 2
COLOURS = ("red", "green", "blue")
TASKS = tuple((colour, background) for colour in COLOURS for background in BACKGROUNDS)
BATCH = 24  # images of a training step
Place = tuple[str, str]  # colour, background


def description(task: Place) -> str:
    colour, background = task
    return f"a {colour} glyph {BACKGROUND_PHRASES[background][0]}"


def images(task: Place, count: int, seed: int, *, test: bool) -> tuple[LabelledImage, ...]:
    """``count`` of each glyph, anywhere in the image, in the flat style; each is rendered with a jitter of its own."""
    rng = np.random.default_rng([seed, test, TASKS.index(task)])
    rows = []
    for glyph in LEARNT * count:
        scene = Scene((Item(glyph, task[0], str(rng.choice(list(PLACES)))),), task[1], "flat")
        rows.append(LabelledImage(np.asarray(render(scene, int(rng.integers(2**32)))), glyph))
    return tuple(rows)


def task_data(task: Place, seed: int, options: argparse.Namespace) -> TaskData:
    train = images(task, options.shots, seed, test=False)
    return TaskData(Task(name="-".join(task), kind="classification"), train, images(task, options.judged, 0, test=True))


def fresh(data: TaskData) -> ClipTaskModel:
    return ClipTaskModel(ClipEncoder(clip_folder(), device="cpu"), Target.of(data), template=TEMPLATE)


def train(data: TaskData, seed: int, options: argparse.Namespace) -> tuple[str, list[dict[str, Tensor]]]:
    """The start's fingerprint, and the factors after each of the last steps."""
    model, tuning = fresh(data), parse_tuning("lora", {"rank": RANK, "learning_rate": options.rate})
    config = SupervisedConfig(steps=options.steps, batch_size=BATCH, seed=seed, schedule="constant", validate_every=0)
    accelerator = start_processes(cpu=True)
    loop = TrainingLoop(SupervisedTask(model, data, tuning, config, accelerator, targets=TARGETS), accelerator)

    def factors() -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model.network).items()}

    start, kept = fingerprint(factors()), []
    for step in range(options.steps):
        loop.train_step(step)
        if step >= options.steps - options.checkpoints:
            kept.append(factors())
    return start, kept


def accuracy(data: TaskData, state: Mapping[str, Tensor] | None, lora: LoraConfig) -> float:
    """On the held-out images; None is the untrained model."""
    model = fresh(data)
    if state is not None:
        model.network = get_peft_model(model.network, replace(lora))
        wrong = set_peft_model_state_dict(model.network, dict(state)).unexpected_keys
        assert not wrong, wrong
    return judge(model, data.held_out, batch_size=64)["accuracy"]


def one_seed(seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row of accuracies for each held-out task."""
    held_out = [(colour, tuple(BACKGROUNDS)[(seed + turn) % len(BACKGROUNDS)]) for turn, colour in enumerate(COLOURS)]
    data = {task: task_data(task, seed, options) for task in TASKS}
    trained = {task: train(data[task], seed, options) for task in track(TASKS, f"experts of seed {seed}")}
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)}
    speaker = fresh(data[TASKS[0]])

    def encode(text: str) -> Tensor:
        return speaker.texts([text])[0]

    experts = [
        TaskExpert(name="-".join(task), description=description(task), checkpoints=states, config=lora, start=start)
        for task, (start, states) in trained.items()
        if task not in held_out
    ]
    library = build_library(experts, encode)
    sizes = {"hidden": options.hidden, "steps": options.generator_steps, "batch": options.generator_batch}
    generator = fit_sg_lora(library, SgLoraConfig(chunk="layer", tau=options.tau, seed=seed, **sizes))
    print(f"seed {seed}: P = {library.schema.size}, loss {generator.losses[0]:.0f} -> {generator.losses[-1]:.0f}", flush=True)
    return [answers(task, data[task], trained[task][1][-1], generator, encode, options.draws) for task in held_out]


def answers(
    task: Place, data: TaskData, oracle: Mapping[str, Tensor], generator: SgLora, encode: Callable[[str], Tensor], draws: int
) -> dict[str, float]:
    """Accuracy on a held-out task of everything that is compared."""
    library, said, lora = generator.library, description(task), generator.lora_config()
    condition = generator.condition(encode, said)
    weights = {library.names[e]: round(w, 2) for e, w in enumerate(condition.weights.tolist()) if w}
    print(f"  {'-'.join(task)}: cosine {condition.similarity:.2f}, {weights}", flush=True)
    nearest = library.means[int(condition.weights.argmax())]
    states = [generator.generate(encode, said, seed=draw) for draw in range(draws)]
    found = {
        "untrained CLIP": accuracy(data, None, lora),
        "mean of all experts": accuracy(data, library.schema.unflatten(library.means.mean(0)), lora),
        "nearest expert": accuracy(data, library.schema.unflatten(nearest), lora),
        'SG-LoRA, `mode="merge"`': accuracy(data, generator.generate(encode, said, mode="merge"), lora),
        'SG-LoRA, `mode="mean"`': accuracy(data, generator.generate(encode, said, mode="mean"), lora),
        f'SG-LoRA, `mode="sample"`, mean of {draws}': statistics.fmean(accuracy(data, state, lora) for state in states),
        "oracle: LoRA trained on the task": accuracy(data, oracle, lora),
    }
    print("   ", {name: round(value, 3) for name, value in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=40, help="training images of each glyph and task")
    parser.add_argument("--judged", type=int, default=10, help="test images of each glyph and task")
    parser.add_argument("--steps", type=int, default=50, help="of each expert")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of the experts")
    parser.add_argument("--checkpoints", type=int, default=10, help="M, the last steps whose factors are kept of each expert")
    parser.add_argument("--generator-steps", type=int, default=600)
    parser.add_argument("--generator-batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tau", type=float, default=SgLoraConfig.tau)
    parser.add_argument("--draws", type=int, default=3, help="samples of the generator")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    rows = [one_seed(seed, options) for seed in options.seeds]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"\n{len(TASKS) - len(COLOURS)} experts, {len(COLOURS)} held-out tasks, {len(rows)} seeds, chance {1 / len(LEARNT):.1%}; "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit}, "
        f"{(time.process_time() - began) / 60:.0f} core-minutes\n"
    )
    print("| accuracy on tasks without an expert | mean | each seed |")
    print("|---|---:|---|")
    for name in rows[0][0]:
        means = [statistics.fmean(row[name] for row in seed) for seed in rows]
        print(f"| {name} | {statistics.fmean(means):.1%} | {', '.join(f'{mean:.1%}' for mean in means)} |")


if __name__ == "__main__":
    main()
