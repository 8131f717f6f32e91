import json

import pytest

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair, count_categories
from valign.data.prompts.sources import AttackSource, ChatSource, FileSource, GrammarSource, pick_pairs
from valign.policy import load_policy

POLICY = load_policy("default")


class TwinChat:
    def complete(self, messages):
        captions = messages[-1]["content"].split("Captions: ")[1].split("\n")[0]
        return json.dumps({"prompts": [f"calm {text}" for text in json.loads(captions)]})


class TinyGrammar:
    def pairs(self, category, count, seed):
        return [
            PromptPair(f"{category}-{i}", f"mean {category} {i} {seed}", f"kind {category} {i}", (category,)) for i in range(count)
        ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def twins(tmp_path):
    names = ["Hate"] * 6 + ["Violence"] * 4 + ["Hate, Violence"] * 2
    return write(
        tmp_path / "twins.jsonl",
        [{"id": f"t{i}", "unsafe": f"mean {i}", "safe": f"kind {i}", "category": name} for i, name in enumerate(names)],
    )


def test_a_grammar_is_asked_once_a_category(tmp_path):
    found = GrammarSource(TinyGrammar()).collect(POLICY, ("hate", "violence"), 3, 5, tmp_path)
    assert count_categories(found.pairs) == {"hate": 3, "violence": 3}
    with pytest.raises(UserError, match="must be a number for a grammar"):
        GrammarSource(TinyGrammar()).collect(POLICY, ("hate",), None, 5, tmp_path)


def test_a_file_gives_the_asked_number_of_the_asked_categories(tmp_path, twins):
    source = FileSource(twins)
    assert len(source.collect(POLICY, ("hate", "violence"), None, 0, tmp_path).pairs) == 12
    assert {
        len(set(pair.categories) & {"violence"}) for pair in source.collect(POLICY, ("violence",), None, 0, tmp_path).pairs
    } == {1}
    some = source.collect(POLICY, ("hate", "violence"), 3, 0, tmp_path).pairs
    counts = count_categories(some)
    assert counts["hate"] >= 3
    assert counts["violence"] >= 3
    assert len(some) <= 6
    assert some == source.collect(POLICY, ("hate", "violence"), 3, 0, tmp_path).pairs
    assert some != source.collect(POLICY, ("hate", "violence"), 3, 1, tmp_path).pairs


def test_the_description_changes_with_the_file_and_how_it_is_read(tmp_path, twins):
    first = FileSource(twins).describe()
    assert first != FileSource(twins, fill={"category": "hate"}).describe()
    write(twins, [{"unsafe": "x", "safe": "y", "category": "hate"}])
    assert first != FileSource(twins).describe()
    assert json.dumps(first)
    with pytest.raises(UserError, match="got nothing there"):
        FileSource(tmp_path / "nowhere.csv").describe()


def test_unsafe_prompts_of_a_file_get_twins_from_the_chat_model(tmp_path):
    rows = [{"prompt": f"mean {i}", "label": 1, "category": ("hate", "sexual")[i % 2]} for i in range(6)]
    rows.append({"prompt": "kind", "label": 0, "category": ""})
    source = ChatSource(TwinChat(), "test-model", write(tmp_path / "unsafe.jsonl", rows))
    found = source.collect(POLICY, ("hate",), 2, 0, tmp_path)
    assert len(found.pairs) == 2
    assert all(pair.categories == ("hate",) and pair.safe == f"calm {pair.unsafe}" for pair in found.pairs)
    assert source.describe()["chat"] == "test-model"


def test_picking_takes_no_more_than_it_must():
    pairs = [PromptPair(f"p{i}", "a", "b", ("hate", "violence") if i < 3 else ("hate",)) for i in range(9)]
    assert pick_pairs(pairs, ("hate",), None, 0) == pairs
    assert len(pick_pairs(pairs, ("hate",), 4, 0)) == 4
    assert count_categories(pick_pairs(pairs, ("hate", "violence"), 3, 0))["violence"] == 3
    assert pick_pairs(pairs, ("sexual",), 4, 0) == []


def attack_run(folder, *rows):
    folder.mkdir()
    write(folder / "found.jsonl", [{"kind": "adversarial", "held_out": False, "concept": "", **row} for row in rows])
    return folder


def test_what_attacks_found_becomes_pairs_beside_another_source(tmp_path):
    one = {"id": "u1", "unsafe": "zxq man", "safe": "a tree", "category": "hate"}
    first = attack_run(tmp_path / "one", one, {**one, "id": "u2", "unsafe": "qxz", "category": "violence"})
    second = attack_run(tmp_path / "two", {**one, "unsafe": "ZXQ  man"}, {**one, "id": "u3", "unsafe": "held", "held_out": True})
    empty = attack_run(tmp_path / "three")
    source = AttackSource((first, second, empty), GrammarSource(TinyGrammar()))
    found = source.collect(POLICY, ("hate",), 2, 5, tmp_path)
    assert [(pair.unsafe, pair.kind) for pair in found.pairs] == [
        ("zxq man", "adversarial"),
        ("held", "adversarial"),
        ("mean hate 0 5", "explicit"),
        ("mean hate 1 5", "explicit"),
    ]
    assert found.pairs[1].held_out  # and is left out by `allowed_pairs`, as of any source
    assert found.counts["duplicate"] == 1
    assert found.counts["runs_that_found_nothing"] == 1
    assert len({pair.id for pair in found.pairs}) == 4
    described = source.describe()
    assert described["source"] == "attacks"
    assert described["rest"] == {"source": "grammar", "grammar": "TinyGrammar"}
    (first / "found.jsonl").write_text("")
    assert source.describe() != described


def test_without_another_source_there_is_only_what_was_found(tmp_path):
    run = attack_run(tmp_path / "run", {"id": "u1", "unsafe": "zxq", "safe": "a tree", "category": "hate"})
    assert [pair.unsafe for pair in AttackSource((run,)).collect(POLICY, ("hate", "violence"), 9, 0, tmp_path).pairs] == ["zxq"]
    with pytest.raises(UserError, match="must be a file of prompts, got nothing there"):
        AttackSource((tmp_path / "none",)).describe()
