"""One image to show: the same prompts at the same seeds, a row per system."""

from collections.abc import Mapping
from pathlib import Path

from valign.data.images.grid import figure_grid
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


def write_before_after(path: Path, suite: Suite, folders: Mapping[str, ImageFolder]) -> None:
    """Write the grid as PNG; a refused prompt leaves its cell empty."""
    prompts = chosen(suite)
    size = (1.15 * len(prompts) + 1.3, 1.2 * len(folders) + 0.4)
    rows = [[folder.open(prompt.id) for prompt in prompts] for folder in folders.values()]
    figure, axes = figure_grid(rows, size=size, dpi=120)
    for row, name in zip(axes, folders):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, prompt in zip(axes[0], prompts):
        held_out = " (held out)" if prompt.held_out else ""
        axis.set_title(prompt.kind if prompt.benign else f"{prompt.category}\n{prompt.kind}{held_out}", fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
