"""What the page shows is escaped, and says what it should."""

import re
from html import unescape

from hypothesis import given
from hypothesis import strategies as st
from serving_stand_ins import default_policy, quick_policy

from valign.guard import Guard, Verdict
from valign.serving import playground_html as html
from valign.serving.what_if import Retuned, retuned, thresholds_of

words = st.lists(st.text(min_size=1, max_size=6), max_size=8).map(" ".join)


def text(shown, *, without=""):
    """The words between the tags, without the content of one tag."""
    if without:
        shown = re.sub(rf"<{without}>.*?</{without}>", "", shown, flags=re.DOTALL)
    return unescape(re.sub(r"</?(?:ins|del|mark)>", "", shown))


@given(words, words)
def test_a_difference_holds_both_texts_to_the_letter(old, new):
    shown = html.difference(old, new)
    assert text(shown, without="ins") == old
    assert text(shown, without="del") == new
    assert "<" not in re.sub(r"</?(?:ins|del)>", "", shown)


@given(st.text(max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4))
def test_marks_are_where_the_words_are(prompt, spans):
    shown = html.marked(prompt, spans)
    assert text(shown) == prompt
    inside = {i for start, end in spans for i in range(start, min(end, len(prompt)))}
    kept = "".join(char for i, char in enumerate(prompt) if i not in inside)
    assert text(shown, without="mark") == kept


def test_nothing_of_a_prompt_is_markup():
    guard = Guard.from_policy(quick_policy())
    prompt = "a corpse <script>alert(1)</script> on the beach"
    result = guard.guard(prompt)
    shown = html.verdict(result, prompt) + html.stages(result.decision.trace) + html.mistake(prompt)
    assert "<script>" not in shown
    assert "<mark>corpse</mark>" in shown
    assert html.images([("<b>", None, "<i>")]).count("<b>&lt;b&gt;</b>") == 1


def test_nothing_of_a_prompt_is_shown_after_a_block_rule():
    guard = Guard.from_policy(quick_policy())
    assert "toddler" not in html.verdict(guard.guard("a nude toddler"), "a nude toddler")


class Scored:
    """A stage with a score per prompt: its length in tenths."""

    name, level = "scored", "semantic"

    def check_many(self, prompts):
        scores = [min(len(prompt) / 10, 1.0) for prompt in prompts]
        return [
            Verdict(
                stage="scored",
                level="semantic",
                outcome="fire" if one >= 0.5 else "pass",
                category="violence",
                score=one,
                threshold=0.5,
            )
            for one in scores
        ]

    def check(self, prompt):
        return self.check_many([prompt])[0]


@given(st.text(min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_finds_more(prompt, one, two):
    low, high = sorted((one, two))
    found = [Retuned(Scored(), level).check(prompt) for level in (low, high)]
    assert found[0].fired >= found[1].fired
    assert [verdict.threshold for verdict in found] == [low, high]
    assert Retuned(Scored(), 0.5).check(prompt) == Scored().check(prompt)


def test_the_same_guard_at_other_thresholds():
    guard = Guard(default_policy(), [Scored()], rewriter=None)
    assert thresholds_of(guard) == {"scored": 0.5}
    assert guard.check("a red apple").stop == "scored"
    assert retuned(guard, {"scored": 1.0}).check("a red ap").stop == ""
    kept = retuned(guard, {"keep_words": 0.9})
    assert (kept.acceptor.keep_words, kept.acceptor.keep_meaning) == (0.9, guard.acceptor.keep_meaning)
    assert kept.check("a red apple").stop == "scored"
