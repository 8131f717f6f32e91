"""What do the word lists find in prompts of eight languages, and what do they cry wolf at?

    python benchmarks/languages.py [--folder benchmarks/languages]

A row per language, from the prompts beside this file: 21 harmful and 12 harmless ones each, written for this purpose by the author
of the lists, so the recall flatters. Only the lists are asked, neither the rules for English nor the trained head.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from valign.evaluation.statistics import share_interval
from valign.guard.rules.language import LanguageStage
from valign.policy import load_policy


def measure(folder: Path) -> list[tuple[str, str, str]]:
    """Language, recall and false alarms, each with its 95 % interval."""
    stage = LanguageStage(load_policy("default"))
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        fired = np.array([verdict.fired for verdict in stage.check_many([row["prompt"] for row in rows])])
        label = np.array([row["label"] for row in rows], dtype=bool)
        names = np.array([row["id"] for row in rows])
        found.append((path.stem, *(_share(fired[own], names[own]) for own in (label, ~label))))
    return found


def _share(hits: np.ndarray, names: np.ndarray) -> str:
    rate = share_interval(hits, names)
    return f"{int(hits.sum())} of {len(hits)} [{rate.low:.0%}, {rate.high:.0%}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "languages")
    for language, recall, alarms in measure(parser.parse_args().folder):
        print(f"{language}  harmful found {recall}  harmless flagged {alarms}")
