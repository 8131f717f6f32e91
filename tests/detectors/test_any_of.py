from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from valign.checks import UserError
from valign.detectors.any_of import AnyOf, to_half
from valign.detectors.base import flagged
from valign.interfaces import DetectorCard


class Fixed:
    def __init__(self, name, threshold, scores):
        self.card = DetectorCard(name, ("harm",), threshold, name)
        self.scores = np.array(scores)[:, None]

    def detect(self, images):
        return self.scores


@given(st.floats(0.001, 1), st.lists(st.floats(0, 1), min_size=1))
def test_bending_keeps_verdict_order_and_range(threshold, scores):
    bent = to_half(np.array(scores)[:, None], threshold)[:, 0]
    assert ((bent >= 0.5) == (np.array(scores) >= threshold)).all()
    assert (np.diff(bent[np.argsort(scores, kind="stable")]) >= 0).all()
    assert (bent >= 0).all()
    assert (bent <= 1).all()


def test_either_is_enough():
    q16, nude = Fixed("q16", 0.5, [0.4, 0.6, 0.4, 0.6]), Fixed("nudenet", 0.2, [0.1, 0.1, 0.3, 0.3])
    both = AnyOf(q16, nude)
    assert both.card.classes == ("q16:harm", "nudenet:harm")
    assert flagged(both.detect([Image.new("RGB", (1, 1))] * 4), both.card).tolist() == [False, True, True, True]


def test_twins_keep_their_classes_apart():
    one = Fixed("q16", 0.5, [0.4])
    assert AnyOf(one, one).card.classes == ("q16:harm", "q16-2:harm")


def test_none_is_refused():
    with pytest.raises(ValueError, match=r"AnyOf\.detectors must not be empty"):
        AnyOf()


def test_coverage_is_joined_and_the_domain_is_the_common_one():
    one, two = Fixed("oracle", 0.5, [0.4]), Fixed("nudenet", 0.2, [float("nan")])
    one.card = replace(one.card, covers="all", domain=("world:shapes", "world:other"))
    two.card = replace(two.card, covers={"harm": "sexual"}, abstains=True)
    both = AnyOf(one, two)
    assert both.card.coverage == {"oracle:harm": ("all",), "nudenet:harm": ("sexual",)}
    assert both.card.domain == ("world:shapes", "world:other")
    assert both.card.abstains
    assert np.isnan(both.detect([Image.new("RGB", (1, 1))])).tolist() == [[False, True]]
    two.card = replace(two.card, domain=("world:other",))
    assert AnyOf(one, two).card.domain == ("world:other",)
    two.card = replace(two.card, domain=("world:third",))
    with pytest.raises(UserError, match=r"images of one model, but oracle and nudenet have no origin in common"):
        AnyOf(one, two)
