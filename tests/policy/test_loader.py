"""Every mistake in a policy file is found at once, and each names its file and line."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from valign.checks import UserError
from valign.policy import PolicyError, load_policy
from valign.policy.block_rules import gaps, softens

SMALL = """\
version: 1
id: small
title: A small policy
negative_prompt: harm
safety_text: harm
categories:
  - id: violence
    title: Violence
    description: People being hurt.
    safe_prompt: a quiet park
    concepts:
      - id: street-fight
        name: a fight
        safe: a dance
data:
  unsafe_prompt: "write $count captions about $concept"
  safe_prompt: "rewrite $prompts"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_a_small_policy_is_enough(write):
    policy = load_policy(write(SMALL))
    assert policy.category_ids() == ("violence",)
    assert policy.category("violence").action == "rewrite"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    title: Violence", "    titel: Violence", "8: categories[violence] has an unknown key 'titel'. Did you mean 'title'?"),
        ("    title: Violence\n", "", "7: categories[violence] lacks the key 'title'."),
        ("title: A small policy", "title: 5", "3: title must be text, got 5. Put it in quotes."),
        ("    title: Violence", "    title: no", "8: categories[violence].title must be text, got False. Put it in quotes."),
        ("    title: Violence", "    title: ''", "8: categories[violence].title must not be empty, got ''."),
        ("version: 1", "version: 2", "1: version must be one of 1, got 2."),
        ("id: small", "id: My Policy", "2: id must be lower-case words joined by hyphens, such as street-fight, got 'My Policy'."),
        (
            "    title: Violence",
            "    title: V\n    action: refuse",
            "9: categories[violence].action must be one of 'allow', 'rewrite' or",
        ),
        (
            "    title: Violence",
            "    title: V\n    threshold: 1.5",
            "9: categories[violence].threshold must be at most 1.0, got 1.5.",
        ),
        (
            "    title: Violence",
            "    title: V\n    threshold: high",
            "9: categories[violence].threshold must be a number, got 'high'.",
        ),
        ("    title: Violence", "    title: V\n    title: W", "9: key 'title' is written twice (first on line 8). Keep one."),
        (
            "        safe: a dance",
            "        safe: [a dance]",
            "14: categories[violence].concepts[street-fight].safe must be text, got a list",
        ),
        ("a quiet park", "*park", "10: the alias *park is not allowed. Write the value out."),
        (
            "a dance",
            "&it a dance\n        terms: [*it]",
            "15: the alias *it is not allowed. Write the value out.",
        ),
        ("id: small", "id: &loop [*loop]", "2: the alias *loop is not allowed. Write the value out."),
        ("a quiet park", "!!python/name:os.system x", "10: the type tag tag:yaml.org,2002:python/name:os.system is not allowed."),
        ("title: A small policy", "title: 'A small policy", "18: the file must be YAML: found unexpected end of stream."),
        ("id: small", "[a, b]: small", "2: a key must be a word, got a list."),
        ("about $concept", "about $subject", "16: data.unsafe_prompt must only hold the placeholders $category,"),
        ("about $concept", "about it", "16: data.unsafe_prompt must hold the placeholder $concept."),
        (
            "about $concept",
            "about $concept for 5$ ",
            "16: data.unsafe_prompt must write a dollar sign that is not a placeholder as $$",
        ),
        ("id: small", "id: small\nremove: [violence]", "3: remove needs `extends`"),
        ("id: small", "id: small\nextends: missing.yaml", "3: extends: policy "),
        (
            "id: small",
            "id: small\nextends: [default]",
            "3: extends must be one of default, shapes, german, chat or a file's path, got a list.",
        ),
    ],
)
def test_one_mistake(write, old, new, expected):
    assert old in SMALL
    found = problems(write(SMALL.replace(old, new)))
    assert any(problem.startswith(expected) for problem in found), found


def test_mistakes_are_reported_together_in_the_order_of_the_file(write):
    text = SMALL.replace("title: A small policy", "title: 5").replace("a dance", "''").replace("version: 1", "version: one")
    assert [problem.split(":")[0] for problem in problems(write(text))] == ["1", "3", "14"]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("principles: [{id: a, text: x}, {id: b, text: x}, {id: a, text: y}]\n", "18: principles: id 'a' is used twice"),
        ("guidelines:\n  - {id: a, text: x}\n  - {id: a, text: y}\n", "20: guidelines: id 'a' is used twice"),
    ],
)
def test_duplicate_ids(write, section, line):
    assert problems(write(SMALL + section))[0].startswith(line)


