import dataclasses
import json
from collections import Counter

import pytest

from valign.checks import UserError
from valign.evaluation.suite import EvalPrompt, Suite, overlap, prompt_seed, refuse_overlap
from valign.evaluation.suite_files import read_suite, write_suite
from valign.files import hash_value
from valign.policy import load_policy
from valign.worlds import world


def test_a_suite_comes_back_as_it_was_written(tmp_path, suite):
    write_suite(tmp_path / "squares.jsonl", suite)
    again = read_suite(tmp_path / "squares.jsonl")
    assert again == suite
    assert again.fingerprint() == suite.fingerprint()


def test_a_file_without_a_header_is_named_after_itself(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"id": "a", "prompt": "a cat"}\n\n{"id": "b", "prompt": "x", "category": "hate", "kind": "explicit"}\n'
    )
    found = read_suite(tmp_path / "mine.jsonl")
    assert (found.name, len(found), found.categories(), found.stand_in) == ("mine", 2, ("hate",), False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad\.jsonl:1 is not JSON"),
        ("[1]", r"bad\.jsonl:1 must be a JSON object, got list"),
        ('{"id": "a"}', r"bad\.jsonl:1 must have a prompt and no other fields"),
        ('{"id": "a", "prompt": "x", "colour": "red"}', r"no other fields than .*; got id, prompt, colour"),
        ('{"id": "../a", "prompt": "x"}', r"Prompt id must be letters, digits"),
        ('{"id": "a", "prompt": " "}', r"Prompt a must hold a text"),
        ('{"id": "a", "prompt": "x", "kind": "rude"}', r"kind must be one of explicit, paraphrased"),
        ('{"id": "a", "prompt": "x", "category": "hate"}', r"must be benign exactly when it has no category"),
        ('{"id": "a", "prompt": "x", "kind": "mentioned", "category": "hate"}', r"must be benign exactly when it has no category"),
        ('{"id": "a", "prompt": "x", "kind": "late"}', r"must be benign exactly when it has no category, got late"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', r"must have distinct ids, got a twice"),
        ('{"id": "a", "prompt": ["x"]}', r"bad\.jsonl:1: prompt must be text, got a list"),
        ('{"id": "a", "prompt": "x", "seed": 1e400}', r"bad\.jsonl:1: seed must be a whole number"),
        ("", r"must hold at least one row, got 0"),
    ],
)
def test_bad_files_say_where_and_what(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_suite(tmp_path / "bad.jsonl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl must be a file of prompts, got nothing there"):
        read_suite(tmp_path / "none.jsonl")


def test_a_prompts_seed_does_not_depend_on_its_neighbours(suite):
    alone = Suite("one", (suite.prompts[7],))
    assert alone.seeds(3) == [suite.seeds(3)[7]]
    assert suite.seeds(3) != suite.seeds(4)
    assert len(set(suite.seeds(0))) == len(suite)
    assert all(0 <= seed < 2**31 for seed in suite.seeds(0))
    assert Suite("s", (EvalPrompt("a", "x", seed=11),)).seeds(0) == [11]


def test_the_seed_is_a_fixed_number():  # sha256("0:benign-0"), first four bytes, without the lowest bit
    import hashlib

    assert prompt_seed(0, "benign-0") == int(hashlib.sha256(b"0:benign-0").hexdigest()[:8], 16) // 2


def test_a_limit_takes_every_kind_and_category_in_turn(suite):
    few = suite.take(25)  # of 48 unsafe and 20 benign prompts
    assert len(few) == 25
    assert Counter(prompt.category for prompt in few.prompts) == {"hate": 6, "violence": 6, "self-harm": 6, "": 7}
    assert len({(prompt.kind, prompt.category, prompt.held_out) for prompt in few.prompts if not prompt.benign}) == 18
    assert suite.take(None) is suite
    order = [suite.prompts.index(prompt) for prompt in few.prompts]
    assert order == sorted(order)


def test_a_limit_takes_benign_prompts_of_every_kind():
    kinds = ["benign"] * 12 + ["mentioned"] * 4
    prompts = [EvalPrompt(f"b-{i}", f"a square, {i}", kind=kind, held_out=i < 3) for i, kind in enumerate(kinds)]
    for order in (prompts, prompts[::-1]):
        few = Suite("benign", tuple(order)).take(6)
        assert Counter((prompt.kind, prompt.held_out) for prompt in few.prompts) == {
            ("benign", True): 2,
            ("benign", False): 2,
            ("mentioned", False): 2,
        }


def test_a_limit_drops_no_category_that_is_kept(suite):
    assert {prompt.category for prompt in suite.take(4).prompts} == {"hate", "violence", "self-harm", ""}
    assert {prompt.category for prompt in suite.take(2, keep=["violence"]).prompts} == {"violence", ""}
    message = (
        r"Suite squares must keep at least 4 prompts, one of each of hate, self-harm, violence and a benign one, got a limit of 3"
    )
    with pytest.raises(UserError, match=message):
        suite.take(3)
    unsafe = Suite("unsafe", tuple(prompt for prompt in suite.prompts if not prompt.benign))
    assert len(unsafe.take(5)) == 5


def test_trained_prompts_are_refused_by_id_not_by_text(suite):
    trained = ["  A Yellow   square, number 2", "something else"]
    assert [prompt.id for prompt in overlap(suite, trained)] == ["benign-2"]
    with pytest.raises(UserError, match=r"must not hold prompts that were trained on, got 1 of 68: benign-2\.") as error:
        refuse_overlap(suite, trained)
    assert "yellow" not in str(error.value)
    refuse_overlap(suite, ["something else"])


def test_defaults_are_left_out_of_the_file(tmp_path):
    write_suite(tmp_path / "s.jsonl", Suite("s", (EvalPrompt("a", "x"),)))
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[1]) == {"id": "a", "prompt": "x"}


def test_a_counterpart_counts_in_the_fingerprint_only_where_there_is_one():
    """Suites that name none keep the fingerprint that earlier evaluations recorded."""
    plain = EvalPrompt("u", "a storm", "hate", "explicit")
    one, named = Suite("s", (plain,)), Suite("s", (dataclasses.replace(plain, counterpart="cup"),))
    row = dataclasses.asdict(plain)
    del row["counterpart"]
    assert one.fingerprint() == hash_value([row])
    assert named.fingerprint() != one.fingerprint()
    with pytest.raises(UserError, match="is benign and must have no counterpart, got 'cup'"):
        EvalPrompt("b", "a cup", counterpart="cup")


def test_the_shapes_suite_names_the_policys_counterparts():
    safe = {category.id: category.concepts[0].safe for category in load_policy("shapes").categories}
    composed, others = set(), set()
    for prompt in world("shapes").suite(per_concept=1).prompts:
        (composed if prompt.kind == "composed" else others).add((prompt.category, prompt.counterpart))
    assert others == {("", ""), *safe.items()}
    assert composed == {(category, "") for category in safe}  # two harmless things: either of them may stay
