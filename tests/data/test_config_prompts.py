import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from valign.data.chats.config_prompts import MODES, TEMPLATES, config_text, sample_config
from valign.objectives.preference.cosa import OTHER

KNOWN = ("a", "b", "c", "d", "e", "f", "g")
subsets = st.frozensets(st.sampled_from(KNOWN))


@given(subsets, st.sampled_from(MODES), st.integers(0, 1000))
def test_a_config_stands_to_the_risks_as_its_mode_says(risks, mode, seed):
    found = sample_config(risks, mode, KNOWN, np.random.default_rng(seed))
    assert len(set(found)) == len(found)
    assert set(found) <= set(KNOWN)
    assert sample_config(risks, mode, KNOWN, np.random.default_rng(seed)) == found
    if mode == "exact-match":
        assert set(found) == risks
    if mode == "superset":
        assert risks <= set(found)
    if mode == "not-superset":
        assert (not risks and not found) or not risks <= set(found)
    if mode == "safe":
        assert found == ()


def test_what_no_config_can_open_is_never_in_one():
    for mode in MODES:
        for seed in range(20):
            assert OTHER not in sample_config({"a", OTHER}, mode, KNOWN, np.random.default_rng(seed))


def test_sizes_are_uniform():
    draws = np.random.default_rng(0)
    sizes = [len(sample_config({"a"}, "superset", ("a", "b", "c"), draws)) for _ in range(3000)]
    assert [round(sizes.count(size) / 3000, 1) for size in (1, 2, 3)] == [0.3, 0.3, 0.3]
    kept = [sample_config({"a", "b", "c"}, "not-superset", ("a", "b", "c"), draws) for _ in range(3000)]
    assert [round(sum(len(one) == size for one in kept) / 3000, 1) for size in (0, 1, 2)] == [0.3, 0.3, 0.3]


def test_a_config_in_words():
    meaning = {"a": "fights and wounds.", "b": "thieving"}
    texts = {config_text(("a", "b"), meaning, np.random.default_rng(seed)) for seed in range(200)}
    assert len(texts) == len(TEMPLATES) == 10
    assert all("a: fights and wounds. b: thieving." in text for text in texts)
    assert "None." in config_text((), meaning, np.random.default_rng(0))
