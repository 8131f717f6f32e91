import pytest

from valign.data.prompts.overlap import Overlap, fold, measure_overlap, without_overlap
from valign.data.prompts.pairs import LabelledPrompt

TEST = [LabelledPrompt(str(i), prompt, 1, ("hate",)) for i, prompt in enumerate(["a crow", "A  Crow ", "an owl", "a wren"])]


def test_overlap_counts_rows_and_distinct_prompts_after_folding():
    found = measure_overlap(["a CROW", "a\tcrow", "a gull"], TEST)
    assert found == Overlap(train=2, test=4, rows=2, distinct=1)
    assert found.share == 0.5
    assert measure_overlap(["a crow"], []).share == 0.0


@pytest.mark.parametrize("allow", [False, True])
def test_overlapping_rows_leave_the_test_set_unless_allowed(allow):
    kept, found = without_overlap(["a crow"], TEST, allow_overlap=allow)
    assert [row.id for row in kept] == (["0", "1", "2", "3"] if allow else ["2", "3"])
    assert found.rows == 2
    assert measure_overlap(["a crow"], kept).rows == (2 if allow else 0)


def test_fold_keeps_words_apart():
    assert fold(" A \n b ") == "a b"
    assert fold("ab") != fold("a b")