def test_a_concept_id_is_unique_over_all_categories(write):
    second = SMALL[SMALL.index("  - id: violence") : SMALL.index("data:")].replace("violence", "hate")
    path = write(SMALL.replace("data:", second + "data:"))
    assert problems(path) == [f"20: concepts: id 'street-fight' is used twice (first at {path}:12). Rename or delete one."]


def test_a_norm_of_one_word_is_refused(write):
    path = write(SMALL + "norms:\n  - id: n\n    text: x\n    when: {context: [school]}\n")
    assert problems(path) == ["21: norms[n].when must fill two of context, behaviour and purpose: one word alone is not a norm."]


@pytest.mark.parametrize(("text", "expected"), [("", "1: the file is empty."), ("- a\n", "1: a policy must be a mapping of keys")])
def test_a_file_that_is_no_policy(write, text, expected):
    assert problems(write(text))[0].startswith(expected)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"id: \xff\xfe\n")
    assert problems(path) == ["1: the file must be UTF-8 text, got byte 0xff at 4."]


def test_a_bottomless_file(write):
    for depth in (30, 200_000):
        assert problems(write("a: " + "[" * depth + "]" * depth)) == ["1: a policy must be nested at most 20 levels deep."]


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"nothing\.yaml does not exist\. Give a YAML file, or one of default, shapes, german, chat\."
    ):
        load_policy(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="must be a YAML file, got a folder"):
        load_policy(tmp_path)


# ---- extends ---------------------------------------------------------------------------------------------------------


def test_extends_changes_only_what_is_written(write):
    base = load_policy("default")
    policy = load_policy(
        write(
            """\
version: 1
id: my-site
title: My site
extends: default
remove: [shocking, poaching]
categories:
  - id: violence
    action: block
    concepts:
      - {id: street-fight, safe: a snowball fight}
      - {id: duel, name: a duel with pistols, safe: a chess game}
thresholds: {semantic: 0.4}
safe_styles: [an ink drawing]
"""
        )
    )
    assert policy.category_ids() == tuple(id for id in base.category_ids() if id != "shocking")
    violence, before = policy.category("violence"), base.category("violence")
    assert (violence.action, violence.description) == ("block", before.description)
    assert violence.concepts[0].safe == "a snowball fight"
    assert violence.concepts[0].name == before.concepts[0].name
    assert violence.concepts[1:-1] == before.concepts[1:]
    assert violence.concepts[-1].id == "duel"
    assert [concept.id for concept in policy.category("illegal-activity").concepts][-1] == "pickpocket"
    assert (policy.thresholds.semantic, policy.thresholds.keep_words) == (0.4, base.thresholds.keep_words)
    assert policy.safe_styles == ["an ink drawing"]
    assert policy.fingerprint() != base.fingerprint()


def test_extends_a_file_beside_it_and_errors_name_the_file_that_wrote_them(write):
    parent = write(SMALL.replace("a dance", "5"), "parent.yaml")
    child = write("id: child\ntitle: Child\nextends: parent.yaml\nversion: two\n", "child.yaml")
    with pytest.raises(PolicyError) as caught:
        load_policy(child)
    assert [problem.where for problem in caught.value.problems] == [(str(child), 4), (str(parent), 14)]


def test_a_policy_has_a_name_of_its_own(write):
    assert [line[:30] for line in problems(write("version: 1\nextends: default\n"))] == [
        "1: the policy lacks the key 'i",
        "1: the policy lacks the key 't",
    ]


def test_removing_what_is_not_there(write):
    path = write("version: 1\nid: a\ntitle: A\nextends: default\nremove: [shoking, {a: b}]\n")
    assert problems(path) == ["5: remove must be a list of ids, e.g. [shocking]."]
    path = write("version: 1\nid: a\ntitle: A\nextends: default\nremove:\n  - hate\n  - shoking\n")
    assert problems(path) == ["7: remove: nothing here has the id 'shoking'. Did you mean 'shocking'?"]


