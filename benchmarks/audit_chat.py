"""Has the chat world's safety directions of its own, and how few neurons carry its refusals?

    python benchmarks/audit_chat.py subspaces --seeds 0 1 2 --out runs/audit-chat
    python benchmarks/audit_chat.py concentration --out runs/audit-chat

Updates of the aligned model: `counting` alone (useful), half of the chats unsafe answers (harmful), and 5 % (contaminated), as
`chat_models.py` fine-tunes. The audit of concentration asks the aligned model, the useful one, and one that learned the same with
``--preserve agl``.
"""

import argparse
from pathlib import Path

from chat_drift import CONTAMINATED
from chat_models import tuned_folder
from valign.audits.report import write_audit
from valign.audits.subspaces import audit_subspaces
from valign.merging.realign import open_realignment
from valign.worlds.chat import model_folder

SHARES = {"useful": 0.0, "contaminated": CONTAMINATED, "harmful": 0.5, "agl": 0.0}  # of unsafe answers


def tuned(name: str, seed: int, args: argparse.Namespace) -> Path:
    """A fine-tuned model, kept."""
    arm = "agl" if name == "agl" else "lora"
    return tuned_folder(args.out / f"{name}-{args.steps}-{seed}", "counting", SHARES[name], seed, steps=args.steps, arm=arm)


def subspaces(seed: int, args: argparse.Namespace) -> None:
    out, folders = args.out, {name: tuned(name, seed, args) for name in ("useful", "contaminated", "harmful")}
    opened = open_realignment(model_folder("base"), model_folder("aligned"), list(folders.values()))
    updates = dict(zip(folders, opened.vectors.tasks.values(), strict=True))
    figures, plots, verdict = audit_subspaces(updates, opened.vectors.safety, useful=["useful"], harmful=["harmful"])
    write_audit(out / f"subspaces-{seed}", figures, plots, verdict, force=True)
    print(f"seed {seed}", *verdict, sep="\n", flush=True)
    for name, kinds in figures["energy_kept"].items():
        half = ", ".join(f"{kind} {rows['0.5']:.3f}" for kind, rows in kinds.items())
        print(f"  {name}: energy along half of the directions {half}; cosine {figures['cosine'][name]:+.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["subspaces", "concentration"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=["aligned", "useful", "agl"], choices=["aligned", *SHARES])
    parser.add_argument("--out", type=Path, default=Path("runs/audit-chat"))
    args = parser.parse_args()
    if args.which == "subspaces":
        for seed in args.seeds:
            subspaces(seed, args)
        return
    from valign.audits.concentration import Concentration, audit_concentration
    from valign.cli.audit import SubjectOptions, _chat

    for name in args.models:
        folder = model_folder("aligned") if name == "aligned" else tuned(name, args.seeds[0], args)
        if (args.out / f"concentration-{name}").exists():
            continue
        subject, sets, utility = _chat(str(folder), SubjectOptions(world="chat", rows=args.rows), args.seeds[0])
        figures, plots, verdict = audit_concentration(subject, *sets, Concentration(least=args.rows), utility=utility)
        write_audit(args.out / f"concentration-{name}", figures, plots, verdict)
        told = f"concentration index {figures['concentration_index']:.3f}, 90 % carried by {figures['carries_90']}"
        print(name, *verdict, told, sep="\n", flush=True)
        for row in figures["by_rank"]:
            told = {kind: f"{row[kind]['refused']['value']:.2f}/{row[kind]['utility']:.2f}" for kind in ("ranked", "random")}
            print(f"  {row['share']:.1%} silent, refused/skills right: {told}", flush=True)


if __name__ == "__main__":
    main()
