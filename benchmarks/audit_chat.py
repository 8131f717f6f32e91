"""Has the chat world's safety directions of its own, and how few neurons carry its refusals?

    python benchmarks/audit_chat.py subspaces --seeds 0 1 2 --out runs/audit-chat
    python benchmarks/audit_chat.py concentration --out runs/audit-chat

Updates of the aligned model: `counting` alone (useful), half of the chats unsafe answers (harmful), and 5 % (contaminated), as
`chat_drift.py` fine-tunes. The audit of concentration asks the aligned model and the useful one.
"""

import argparse
from pathlib import Path

from chat_drift import CONTAMINATED, finetune, training_chats
from valign.audits.report import write_audit
from valign.audits.subspaces import audit_subspaces
from valign.merging.realign import open_realignment
from valign.models.language.loading import load_chat
from valign.worlds.chat import model_folder

SHARES = {"useful": 0.0, "contaminated": CONTAMINATED, "harmful": 0.5}


def tuned(name: str, seed: int, out: Path, steps: int) -> Path:
    """A fine-tuned model, kept."""
    folder = out / f"{name}-{steps}-{seed}"
    if not (folder / "config.json").exists():
        start = load_chat(model_folder("aligned"), device="cpu", dtype="float32")
        made = finetune(start, training_chats("counting", SHARES[name], seed), rate=1e-3, steps=steps, rank=8, batch=16, seed=seed)
        made.model.save_pretrained(folder)
        made.renderer.tokenizer.save_pretrained(folder)
    return folder


def subspaces(seed: int, out: Path, steps: int) -> None:
    folders = {name: tuned(name, seed, out, steps) for name in SHARES}
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
    parser.add_argument("--out", type=Path, default=Path("runs/audit-chat"))
    args = parser.parse_args()
    if args.which == "subspaces":
        for seed in args.seeds:
            subspaces(seed, args.out, args.steps)
        return
    from valign.audits.concentration import Concentration, audit_concentration
    from valign.cli.audit import SubjectOptions, _chat

    for name, folder in (("aligned", model_folder("aligned")), ("useful", tuned("useful", args.seeds[0], args.out, args.steps))):
        if (args.out / f"concentration-{name}").exists():
            continue
        subject, sets, utility = _chat(str(folder), SubjectOptions(world="chat", rows=args.rows), args.seeds[0])
        figures, plots, verdict = audit_concentration(subject, *sets, Concentration(least=args.rows), utility=utility)
        write_audit(args.out / f"concentration-{name}", figures, plots, verdict)
        print(name, *verdict, f"concentration index {figures['concentration_index']:.3f}", sep="\n", flush=True)
        for row in figures["by_rank"]:
            told = {kind: f"{row[kind]['refused']['value']:.2f}/{row[kind]['utility']:.2f}" for kind in ("ranked", "random")}
            print(f"  {row['share']:.1%} silent, refused/skills right: {told}", flush=True)


if __name__ == "__main__":
    main()