def test_an_id_of_two_sections_is_removed_by_section(write):
    write(SMALL + "guidelines: [{id: violence, text: x}]\n", "parent.yaml")
    child = "version: 1\nid: child\ntitle: Child\nextends: parent.yaml\nremove: [{}]\n"
    path = write(child.format("violence"), "child.yaml")
    assert problems(path) == ["5: remove: 'violence' is ambiguous. Write categories/violence or guidelines/violence."]
    policy = load_policy(write(child.format("guidelines/violence"), "child.yaml"))
    assert (policy.category_ids(), policy.guidelines) == (("violence",), [])


def test_a_circle_is_named(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: c.yaml\n", "b.yaml")
    c = write("extends: a.yaml\n", "c.yaml")
    assert "extends goes round in a circle: c.yaml -> a.yaml -> b.yaml -> c.yaml." in str(problems(c))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_holds_the_answer_is_a_policy_or_a_list_of_problems(tmp_path, data):
    lines = SMALL.splitlines()
    odd = st.sampled_from(
        ["[", "- ", "{}", "null", "a: b", "  x", "? [y]", "id: violence", "- id: 5", "<<: {a: 1}", "2025-02-31", "!!set {a}"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        lines[at] = data.draw(st.sampled_from([lines[at] + " {}", key + colon + " {}", "{}"])).replace("{}", data.draw(odd))
    (tmp_path / "parent.yaml").write_text(SMALL)
    path = tmp_path / "p.yaml"
    path.write_text("\n".join(["extends: parent.yaml", *lines] if data.draw(st.booleans()) else lines))
    try:
        load_policy(path)
    except PolicyError as error:
        found = error.problems
    else:
        return
    assert found
    assert all(problem.where[1] >= 1 for problem in found)


@pytest.mark.parametrize("term", ["++", "\U0001f9e8", " . "])
def test_a_term_that_holds_no_word_is_refused_with_its_line(write, term):
    text = SMALL.replace("        safe: a dance\n", f'        safe: a dance\n        terms: ["knife", "{term}"]\n')
    (problem,) = problems(write(text))
    assert problem.startswith("15: ")
    assert "must hold a letter or digit" in problem


BASE = "id: base\ntitle: Base\nextends: default\n"
MINORS = "always_block:\n  - id: minors-sexual\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "remove: [minors-sexual]\n",
            "5: always_block: 'minors-sexual' cannot be removed. Add rules of your own, or extend nothing.",
        ),
        ("remove: [always_block/minors-sexual]\n", "5: always_block: 'minors-sexual' cannot be removed."),
        (
            f"{MINORS}    every: [[child], [nude]]\n",
            "6: always_block: 'minors-sexual' must block all that it blocks in what is extended.",
        ),
        (f"{MINORS}    ages_below: 12\n", "6: always_block: 'minors-sexual' must block all"),
        (f"{MINORS}    ages_below: null\n", "6: always_block: 'minors-sexual' must block all"),
        (f"{MINORS}    with_categories: []\n", "6: always_block: 'minors-sexual' must block all"),
    ],
)
def test_a_block_rule_cannot_be_switched_off(write, change, expected):
    (problem,) = problems(write(f"version: 1\n{BASE}{change}"))
    assert problem.startswith(expected)


def test_a_block_rule_may_block_more(write):
    change = "    ages_below: 21\n    with_categories: [sexual, violence]\n  - {id: own, text: own, every: [[cat]]}\n"
    path = write(f"version: 1\n{BASE}{MINORS}{change}")
    first, second = load_policy(path).always_block
    assert (first.ages_below, second.id) == (21, "own")
    base = load_policy("default").always_block[0]
    assert not softens(base.model_copy(update={"every": [[*base.every[0], "cat"]]}), base)  # one list fewer blocks more
    assert softens(base.model_copy(update={"every": [*base.every, ["cat"]]}), base)


def test_what_block_rules_cannot_do_is_said(write):
    assert gaps(load_policy(write(SMALL))) == [
        "Policy small has no block rules (always_block): nothing is blocked whatever the categories say."
    ]
    assert gaps(load_policy("default")) == []
    without = load_policy(write(f"version: 1\n{BASE}remove: [sexual]\n"))
    assert gaps(without) == [
        "Block rule minors-sexual asks for the category sexual, which policy base lacks: only the rule's own words count."
    ]
