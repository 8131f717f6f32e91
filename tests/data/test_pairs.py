import pytest

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair, file_names, load_pairs, write_pairs

PAIRS = [PromptPair("a-1", "bad", "good", ("hate", "sexual"), "crow", "implicit", True), PromptPair("b", "wörse", "better", ())]


def test_pairs_survive_the_disk(tmp_path):
    write_pairs(tmp_path / "pairs.parquet", PAIRS)
    assert load_pairs(tmp_path / "pairs.parquet") == PAIRS


def test_the_same_pairs_give_the_same_bytes(tmp_path):
    write_pairs(tmp_path / "one", PAIRS)
    write_pairs(tmp_path / "two", PAIRS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".hidden"])
def test_an_id_must_be_able_to_name_a_file(name):
    with pytest.raises(UserError, match=r"PromptPair\.id must be letters"):
        PromptPair(name, "bad", "good", ())


def test_refuses_unsorted_categories_and_repeated_ids(tmp_path):
    with pytest.raises(ValueError, match="must be sorted and distinct"):
        PromptPair("a", "bad", "good", ("sexual", "hate"))
    with pytest.raises(UserError, match="got 1 ids more than once, first 'b'"):
        write_pairs(tmp_path / "pairs.parquet", [*PAIRS, PAIRS[1]])


def test_missing_and_foreign_tables_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_pairs(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.parquet").write_text("something else")
    with pytest.raises(UserError, match="is not a table of prompt pairs"):
        load_pairs(tmp_path / "pairs.parquet")


def test_file_names_keep_letters_of_every_alphabet_and_distinct_ids_distinct():
    ids = ["é1", "è1", "猫", "犬", "plain-1", "a/b", "a b", "///", "x" * 300, "e\u0301 2"]
    names = file_names(ids)
    assert [names[one] for one in ids[:5]] == ids[:5]
    assert names["e\u0301 2"] == "\u00e9-2"  # one way of writing an accent
    assert names["a/b"].startswith("a-b-")
    assert len(set(names.values())) == len(ids)
    for name in names.values():
        assert PromptPair(name, "bad", "good", ()).id == name
        assert len(f"{name}_unsafe.png".encode()) < 255
    assert file_names(["a/b"]) == {"a/b": "a-b"}  # as long as no other id is called so
