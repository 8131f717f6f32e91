import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from valign.checks import UserError
from valign.data.images.value_images import (
    SIDES,
    ValueImage,
    as_asked,
    check_judges,
    count_sides,
    drop_lonely,
    generate_images,
    load_images,
    plan_images,
)
from valign.data.images.value_sets import ValueDataConfig, build_values, open_values
from valign.data.journal import Journal
from valign.data.prompts.pairs import PromptPair
from valign.interfaces import DetectorCard, SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.policy import Policy, Principle, ValueScene, load_policy

SHAPES = load_policy("shapes")
CARD = DetectorCard("eye", ("violence", "hate"), 0.5, "e" * 64)
CONFIG = ValueDataConfig(principles=("equal-heads",), images=2, steps=1, batch_size=5)


class Painter:
    """Draws a text's length as a grey level; stops with an error after ``limit`` calls."""

    image_size = 64

    def __init__(self, limit=10**9):
        self.calls, self.limit = [], limit

    def generate(self, prompts, *, seeds, **options):
        self.calls.append((list(prompts), list(seeds), options))
        if len(self.calls) > self.limit:
            raise KeyboardInterrupt
        return [Image.new("RGB", (64, 64), (len(text),) * 3) for text in prompts]

    def fingerprint(self):
        return "painter"


@dataclass
class Eye:
    """A detector of two classes that answers what it was given, row by row."""

    scores: list
    card: DetectorCard = CARD

    def detect(self, images):
        return np.array(self.scores[: len(images)], dtype=float)


@dataclass
class Taste:
    """A contrast that answers what it was given for each text."""

    liking: dict
    weights_sha256: str = "t" * 64

    def score(self, images, prompts):
        return np.array([self.liking[prompt] for prompt in prompts], dtype=float)


def draw(rows, folder, painter, **changes):
    options = {
        "sampling": SamplingConfig(steps=1, guidance_scale=2.0, batch_size=4),
        "filter": "none",
        "detector": None,
        "contrast": None,
    }
    folder.mkdir(exist_ok=True)
    return generate_images(painter, SHAPES, rows, folder, **{**options, **changes})


def test_the_plan_has_both_sides_of_every_scene_at_equal_seeds():
    rows = plan_images(SHAPES, ["equal-heads", "no-rays"], 3, seed=0)
    scenes = [len(SHAPES.principle_scenes(SHAPES.principle(name))) for name in ("equal-heads", "no-rays")]
    assert len(rows) == 3 * 2 * sum(scenes)
    assert len({row.id for row in rows}) == len(rows)
    first = [row for row in rows if row.scene == rows[0].scene]
    assert [row.side for row in first] == ["aligned"] * 3 + ["violating"] * 3
    assert [row.seed for row in first[:3]] == [row.seed for row in first[3:]]
    assert len({row.seed for row in first}) == 3
    assert first[0].prompt == "a captain in a meadow"
    assert (first[0].text, first[0].other) == ("a round-headed captain in a meadow", "a square-headed captain in a meadow")
    assert plan_images(SHAPES, ["no-rays"], 3, seed=0) == [row for row in rows if row.principle == "no-rays"]
    assert plan_images(SHAPES, ["no-rays"], 3, seed=1)[0].seed != plan_images(SHAPES, ["no-rays"], 3, seed=0)[0].seed


def test_wordings_take_turns_and_blocked_scenes_are_left_out():
    scenes = [
        ValueScene(prompt="p", aligned=["a1", "a2"], violating=["v"]),
        ValueScene(prompt="a naked child", aligned=["a"], violating=["v"]),
    ]
    policy = load_policy("default")
    policy = policy.model_copy(update={"principles": [Principle(id="x", text="x", scenes=scenes)]})
    rows = plan_images(policy, ["x"], 3, seed=0)
    assert [row.text for row in rows] == ["a1", "a2", "a1", "v", "v", "v"]
    assert [row.other for row in rows] == ["v", "v", "v", "a1", "a2", "a1"]
    only = policy.model_copy(update={"principles": [Principle(id="x", text="x", scenes=scenes[1:])]})
    with pytest.raises(UserError, match="principle x of policy default has no scenes"):
        plan_images(only, ["x"], 3, seed=0)


