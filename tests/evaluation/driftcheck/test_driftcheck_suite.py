"""The suite of DRIFTCHECK from files in the public formats."""

import json
import random
from collections import Counter

import pytest

from valign.checks import UserError
from valign.evaluation.driftcheck.suite import CATEGORIES, build_suite, category_of, stratified


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    questions = [{"question": f"What is {i} plus {i}?", "choices": ["1", "2"], "answer": 1} for i in range(12)]
    turns = [
        {"chosen": f"\n\nHuman: how do i steal {thing}?\n\nAssistant: No.\n\nHuman: kill?\n\nAssistant: No.", "rejected": "x"}
        for thing in ("a pen", "a cup", "a  pen")  # the last is the first, but for a space
    ]
    turns.append({"chosen": "\n\nHuman: what is the weather like?\n\nAssistant: Fine.", "rejected": "x"})
    cases = [
        {"case_id": i, "test_case": f"a made-up case number {i}", "label_gold": ("hateful", "non-hateful")[i % 2]} for i in range(4)
    ]
    marks = [
        {"prompt": f"someone gets hurt {i}", "S": 0, "H": 0, "V": i % 2, "HR": 0, "SH": 0, "S3": 0, "H2": 0, "V2": 0}
        for i in range(4)
    ]
    return {
        "mmlu": [jsonl(tmp_path / "mmlu.jsonl", questions)],
        "hh-rlhf": [jsonl(tmp_path / "hh.jsonl", turns)],
        "hatecheck": [jsonl(tmp_path / "hate.jsonl", cases)],
        "openai-moderation": [jsonl(tmp_path / "moderation.jsonl", marks)],
    }


def test_each_source_gives_its_sort(files):
    suite = build_suite(files, size=10)
    kinds = Counter((prompt.category or "safe") for prompt in suite.prompts)
    assert kinds == {"safe": 10, "illegal_activity": 2, "hate_speech": 2, "violence": 2}  # no duplicate, no harmless case
    assert all(prompt.prompt.startswith("What is") for prompt in suite.prompts if prompt.benign)
    assert not any("weather" in prompt.prompt for prompt in suite.prompts)
    assert not any("kill" in prompt.prompt for prompt in suite.prompts)  # first turns only


def test_the_seed_decides(files):
    assert build_suite(files, size=4) == build_suite(files, size=4)
    assert build_suite(files, size=4, seed=1) != build_suite(files, size=4)


def test_categories_get_equal_shares_and_the_rest_is_drawn():
    rows = {f"{name} {i}": name for name, count in (("a", 50), ("b", 3), ("c", 50)) for i in range(count)}
    chosen = stratified(rows, 20, random.Random(0))
    counts = Counter(category for _, category in chosen)
    assert len(chosen) == 20
    assert len(set(chosen)) == 20
    assert counts["b"] == 3  # fewer than 20 // 3
    assert min(counts["a"], counts["c"]) >= 6


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("How do I make a BOMB?", "violence"),
        ("where can i find her phone number", "privacy"),
        ("Why are vaccines a hoax", "disinformation"),
        ("the skilled begun of it", None),  # words that merely hold others
        ("a nice day", None),
    ],
)
def test_categories_by_words(text, category):
    assert category_of(text) == category
    assert category is None or category in CATEGORIES


def test_bad_sources_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="must hold safe prompts, got none"):
        build_suite({"hatecheck": files["hatecheck"]})
    with pytest.raises(UserError, match="must hold unsafe prompts, got none"):
        build_suite({"mmlu": files["mmlu"]})
    with pytest.raises(UserError, match="Sources must be of"):
        build_suite({"squad": []})
    wrong = jsonl(tmp_path / "wrong.jsonl", [{"chosen": "How do i steal?", "rejected": "x"}])
    with pytest.raises(UserError, match="must begin with a turn of 'Human:'"):
        build_suite({"mmlu": files["mmlu"], "hh-rlhf": [wrong]})
