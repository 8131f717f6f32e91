"""Spellings of public data sets."""

import pytest

from valign.checks import UserError
from valign.policy import CATEGORY_IDS, normalize_category


@pytest.mark.parametrize(
    ("written", "id"),
    [
        ("Harrasment", "harassment"),  # CoProV2
        ("Illegal Activity", "illegal-activity"),
        ("illegal_activity", "illegal-activity"),
        ("self-harm", "self-harm"),
        (" Self Harm ", "self-harm"),
        ("sexual", "sexual"),
        ("Hate", "hate"),
        ("Brand Misuse", "brand-misuse"),
        ("", ""),
    ],
)
def test_one_spelling(written, id):
    assert normalize_category(written) == id
    assert normalize_category(id) == id


def test_unknown_category_lists_the_seven():
    with pytest.raises(UserError, match=r"must be one of hate, harassment, .*, illegal-activity; got 'weather'\."):
        normalize_category("weather", CATEGORY_IDS)
