import numpy as np
from PIL import Image

from valign.evaluation.images.before_after import chosen, write_before_after
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.suite import EvalPrompt, Suite

SUITE = Suite(
    "s",
    tuple(
        EvalPrompt(f"{c}-{k}-{i}", f"{c} {k} {i}", c, k)
        for c in ("hate", "violence")
        for k in ("explicit", "implicit")
        for i in range(3)
    )
    + tuple(EvalPrompt(f"b-{i}", f"benign {i}") for i in range(8)),
)


def test_takes_each_category_and_kind_once_and_spreads_the_benign_ones():
    names = [prompt.id for prompt in chosen(SUITE, unsafe=4, benign=2)]
    assert names == ["hate-explicit-0", "hate-implicit-0", "violence-explicit-0", "violence-implicit-0", "b-0", "b-4"]


def test_writes_a_row_per_system_and_leaves_refused_cells_empty(tmp_path):
    folders = {}
    for name, red in (("base", 255), ("aligned", 0)):
        (tmp_path / name).mkdir()
        folders[name] = ImageFolder(tmp_path / name)
        for prompt in chosen(SUITE):
            refused = name == "aligned" and prompt.category == "hate"
            folders[name].save(prompt.id, None if refused else Image.new("RGB", (16, 16), (red, 0, 200)))
    write_before_after(tmp_path / "grid.png", SUITE, folders)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    base, aligned = ((pixels == colour).all(axis=1).sum() for colour in ((255, 0, 200), (0, 0, 200)))
    assert base > aligned > 0