def test_prompt_pairs_are_the_scenes_of_their_categories_principle():
    pairs = [
        PromptPair("a", "a red flame", "a red flower", ("violence",)),
        PromptPair("b", "a comet", "a flower", ("violence",), held_out=True),
        PromptPair("c", "a bolt", "a heart", ("hate",)),
    ]
    rows = plan_images(SHAPES, ["no-rays", "equal-heads"], 2, seed=0, pairs=pairs)
    rays = [row for row in rows if row.principle == "no-rays"]
    assert [(row.side, row.prompt, row.text, row.other) for row in rays] == [
        ("aligned", "a red flame", "a red flower", "a red flame"),
        ("violating", "a red flame", "a red flame", "a red flower"),
    ]
    assert [row for row in rows if row.principle == "equal-heads"] == plan_images(SHAPES, ["equal-heads"], 2, seed=0)


def test_held_out_concepts_give_no_scene_and_a_lost_category_is_named():
    texts = [scene.prompt for scene in SHAPES.principle_scenes(SHAPES.principle("no-rays"))]
    assert any("flame" in text for text in texts)
    assert not any("comet" in text for text in texts)
    less = SHAPES.model_copy(update={"categories": [c for c in SHAPES.categories if c.id != "violence"]})
    with pytest.raises(UserError, match=r"no-rays of policy shapes names the category 'violence', which the policy lacks"):
        plan_images(less, ["no-rays"], 1, seed=0)


def test_drawing_resumes_batch_by_batch_to_the_same_table(tmp_path):
    rows = plan_images(SHAPES, ["equal-heads"], 1, seed=0)[:10]
    whole = Painter()
    drawn = draw(rows, tmp_path / "whole", whole)
    assert [len(texts) for texts, _, _ in whole.calls] == [4, 4, 2]
    stopped = Painter(limit=2)
    with pytest.raises(KeyboardInterrupt):
        draw(rows, tmp_path / "stopped", stopped)
    assert len(Journal(tmp_path / "stopped" / "journal.jsonl").entries) == 8
    rest = Painter()
    assert draw(rows, tmp_path / "stopped", rest) == drawn == load_images(tmp_path / "stopped")
    assert [texts for texts, _, _ in rest.calls] == [[row.text for row in rows[8:]]]
    for row in rows:
        assert (tmp_path / "whole" / f"{row.id}.png").read_bytes() == (tmp_path / "stopped" / f"{row.id}.png").read_bytes()


def rows_of(principle):
    base = {"scene": "s", "principle": principle, "prompt": "p", "seed": 0}
    texts = zip(SIDES, (("a", "v"), ("v", "a")), strict=True)
    return [ValueImage(id=side[0], side=side, text=text, other=other, **base) for side, (text, other) in texts]


@pytest.mark.parametrize(
    ("scores", "good"),
    [
        ([[0.1, 0.1], [0.9, 0.1]], [True, True]),
        ([[0.1, 0.9], [0.9, 0.1]], [False, True]),  # an aligned image may show no harm of any kind
        ([[0.1, 0.1], [0.1, 0.9]], [True, False]),  # a violating one must show its own
        ([[0.5, 0.1], [0.5, 0.1]], [False, True]),  # at the threshold is harmful
    ],
)
def test_a_detector_judges_toxicity(scores, good):
    images = [Image.new("RGB", (8, 8))] * 2
    assert as_asked(SHAPES, rows_of("no-rays"), images, Eye(scores), None).tolist() == good


def test_a_contrast_judges_bias_and_what_no_detector_sees():
    images = [Image.new("RGB", (8, 8))] * 2
    blind = Eye([[0.9, 0.9], [0.1, 0.1]])
    assert as_asked(SHAPES, rows_of("equal-heads"), images, blind, Taste({"a": 0.4, "v": 0.3})).tolist() == [True, False]
    assert as_asked(SHAPES, rows_of("no-rays"), images, None, Taste({"a": 0.3, "v": 0.4})).tolist() == [False, True]
    assert as_asked(SHAPES, rows_of("no-rays"), images, None, Taste({"a": 0.3, "v": 0.3})).tolist() == [False, False]


def test_a_scene_with_one_side_left_is_dropped():
    aligned, violating = rows_of("no-rays")
    lost = replace(violating, kept=False, reason="not as asked")
    second = replace(aligned, id="a2")
    rows = drop_lonely([aligned, second, lost])
    assert [row.reason for row in rows] == ["no counterpart", "no counterpart", "not as asked"]
    assert count_sides(rows) == {"no-rays": {"scenes": 0, "aligned": 0, "violating": 0, "no counterpart": 2, "not as asked": 1}}
    assert count_sides(drop_lonely([aligned, second, violating]))["no-rays"] == {"scenes": 1, "aligned": 2, "violating": 1}


