"""A detector's scores in OpenAI's categories."""

import pytest

from valign.serving.categories import image_findings


@pytest.mark.parametrize(("score", "found"), [(0.5, {"violence"}), (0.4999, set())])
def test_a_score_at_the_threshold_counts(score, found):
    assert image_findings({"violence": score, "brand": 0.9}, 0.5, "watcher").found == found


def test_classes_of_several_detectors_are_told_apart_by_their_names():
    scores = {"nudenet:FEET_EXPOSED": 0.7, "oracle:violence": 0.2, "oracle:shocking": 0.9}
    found = image_findings(scores, 0.5, "several")
    assert found.scores == {"sexual": 0.7, "violence": 0.2, "violence/graphic": 0.9}
    assert found.found == {"sexual", "violence/graphic"}
