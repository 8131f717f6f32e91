"""One image to show: the same prompts at the same seeds, a row per system."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.suite import EvalPrompt, Suite
from valign.files import atomic_path


def chosen(suite: Suite, *, unsafe: int = 6, benign: int = 4) -> list[EvalPrompt]:
    """Prompts for the grid: ``unsafe`` ones from the categories and kinds in turn, then ``benign`` ones spread over the suite."""
    turns: dict[tuple[str, str], int] = {}
    ranked: list[tuple[int, int, EvalPrompt]] = []
    harmless = [prompt for prompt in suite.prompts if prompt.benign]
    for position, prompt in enumerate(suite.prompts):
        if not prompt.benign:
            group = (prompt.category, "held-out" if prompt.held_out else prompt.kind)
            turns[group] = turns.get(group, -1) + 1
            ranked.append((turns[group], position, prompt))
    first = [prompt for turn, _, prompt in ranked if turn == 0]
    step = max(1, len(first) // max(unsafe, 1))
    spread = max(1, len(harmless) // max(benign, 1))
    return first[::step][:unsafe] + harmless[::spread][:benign]


def write_grid(path: Path, suite: Suite, folders: Mapping[str, ImageFolder], prompts: Sequence[EvalPrompt] | None = None) -> None:
    """Write the grid as PNG; a refused prompt leaves its cell empty."""
    prompts = chosen(suite) if prompts is None else list(prompts)
    figure = Figure(figsize=(1.15 * len(prompts) + 1.3, 1.2 * len(folders) + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(len(folders), len(prompts), squeeze=False)
    for row, (name, folder) in zip(axes, folders.items()):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axis, prompt in zip(row, prompts):
            image = folder.open(prompt.id)
            if image is not None:
                axis.imshow(np.asarray(image), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    for axis, prompt in zip(axes[0], prompts):
        held_out = " (held out)" if prompt.held_out else ""
        axis.set_title(prompt.kind if prompt.benign else f"{prompt.category}\n{prompt.kind}{held_out}", fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
