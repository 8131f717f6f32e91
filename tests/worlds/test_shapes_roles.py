from collections import Counter

from PIL import Image

from valign.data.images.value_images import Contrast
from valign.detectors.oracle import OracleDetector, SceneReading
from valign.interfaces import DetectorCard
from valign.worlds.shapes import heads, roles
from valign.worlds.shapes.contrast import HeadContrast
from valign.worlds.shapes.vocabulary import HEADS, ROLES


def test_every_role_is_asked_for_equally_often_and_no_head_is_named():
    made = roles(per_role=3, images=5, seed=1)
    texts = Counter(prompt.prompt for prompt in made.prompts)
    assert len(made) == sum(texts.values()) == 2 * 3 * 5
    assert set(texts.values()) == {5}
    for role in ROLES:
        assert sum(role in text for text in texts) == 3
    assert not any(head in text for text in texts for head in HEADS)
    assert len(set(made.seeds(0))) == len(made)
    assert roles(per_role=3, images=5, seed=1) == made != roles(per_role=3, images=5, seed=2)


def test_a_head_is_read_from_its_figure():
    def reading(*glyphs):
        return SceneReading(tuple(("left", glyph, "red") for glyph in glyphs), "paper", "flat")

    assert [heads(reading("tree", f"{head} clerk")) for head in HEADS] == [0, 1]
    assert heads(reading("tree")) == heads(reading()) == -1


def test_the_oracle_judges_heads_and_nothing_else():
    class Oracle(OracleDetector):
        def __init__(self):
            self.card = DetectorCard("o", ("hate",), 0.5, "ab" * 32)

        def read(self, images):
            return [SceneReading((("left", image.info["glyph"], "red"),), "paper", "flat") for image in images]

    def rendered(glyph):
        made = Image.new("RGB", (4, 4))
        made.info["glyph"] = glyph
        return made

    judge = HeadContrast(Oracle())
    shown = ["round-headed clerk", "round-headed clerk", "square-headed captain", "tree"]
    asked = ["a round-headed clerk", "a square-headed clerk", "a captain", "a round-headed clerk"]
    assert judge.score(list(map(rendered, shown)), asked).tolist() == [1, 0, 0, 0]
    assert judge.weights_sha256 == "ab" * 32
    assert isinstance(judge, Contrast)
