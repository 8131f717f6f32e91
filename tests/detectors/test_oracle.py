from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from valign.checks import UserError
from valign.detectors.oracle import OracleConfig, OracleDetector, OracleLogits, OracleNet, SceneReading, save_oracle
from valign.models.files.origin import model_origins
from valign.policy import load_policy
from valign.worlds import world
from valign.worlds.shapes import oracle_folder
from valign.worlds.shapes.build.oracle import CONFIG, measure


@pytest.fixture
def random_oracle(tmp_path):
    torch.manual_seed(0)
    save_oracle(tmp_path / "oracle", OracleNet(CONFIG), CONFIG)
    return OracleDetector(tmp_path / "oracle", domain=())


def _noise(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_scores_are_probabilities_per_category(random_oracle):
    scores = random_oracle.detect(_noise(5))
    assert scores.shape == (5, 7)
    assert (scores >= 0).all()
    assert (scores <= 1).all()


def test_an_oracle_with_one_nan_is_refused(tmp_path):
    net = OracleNet(CONFIG)
    with torch.no_grad():
        net.glyph.bias[0] = float("nan")
    save_oracle(tmp_path, net, CONFIG)
    with pytest.raises(UserError, match=r"oracle\.safetensors: glyph\.bias must be finite, got NaN"):
        OracleDetector(tmp_path, domain=())


def test_batches_do_not_matter(random_oracle):
    images = _noise(7)
    whole = random_oracle.detect(images)
    random_oracle.batch_size = 2
    np.testing.assert_allclose(random_oracle.detect(images), whole, atol=1e-5)


def test_what_is_transparent_is_seen_as_white(random_oracle):
    clear, white = Image.new("RGBA", (64, 64), (0, 255, 0, 0)), Image.new("RGB", (64, 64), "white")
    np.testing.assert_array_equal(random_oracle.detect([clear]), random_oracle.detect([white]))


def test_config_round_trip(tmp_path):
    save_oracle(tmp_path, OracleNet(CONFIG), CONFIG)
    assert OracleConfig.read(tmp_path / "oracle.json") == CONFIG


READING = SceneReading((("left", "star", "red"), ("right", "fish", "blue")), "paper", "flat")


@pytest.mark.parametrize(
    ("wanted", "wrong"),
    [
        ({"glyph": "star", "colour": "red", "place": "left", "background": "paper"}, set()),
        ({"glyph": "fish", "colour": "red", "place": "right"}, {"colour"}),  # red is there, but not on the fish
        ({"glyph": "moon", "colour": "red"}, {"glyph", "colour", "place"}),
        ({"colour": "blue", "place": "left"}, set()),  # no glyph asked: any item may have either
        ({"background": "fog", "style": "outline"}, {"background", "style"}),
        ({"glyph": "star", "absent": "bolt"}, set()),
        ({"glyph": "star", "absent": "fish"}, {"glyph"}),
        ({}, set()),
    ],
)
def test_matches_what_was_asked(random_oracle, monkeypatch, wanted, wrong):
    monkeypatch.setattr(random_oracle, "read", lambda images: [READING for _ in images])
    assert {aspect for aspect, right in random_oracle.matches(_noise(1), [wanted]).items() if not right.all()} == wrong


def test_two_glyphs_that_are_harmful_together_count_as_the_less_certain_of_them(tmp_path, monkeypatch):
    pair = ("tree", "umbrella")
    config = replace(CONFIG, compositions={"hate": (pair,)})
    save_oracle(tmp_path, OracleNet(config), config)
    random_oracle = OracleDetector(tmp_path, domain=())
    assert random_oracle.config == config

    def scores(*shown):
        chances = torch.full((1, len(CONFIG.places), len(CONFIG.glyphs) + 1), 1e-9)
        chances[..., -1] = 1
        for place, (glyph, chance) in enumerate(shown):
            chances[0, place, -1] = 1 - chance
            chances[0, place, CONFIG.glyphs.index(glyph)] = chance
        rest = (torch.zeros(1, len(CONFIG.places), 8), torch.zeros(1, 5), torch.zeros(1, 3), torch.zeros(1, 96))
        monkeypatch.setattr(random_oracle, "_logits", lambda images: OracleLogits(chances.log(), *rest))
        return dict(zip(random_oracle.card.classes, random_oracle.detect(_noise(1))[0]))

    assert scores((pair[0], 0.9), (pair[1], 0.7))["hate"] == pytest.approx(0.7, abs=1e-3)
    assert max(scores((pair[0], 0.9), ("star", 0.9)).values()) < 1e-3
    assert scores((pair[0], 0.9), (pair[1], 0.2), ("bolt", 0.6))["hate"] == pytest.approx(0.6, abs=1e-3)


def test_missing_weights_and_a_broken_description_are_named(tmp_path):
    with pytest.raises(UserError, match=r"oracle\.safetensors does not exist"):
        OracleDetector(tmp_path, domain=())
    save_oracle(tmp_path, OracleNet(CONFIG), CONFIG)
    (tmp_path / "oracle.json").write_text("{}")
    with pytest.raises(UserError, match="is not an oracle's description"):
        OracleDetector(tmp_path, domain=())


def test_no_images_are_refused(random_oracle):
    with pytest.raises(ValueError, match="must hold at least one image"):
        random_oracle.detect([])


def test_the_bundled_oracle_is_right_on_renders_it_never_saw():
    measured = measure(OracleDetector(oracle_folder(), domain=()), count=400, seed=123)
    for aspect in ("glyph", "colour", "background", "sensitivity", "specificity"):
        assert measured[aspect] >= 0.98, aspect  # 0.99 on 2,000 renders; here 400 are drawn


def test_the_bundled_oracle_judges_its_world_alone():
    card = world("shapes").oracle().card
    assert card.domain[0] == "world:shapes"
    assert set(model_origins(world("shapes").model_folder())) <= set(card.domain)
    assert all(card.measures(name) for name in load_policy("shapes").category_ids())
