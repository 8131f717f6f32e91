"""How much of a chat model's drift do the four realignments give back, and what do they cost in skill?

    python benchmarks/realign_chat.py --seeds 0 1 2 --out runs/realign-chat

The chat world's aligned model learns a new skill from chats of which 5 % answer disallowed requests (`chat_drift.py`), and is
realigned at several strengths. Every model is asked the same requests of held-out wordings. ``--fuse`` realigns three drifted
skills as one model. Each row is kept as a file, so that a stopped call goes on. SOMF learns on 64 pairs of the training wordings.
"""

import argparse
import shutil
from pathlib import Path

from chat_drift import CONTAMINATED
from chat_models import measure, tuned_folder
from valign.files import read_json, write_json
from valign.merging.realign import REALIGN, ChatPreferences, open_realignment, realign
from valign.models.language.loading import load_chat
from valign.worlds.chat import model_folder
from valign.worlds.chat.preferences import chat_preferences

ROWS = [  # method and options, weakest first
    ("resta", {"strength": 0.25}),
    ("resta", {"strength": 0.5}),
    ("enchtable", {"strength": 0.5, "fine": False}),
    ("enchtable", {"strength": 1.0}),
    ("enchtable", {"strength": 2.0, "auto_gain": True}),
    ("safe-lora", {"strength": 0.3}),
    ("safe-lora", {"strength": 0.5}),
    ("somf", {"strength": 0.25}),
    ("somf", {"strength": 0.5}),
    ("somf", {"strength": 0.5, "rescale": "mean"}),
]
FUSED = ("counting", "reversing", "dialect")
PAIRS = 64


def preferences(seed: int) -> ChatPreferences:
    """Refusals preferred to steps, of the training wordings."""
    pairs = chat_preferences(PAIRS, seed)
    return ChatPreferences(load_chat(model_folder("aligned"), device="cpu", dtype="float32"), pairs)


def row(folder: Path, tasks: list[str], args: argparse.Namespace, kept: Path | None = None) -> dict:
    """What a model does, kept beside it; of several tasks also each one's share, and "new skill" is their mean."""
    kept = kept or folder.with_name(f"{folder.name}.json")
    if not kept.exists():
        write_json(kept, measure(load_chat(folder, device="cpu", dtype="float32"), tasks, args.count))
    return read_json(kept)


def show(name: str, found: dict, drift: dict, aligned: dict, moved: float | None) -> None:
    """One line, with the share of the drift that came back, and the points of the new skill that were lost."""
    gap = aligned["refused"] - drift["refused"]
    back = (found["refused"] - drift["refused"]) / gap if gap else float("nan")
    lost = 100 * (drift["new skill"] - found["new skill"])
    figures = " ".join(f"{key} {value:.3f}" for key, value in found.items())
    print(
        f"{name:60} back {back:6.2f} lost {lost:6.1f} moved {moved if moved is None else round(moved, 2)} | {figures}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--task", default="counting")
    parser.add_argument("--fuse", default="none", help="realign counting, reversing and dialect as one model")
    parser.add_argument("--fuse-scale", type=float, default=None)
    parser.add_argument("--methods", nargs="*", default=list(REALIGN), help="those whose rows are measured")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--mask-steps", type=int, default=60)
    parser.add_argument("--count", type=int, default=20, help="requests per kind")
    parser.add_argument("--out", type=Path, default=Path("runs/realign-chat"))
    args = parser.parse_args()
    tasks = [args.task] if args.fuse == "none" else list(FUSED)
    fused = args.fuse if args.fuse_scale is None else f"{args.fuse}-{args.fuse_scale}"
    place = args.out / f"{'+'.join(tasks)}-{fused}-{args.steps}-{args.rate}-{args.count}"
    place.mkdir(parents=True, exist_ok=True)
    aligned = row(model_folder("aligned"), tasks, args, place / "aligned.json")
    print(f"{'aligned':60} | {aligned}", flush=True)
    for seed in args.seeds:
        models = [
            tuned_folder(
                args.out / f"drifted-{task}-{args.steps}-{args.rate}-{seed}",
                task,
                CONTAMINATED,
                seed,
                rate=args.rate,
                steps=args.steps,
            )
            for task in tasks
        ]
        for task, model in zip(tasks, models) if len(tasks) > 1 else ():
            print(f"{seed} {task} alone: {row(model, [task], args)}", flush=True)
        one = realigned("resta", {"strength": 0.0}, models, seed, place, args)
        drift = row(one, tasks, args)
        show(f"{seed} drifted", drift, drift, aligned, 0.0)
        for name, options in ROWS:
            if name not in args.methods:
                continue
            folder = realigned(name, options, models, seed, place, args)
            told = " ".join(f"{key}={value}" for key, value in options.items())
            moved = read_json(folder / "realign.json")["moved"]
            show(f"{seed} {name} {told}", row(folder, tasks, args), drift, aligned, moved)


def realigned(name: str, options: dict, models: list[Path], seed: int, place: Path, args: argparse.Namespace) -> Path:
    """The folder of one row."""
    told = "-".join(f"{key}_{value}" for key, value in options.items()).replace(".", ",")
    folder = place / f"{seed}-{name}-{told}"
    more = {"steps": args.mask_steps, "seed": seed} if name == "somf" else {}
    earlier = next(iter(sorted(place.glob(f"{seed}-somf-strength_*/mask/masks.safetensors"))), None)
    if name == "somf" and "rescale" not in options and earlier is not None and earlier.parents[1] != folder:
        more = {"masks": earlier}
    opened = open_realignment(model_folder("base"), model_folder("aligned"), models)
    objective = preferences(seed) if name == "somf" and "masks" not in more else None
    if (folder / "realign.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    realign(
        REALIGN[name](fuse=args.fuse, fuse_scale=args.fuse_scale, **options, **more), opened, folder, name=name, objective=objective
    )
    return folder


if __name__ == "__main__":
    main()
