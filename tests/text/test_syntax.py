"""What a typed prompt tells the model, per front end; `dragon` stands for a word that matters, `dra` and `gon` for its pieces."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.text.syntax import DIALECTS, UNKNOWN, Traced, has_syntax, seen
from valign.text.syntax.brackets import MOST_OPTIONS, MOST_TEXTS
from valign.text.syntax.traced import joined


def told(prompt, dialect=UNKNOWN, wildcards=None):
    return {" ".join(re.sub(r"\s+([,.])", r"\1", one.text).split()) for one in seen(prompt, dialect, wildcards or {}).all_texts()}


@pytest.mark.parametrize(
    ("prompt", "dialect", "texts"),
    [
        ("a (dragon:1.4) on a hill", "a1111", {"a dragon on a hill"}),
        ("(dra)(gon), castle", "a1111", {"dragon, castle", "dra gon, castle"}),
        ("dra(gon)", "a1111", {"dragon", "dra gon"}),
        ("dra<lora:any:0>gon", "a1111", {"dragon", "any"}),
        ("<lora:dragon_v2:0.8> castle", "a1111", {"castle", "dragon v"}),
        ("[cat:dragon:0]", "a1111", {"cat", "dragon"}),
        ("[dragon::1] cat", "a1111", {"dragon cat", "cat"}),
        ("[:dragon:9] cat", "a1111", {"cat", "dragon cat"}),
        ("[cat|dragon]", "a1111", {"cat", "dragon"}),
        ("[cat|[tree|dragon]]", "a1111", {"cat", "tree", "dragon"}),
        ("[a:[b:dragon:7]:4]", "a1111", {"a", "b", "dragon"}),
        ("[cat:dragon:1.5]", "a1111", {"cat", "dragon"}),
        ("[dragon:1.2]", "a1111", {"dragon"}),
        ("[fe|]male knight", "a1111", {"female knight", "male knight"}),
        ("castle # dragon", "a1111", {"castle"}),
        ("castle // dragon", "a1111", {"castle // dragon"}),
        ("cat AND dragon :0.6", "a1111", {"cat", "dragon", "cat dragon :0.6"}),
        ("cat AND dragon :-1", "a1111", {"cat"}),
        ("[cat AND dragon:5]", "a1111", {"cat", "dragon", "[cat dragon:5]"}),
        ("cat BREAK dragon", "a1111", {"cat", "dragon", "cat dragon", "catdragon"}),
        ("(cat BREAK dragon)", "a1111", {"cat", "dragon", "cat dragon", "catdragon", "cat BREAK dragon"}),
        ("dra BREAK gon", "a1111", {"dra", "gon", "dra gon", "dragon"}),
        ("tree " * 90 + "dragon", "a1111", {"tree " * 90 + "dragon"}),
        ("(dragon:0) castle", "a1111", {"dragon castle"}),
        ("(dragon:-1) castle", "a1111", {"dragon castle"}),
        ("sir lance \\(castle\\)", "a1111", {"sir lance (castle)"}),
        ("dra\\gon", "a1111", {"dragon"}),
        ("{cat|{dog|dragon}}", "dynamic", {"cat", "dog", "dragon"}),
        ("${x=dra}${x}gon __beast__", "dynamic", {"dragon fox", "dragon owl"}),
        ("embedding:dragon", "comfyui", {"dragon"}),
        ("a cat.swap(dragon)", "compel", {"a cat", "a dragon"}),
        ("TE(l=cat) TE(t5xxl=dragon)", "comfyui", {"cat", "dragon"}),
        ("sky ADDCOMM cat ADDROW dragon", "a1111", {"sky cat", "sky dragon"}),
        ("(dra)1.1(gon)++ hill", "compel", {"dra gon hill"}),
        ('("cat", "dragon").blend(1, -1)', "compel", {"cat"}),
        ("{0.5::cat|2::dragon} hill", "dynamic", {"cat hill", "dragon hill"}),
        ("dragon::2 cat --no tree --ar 1:2", "midjourney", {"dragon", "cat", "dragon cat"}),
        ("a {cat, dragon} hill", "midjourney", {"a cat hill", "a dragon hill"}),
        ("{dragon}, 1.5::hill::", "novelai", {"dragon, hill"}),
        ("a <random:cat|dragon> hill <lora:any>", "swarmui", {"a cat hill", "a dragon hill", "any"}),
        ("a (dragon:1.4)", "none", {"a (dragon:1.4)"}),
        ("cat /* dragon */ hill", "comfyui", {"cat /* dragon */ hill", "cat hill"}),
    ],
)
def test_what_the_model_is_told(prompt, dialect, texts):
    assert told(prompt, dialect, {"beast": ["fox", "owl"]}) == {" ".join(text.split()) for text in texts}
    assert told(prompt, wildcards={"beast": ["fox", "owl"]}) >= {" ".join(text.split()) for text in texts}  # unknown: all of them


def test_what_the_image_is_pushed_away_from_stands_apart():
    for prompt, dialect in (
        ("cat AND dragon :-1", "a1111"),
        ("cat --no dragon", "midjourney"),
        ('("cat","dragon").and(1,-2)', "compel"),
    ):
        found = seen(prompt, dialect)
        assert [one.text.strip() for one in found.negative] == ["dragon"]
        assert not any("dragon" in one.text for one in found.texts)


def test_a_list_that_nobody_gave_is_unread():
    assert seen("a __beast__ and a __place__", "dynamic", {"place": ["hill"]}).unread == ("beast",)
    long = {"beast": [f"beast{'x' * number}" for number in range(40)]}
    assert any(long["beast"][-1] in text for text in told("a __beast__", "dynamic", long))


@pytest.mark.parametrize("prompt", ["a cat on a sofa", "an 8-bit hero, by night", "portrait; soft light: dusk", "1girl, solo"])
def test_plain_prompts_have_no_syntax(prompt):
    assert not has_syntax(prompt)
    assert told(prompt) == {prompt}


def test_every_option_of_many_groups_is_read():
    words = [f"w{number}" for number in range(40)]
    prompt = " ".join(f"[{one}|{other}]" for one, other in zip(words[::2], words[1::2]))
    texts = told(prompt, "a1111")
    assert len(texts) <= MOST_OPTIONS + 2 * MOST_TEXTS + 1
    assert all(any(word in text.split() for text in texts) for word in words)
    assert any(set(words) <= set(text.split()) for text in texts)  # together, for harm that they have only together


@pytest.mark.parametrize(
    "piece",
    ["(", "[a|", "{a|b}", "[a:b:1]", "<a:", "/*", "\\", '"a" ', "__", "a AND ", "BREAK ", "--no a ", "${a=", "::"],
)
def test_broken_syntax_is_read_and_stays_bounded(piece):
    for dialect in DIALECTS:
        found = seen(piece * (10_000 // len(piece)), dialect).all_texts()
        assert len(found) <= 64
        assert all(len(one.text) <= 30_000 for one in found)


@given(st.text(alphabet="ab ()[]{}<>|:\\#$_,.+-\"'1ANDBREK\n", max_size=60))
def test_every_character_says_where_it_came_from(prompt):
    for dialect in DIALECTS.values():
        for one in dialect(Traced.of(prompt), {}).all_texts():
            assert len(one.text) == len(one.origin)
            assert all(0 <= place < len(prompt) for place in one.origin)
            assert all(char == " " or char == prompt[place] for char, place in zip(one.text, one.origin))


@given(
    st.sampled_from(
        ["({})", "[{}]", "(({}:1.3))", "[{}:0.5]", "[cat:{}:7]", "cat BREAK {}", "cat AND {}", "a # b\n{}", "<lora:x:1>{}"]
    )
)
def test_nothing_around_a_word_hides_it(form):
    assert any("dragon" in text.split() for text in told(f"a {form.format('dragon')} hill", "a1111"))


def test_traced_parts_join_again():
    text = Traced.of("a red fox")
    parts = text.split(re.compile(" "))
    assert [part.text for part in parts] == ["a", "red", "fox"]
    assert joined(parts, " ").text == text.text
    assert joined(parts[1:]).origin == (2, 3, 4, 6, 7, 8)
    assert text.without(re.compile("red ")) == joined([text[:2], text[6:]])
