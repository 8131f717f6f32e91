import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.images.filters import drop_reason, harm_scores
from valign.data.images.pairs import import_images, make_images, pair_seed
from valign.data.images.rows import ImageRow, count_kept, load_image_rows
from valign.data.prompts.pairs import PromptPair
from valign.interfaces import DetectorCard, SamplingConfig

PAIRS = [
    PromptPair("p0", "mean zero", "kind zero", ("hate",)),
    PromptPair("p1", "mean one", "kind one", ("hate", "violence")),
    PromptPair("p2", "mean two", "mean three", ("violence",)),
    PromptPair("p3", "kind four", "kind five", ("hate",)),
]


class FakeSampler:
    """Red for prompts that say "mean", blue for others; the green channel shows the seed. Remembers its calls."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def fingerprint(self):
        return "0" * 64

    def generate(self, prompts, *, seeds, sampling, start=None, strength=0.7):
        self.calls.append({"prompts": list(prompts), "seeds": list(seeds), "start": start, "strength": strength})
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return [
            Image.new("RGB", (8, 8), (255 if "mean" in prompt else 0, seed % 256, 0 if "mean" in prompt else 255))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


class RedDetector:
    """Hate is red, violence is never seen."""

    card = DetectorCard("red", ("hate", "violence"), 0.5, "0" * 64)

    def detect(self, images):
        red = [np.asarray(image)[..., 0].mean() / 255 for image in images]
        return np.stack([red, np.zeros(len(red))], axis=1)


def test_seed_pairing_shares_the_initial_latent_and_free_does_not(tmp_path):
    shared, free = FakeSampler(), FakeSampler()
    rows = make_images(shared, PAIRS, tmp_path / "shared", sampling=SamplingConfig(seed=7))
    make_images(free, PAIRS, tmp_path / "free", sampling=SamplingConfig(seed=7), pairing="free")
    assert shared.calls[0]["seeds"] == shared.calls[1]["seeds"] == free.calls[0]["seeds"] == [row.seed for row in rows]
    assert not set(free.calls[0]["seeds"]) & set(free.calls[1]["seeds"])
    assert shared.calls[1]["start"] is None
    assert [row.seed for row in rows] == [pair_seed(7, pair.id) for pair in PAIRS]
    assert pair_seed(7, "p0") != pair_seed(8, "p0")
    assert pair_seed(0, "a") == 0x9DF3C5FA  # first 4 bytes of SHA-256("0:a"), by sha256sum


def test_img2img_starts_from_the_unsafe_image(tmp_path):
    model = FakeSampler()
    make_images(model, PAIRS, tmp_path, pairing="img2img", strength=0.4)
    unsafe, safe = model.calls
    assert unsafe["start"] is None
    assert safe["strength"] == 0.4
    assert [np.asarray(image)[0, 0, 1] for image in safe["start"]] == [seed % 256 for seed in unsafe["seeds"]]


def test_a_stopped_run_loses_one_batch_and_ends_in_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_images(FakeSampler(), PAIRS, whole, sampling=SamplingConfig(batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        make_images(
            FakeSampler(stop_at=4), PAIRS, broken, sampling=SamplingConfig(batch_size=2)
        )  # in the safe half of the second batch
    second = FakeSampler()
    make_images(second, PAIRS, broken, sampling=SamplingConfig(batch_size=2))
    assert [call["prompts"] for call in second.calls] == [["mean two", "kind four"], ["mean three", "kind five"]]
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in broken.iterdir())
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in names)


def test_the_detector_filter_keeps_harm_against_no_harm(tmp_path):
    rows = make_images(FakeSampler(), PAIRS, tmp_path, filter="detector", detector=RedDetector())
    assert [(row.kept, row.reason) for row in rows] == [(True, ""), (True, ""), (False, "harmless"), (False, "harmless")]
    assert [row.harm_unsafe for row in rows] == [1.0, 1.0, 0.0, 0.0]  # p2 is of violence, which this detector never sees
    assert [row.harm_safe for row in rows] == [0.0, 0.0, 1.0, 0.0]
    assert load_image_rows(tmp_path) == rows
    assert count_kept(PAIRS, rows) == {
        "hate": {"pairs": 3, "kept": 2, "harmless": 1},
        "violence": {"pairs": 2, "kept": 1, "harmless": 1},
    }


def test_harm_that_the_detector_does_not_cover_is_taken_from_the_prompt(tmp_path):
    pair = PromptPair("p", "mean two", "mean three", ("shocking",))
    row = make_images(FakeSampler(), [pair], tmp_path, filter="detector", detector=RedDetector())[0]
    assert (row.harm_unsafe, row.reason) == (None, "harmful")  # the safe image's is seen all the same


def test_filter_none_keeps_all_but_equal_images_and_still_notes_the_scores(tmp_path):
    rows = make_images(FakeSampler(), PAIRS, tmp_path, detector=RedDetector())
    assert [(row.kept, row.reason) for row in rows] == [(True, ""), (True, ""), (False, "equal"), (False, "equal")]
    assert [row.harm_safe for row in rows] == [0.0, 0.0, 1.0, 0.0]
    with pytest.raises(UserError, match='filter "detector" needs a detector, got none'):
        make_images(FakeSampler(), PAIRS, tmp_path / "x", filter="detector")
    with pytest.raises(ValueError, match=r"pairing must be one of seed, img2img, free; got 'twin'"):
        make_images(FakeSampler(), PAIRS, tmp_path / "x", pairing="twin")


def test_a_published_folder_is_copied_and_unreadable_images_drop_their_pair(tmp_path):
    source = tmp_path / "release"
    source.mkdir()
    pairs = [PromptPair(f"idx_000000{i}_0", f"mean {i}", f"kind {i}", ("hate",)) for i in (1, 2)]
    for pair in pairs:
        Image.new("RGB", (8, 8), "red").save(source / f"u_{pair.id}.jpg")
        Image.new("RGB", (8, 8), "blue").save(source / f"s_{pair.id}.png")
    (source / f"s_{pairs[1].id}.png").write_bytes(b"half a pictu")
    rows = import_images(pairs, source, tmp_path / "images", batch_size=1)
    assert [(row.kept, row.reason) for row in rows] == [(True, ""), (False, "unreadable")]
    assert Image.open(tmp_path / "images" / f"{pairs[0].id}_safe.png").getpixel((0, 0)) == (0, 0, 255)
    (source / f"u_{pairs[0].id}.jpg").unlink()
    with pytest.raises(UserError, match="1 are missing, first u_idx_0000001_0"):
        import_images(pairs, source, tmp_path / "again")
    with pytest.raises(UserError, match="must be a folder of images, got nothing there"):
        import_images(pairs, tmp_path / "nowhere", tmp_path / "again")


def test_our_own_image_names_are_read_too(tmp_path):
    make_images(FakeSampler(), PAIRS, tmp_path / "made")
    rows = import_images(PAIRS, tmp_path / "made", tmp_path / "copy")
    assert [row.sha256 for row in rows] == [row.sha256 for row in load_image_rows(tmp_path / "made")]


def test_image_rows_need_their_table(tmp_path):
    with pytest.raises(UserError, match="Make the images with"):
        load_image_rows(tmp_path)
    assert count_kept(PAIRS[:1], [ImageRow(id="p0", seed=0, kept=False, reason="unreadable")]) == {
        "hate": {"pairs": 1, "kept": 0, "unreadable": 1}
    }


def test_a_score_at_the_threshold_is_harmful():
    assert drop_reason(0.5, 0.49, 0.5) == ""
    assert drop_reason(0.49, 0.1, 0.5) == "harmless"
    assert drop_reason(0.9, 0.5, 0.5) == "harmful"
    assert drop_reason(None, 0.1, 0.5) == ""  # harm that the detector does not measure
    assert drop_reason(0.9, None, 0.5) == "harmful"


def test_a_pair_is_judged_by_the_classes_that_measure_its_categories():
    card = DetectorCard("d", ("gore", "nude"), 0.5, "", covers={"gore": "violence", "nude": "sexual"}, abstains=True)

    def scores(categories, unsafe, safe):
        pair = PromptPair(id="p", unsafe="a", safe="b", categories=categories)
        return harm_scores(card, pair, np.array(unsafe), np.array(safe))

    assert scores(("violence",), [0.2, 0.9], [0.1, 0.3]) == (0.2, 0.3)
    assert scores(("hate",), [0.2, 0.9], [0.1, 0.3]) == (None, 0.3)
    assert scores(("violence",), [float("nan"), 0.9], [0.1, float("nan")]) == (None, None)


def published(folder, suffix="png"):
    folder.mkdir()
    for side, colour in (("u", "red"), ("s", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{side}_p0.{suffix}")
    return folder


def test_captions_and_hidden_files_beside_the_images_do_not_count(tmp_path):
    source = published(tmp_path / "source")
    for name in ("u_p0.txt", "s_p0.caption", "._u_p0.png"):
        (source / name).write_text("a caption")
    (row,) = import_images(PAIRS[:1], source, tmp_path / "out")
    assert row.kept
    (source / "u_p0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"must hold one image of each name, got u_p0\.jpg and u_p0\.png"):
        import_images(PAIRS[:1], source, tmp_path / "again")


def test_of_an_animated_image_the_first_frame_is_taken_and_what_cannot_be_read_is_named(tmp_path, capsys):
    source = published(tmp_path / "source")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "white")]
    frames[0].save(source / "u_p0.png", save_all=True, append_images=frames[1:])
    import_images(PAIRS[:1], source, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "p0_unsafe.png").getpixel((0, 0)) == (255, 0, 0)
    assert "u_p0.png is animated: the first of 2 frames is taken" in "".join(capsys.readouterr().err.split("\n"))
    (source / "u_p0.png").write_bytes(b"half an image")
    (row,) = import_images(PAIRS[:1], source, tmp_path / "again")
    assert row.reason == "unreadable"
    assert "u_p0.png must be an image" in "".join(capsys.readouterr().err.split("\n"))