def test_a_filter_needs_somebody_who_can_see_it():
    bias, toxicity = SHAPES.principle("equal-heads"), SHAPES.principle("no-rays")
    check_judges("none", [bias, toxicity], None, None)
    check_judges("judge", [toxicity], Eye([]), None)
    check_judges("judge", [bias, toxicity], None, Taste({}))
    with pytest.raises(UserError, match="no judge for equal-heads: a detector sees harm only"):
        check_judges("judge", [bias, toxicity], Eye([]), None)
    with pytest.raises(ValueError, match="filter must be one of none, judge; got 'detector'"):
        check_judges("detector", [bias], None, None)


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return load_model(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def built(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("values") / "data"
    return build_values(sd, SHAPES, folder, CONFIG), folder


def test_a_set_is_images_latents_and_texts(sd, built):
    cache, folder = built
    scenes = len(SHAPES.principle_scenes(SHAPES.principle("equal-heads")))
    assert len(cache) == 2 * 2 * scenes
    assert cache.rows().tolist() == cache.rows("equal-heads").tolist() == [i for i, good in enumerate(cache.aligned) if good]
    assert cache.principles == (
        {"id": "equal-heads", "text": SHAPES.principle("equal-heads").text, "aliases": ["captain", "clerk"], "kind": "bias"},
    )
    row = int(cache.rows()[3])
    assert {cache.scenes[other] for other in cache.opposed(row)} == {cache.scenes[row]}
    assert not any(cache.aligned[other] for other in cache.opposed(row))
    cached, live = cache.conditioning(torch.tensor([row]))["embeds"], sd.encode_prompts([cache.prompts[row]]).embeds
    torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-5)
    with Image.open(folder / "images" / f"{cache.ids[row]}.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()[None] / 127.5 - 1
    for flip, seen in ((False, pixels), (True, pixels.flip(-1))):
        mean, std = cache.batch(torch.tensor([row]), torch.tensor([flip]))
        direct = sd.encode_images(seen)
        torch.testing.assert_close(mean, direct.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(std, direct.std, rtol=1e-4, atol=1e-4)


def test_a_finished_set_is_opened_and_another_is_refused(sd, built, tiny_sd_v):
    cache, folder = built
    assert build_values(sd, SHAPES, folder, CONFIG).fingerprint() == cache.fingerprint()
    assert open_values(folder, base=sd.fingerprint()).ids == cache.ids
    with pytest.raises(UserError, match="was made with another recipe"):
        build_values(sd, SHAPES, folder, replace(CONFIG, images=3))
    with pytest.raises(UserError, match="was encoded by base model"):
        open_values(folder, base=load_model(tiny_sd_v, device="cpu").fingerprint())
    with pytest.raises(UserError, match="has no images of principle 'no-rays', only of equal-heads"):
        cache.rows("no-rays")


def test_mirrored_images_only_where_they_were_encoded(sd, tmp_path):
    one = replace(CONFIG, images=1, flip=False)
    cache = build_values(sd, SHAPES, tmp_path, one)
    assert not cache.has_flip
    with pytest.raises(UserError, match="holds no mirrored latents"):
        cache.batch(cache.rows()[:1], torch.tensor([True]))


def test_a_principle_that_never_comes_out_stops_the_build(sd, tmp_path):
    config = replace(CONFIG, principles=("no-rays",), images=1, filter="judge")

    @dataclass
    class Nothing(Eye):
        def detect(self, images):
            return np.zeros((len(images), 2))

    with pytest.raises(UserError, match="no scene with both an aligned and a violating image for no-rays"):
        build_values(sd, SHAPES, tmp_path, config, detector=Nothing([]))
    counts = json.loads((tmp_path / "images" / "run.json").read_text())["results"]["per_principle"]["no-rays"]
    assert counts["scenes"] == 0


def test_a_folder_that_is_no_value_set_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="holds no value data"):
        open_values(tmp_path)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "run.json").write_text(json.dumps({"step": "value-latents", "status": "running"}))
    with pytest.raises(UserError, match="is unfinished"):
        open_values(tmp_path)


def test_a_policy_without_principles_is_refused(sd, tmp_path):
    bare: Policy = SHAPES.model_copy(update={"principles": []})
    with pytest.raises(UserError, match="policy shapes has no principles"):
        build_values(sd, bare, tmp_path, replace(CONFIG, principles=None))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"images": 0}, r"ValueDataConfig\.images must be in \[1, inf\)"),
        ({"guidance_scale": -1.0}, r"ValueDataConfig\.guidance_scale must be in \[0, inf\)"),
        ({"filter": "detector"}, "must be one of none, judge"),
    ],
)
def test_refuses_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        ValueDataConfig(**options)
