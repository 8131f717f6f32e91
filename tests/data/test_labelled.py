import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.images.labelled import HarmExample, gather, near_groups, read_labelled, split_labelled

KNOWN = ("hate", "violence")


def noise(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def fill(folder, name, seeds):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        noise(seed).save(folder / name / f"{seed:03d}.png")
    return folder


def test_sub_folders_are_labels(tmp_path):
    fill(fill(fill(tmp_path, "Violent", range(3)), "harmless", range(10, 14)), "bolts", (20,))
    found = read_labelled(tmp_path, known=KNOWN, named={"bolts": "hate"})
    assert [(one.name, one.categories) for one in found.examples][:4] == [
        ("Violent/000.png", ("violence",)),
        ("Violent/001.png", ("violence",)),
        ("Violent/002.png", ("violence",)),
        ("bolts/020.png", ("hate",)),
    ]
    assert found.categories() == KNOWN
    (tmp_path / "Violent" / "000.png").rename(tmp_path / "Violent" / "renamed.png")
    assert read_labelled(tmp_path, known=KNOWN, named={"bolts": "hate"}).fingerprint() == found.fingerprint()


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ({}, "must hold images in sub-folders"),
        ({"violence": 2}, "must hold harmful and harmless images, got 2 and 0. Add harmless images"),
        ({"harmless": 2}, "must hold harmful and harmless images, got 0 and 2. Add images of a category"),
        ({"harmless": 2, "cats": 2}, r"must be named after a category of the policy \(hate, violence\) or harmless, got 'cats'"),
    ],
)
def test_bad_folders_are_refused(tmp_path, folders, said):
    for place, (name, count) in enumerate(folders.items()):
        fill(tmp_path, name, range(100 * place, 100 * place + count))
    with pytest.raises(UserError, match=said):
        read_labelled(tmp_path, known=KNOWN)


def test_a_map_of_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="must have the sub-folder 'bolts' that a map names"):
        read_labelled(fill(fill(tmp_path, "hate", (1,)), "harmless", (2,)), known=KNOWN, named={"bolts": "hate"})


def test_files_that_are_not_images_are_named_together(tmp_path):
    fill(fill(tmp_path, "hate", (1,)), "harmless", (2,))
    for name in ("a.png", "b.png"):
        (tmp_path / "hate" / name).write_text("not an image")
    with pytest.raises(UserError, match=r"holds 2 files that cannot be read as images\. The first: .*a\.png"):
        read_labelled(tmp_path, known=KNOWN)


def test_the_same_image_counts_once_and_never_with_both_labels():
    rows = [HarmExample("hate/a", ("hate",), noise(1)), HarmExample("hate/b", ("hate",), noise(1))]
    rows += [HarmExample("violence/c", ("violence",), noise(1)), HarmExample("harmless/d", (), noise(2))]
    found = gather(rows, "these")
    assert [(one.name, one.categories) for one in found.examples] == [("hate/a", ("hate", "violence")), ("harmless/d", ())]
    assert found.repeated == 2
    with pytest.raises(UserError, match="hate/a and harmless/d are the same image, once labelled harmless and once harmful"):
        gather([rows[0], HarmExample("harmless/d", (), noise(1))], "these")


def test_images_that_are_nearly_the_same_are_one_group(tmp_path):
    original = noise(0, 5).resize((128, 128), Image.Resampling.BICUBIC)
    original.save(tmp_path / "again.jpg", quality=85)
    with Image.open(tmp_path / "again.jpg") as opened:
        again = opened.convert("RGB")
    rows = [HarmExample("hate/a", ("hate",), original), HarmExample("harmless/n", (), noise(3))]
    rows += [HarmExample("hate/b", ("hate",), again), HarmExample("hate/c", ("hate",), original.resize((60, 60)))]
    assert gather(rows, "these").groups == (0, 1, 0, 0)


def test_groups_are_linked_over_several_steps():
    line = np.array([[0.0], [2.0], [4.0], [10.0]])  # RMS of one value is the distance
    assert near_groups(line, limit=2.5, part=2) == [0, 0, 0, 3]


def examples(count=20):
    rows = [HarmExample(f"hate/{i:02d}", ("hate",), noise(i)) for i in range(count)]
    return rows + [HarmExample(f"harmless/{i:02d}", (), noise(1000 + i)) for i in range(2 * count)]


def test_the_split_keeps_shares_and_groups():
    rows = examples()
    near = [HarmExample(f"hate/{i:02d}x", ("hate",), Image.eval(noise(i), lambda v: min(v + 1, 255))) for i in range(20)]
    labelled = gather([*rows, *near], "these")
    parts = split_labelled(labelled, seed=0)
    assert [len(part) for part in parts] == [40, 20, 20]
    assert [sum(bool(one.categories) for one in part) for part in parts] == [20, 10, 10]
    sides = {one.name.rstrip("x"): place for place, part in enumerate(parts) for one in part}
    assert all(sides[one.name.rstrip("x")] == place for place, part in enumerate(parts) for one in part)
    assert parts == split_labelled(labelled, seed=0)
    assert parts != split_labelled(labelled, seed=1)


def test_too_few_different_images_are_refused():
    rows = [one for one in examples(4) if one.categories] + [HarmExample(f"harmless/{i}", (), noise(50 + i)) for i in range(9)]
    with pytest.raises(UserError, match="must hold at least 6 different ones of hate, got 4"):
        split_labelled(gather(rows, "these"))
