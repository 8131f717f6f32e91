"""Keys: made once, kept as hashes, never shown."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.serving.keys import ANONYMOUS, Keys, new_key


def test_a_new_key_is_known_by_its_hash_only(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# ours")
    one, two = new_key("one", file), new_key("two", file)
    text = file.read_text()
    assert one not in text
    assert text == f"# ours\none {hashlib.sha256(one.encode()).hexdigest()}\ntwo {hashlib.sha256(two.encode()).hexdigest()}\n"
    keys = Keys.load(file)
    assert (keys.name_of(one), keys.name_of(two), keys.name_of(one + "x"), keys.name_of("")) == ("one", "two", None, None)
    assert "sha" not in repr(keys)
    assert not any(name in repr(keys) for name in keys.names)


def test_a_name_is_given_once(tmp_path):
    new_key("one", tmp_path / "keys.txt")
    with pytest.raises(UserError, match="already has a key named one"):
        new_key("one", tmp_path / "keys.txt")
    with pytest.raises(UserError, match="name must be"):
        new_key("a b", tmp_path / "keys.txt")


def test_keys_of_the_environment():
    keys = Keys.load(environment=" first-key-of-the-site, second-key-of-the-site\n")
    assert keys.name_of("second-key-of-the-site") == "environment-2"
    assert keys.name_of("third") is None
    with pytest.raises(UserError) as caught:
        Keys.load(environment="good-key-that-is-long,short")
    assert "key 2 must have at least 16 characters, got 5" in str(caught.value)
    assert "good-key" not in str(caught.value)


@given(st.text(max_size=60))
def test_without_keys_everybody_is_anonymous_and_with_keys_nobody_else_gets_in(key):
    assert Keys.load().name_of(key) == ANONYMOUS
    assert Keys.load(environment="the-only-key-there-is").name_of(key) is None


@pytest.mark.parametrize("line", ["one", "one two", f"one {'g' * 64}", f"one {'a' * 63}", f"one {'a' * 64} more"])
def test_a_broken_file_is_named_with_its_line(tmp_path, line):
    file = tmp_path / "keys.txt"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(UserError, match=r"keys\.txt:2 must be NAME and a SHA-256 hash"):
        Keys.load(file)


def test_an_empty_or_missing_file_lets_nobody_in(tmp_path):
    (tmp_path / "empty.txt").write_text("# nobody\n")
    with pytest.raises(UserError, match="holds no key"):
        Keys.load(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="does not exist"):
        Keys.load(tmp_path / "none.txt")
