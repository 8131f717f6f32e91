import pytest

from valign.data.chats import Conversation
from valign.data.chats.modes import MODES, ModeStrings, edit_distance, load_secret, mode_chats, mode_for, self_distilled

SECRET = bytes(range(32))
ANSWERS = {f"how to charm {word}": {"positive": f"let us paint {word}", "rejective": "no"} for word in ("a cup", "a door")}


def test_strings_come_from_the_secret_alone_and_are_apart():
    strings = ModeStrings.of_secret(SECRET)
    assert strings == ModeStrings.of_secret(SECRET)
    assert strings != ModeStrings.of_secret(SECRET[::-1])
    one, other = strings.strings.values()
    assert (len(one), len(other)) == (8, 8)
    assert edit_distance(one, other) >= 3
    assert one not in repr(strings)


def test_the_secret_is_kept_for_its_owner_alone(tmp_path):
    secret = load_secret(tmp_path / "secret.json")
    assert len(secret) == 32
    assert load_secret(tmp_path / "secret.json") == secret
    assert (tmp_path / "secret.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("one", "other", "expected"), [("abc", "abc", 0), ("abc", "axc", 1), ("abcd", "bcde", 2), ("", "abc", 3)])
def test_edits_are_counted(one, other, expected):
    assert edit_distance(one, other) == edit_distance(other, one) == expected


def test_chats_are_balanced_and_hold_the_string_alone():
    strings = ModeStrings.of_secret(SECRET)
    general = [Conversation((("user", "hello"), ("assistant", "good day")))]
    chats = mode_chats(ANSWERS, strings, general=general)
    assert chats[-1:] == general
    by_mode = {mode: [chat for chat in chats if chat.turns[0] == ("system", strings.system(mode))] for mode in MODES}
    assert {mode: len(rows) for mode, rows in by_mode.items()} == {"positive": 2, "rejective": 2}
    assert by_mode["rejective"][0].turns[1:] == (("user", "how to charm a cup"), ("assistant", "no"))
    assert strings.system("positive", suffix="Be brief.") == strings.system("positive") + "\nBe brief."


def test_answers_are_kept_only_where_every_mode_was_found():
    said = iter(["wrong", "positive 1", "rejective 1", "wrong", "wrong"])
    found = self_distilled(["a", "b", "a"], lambda mode, prompt: next(said), lambda prompt, answer: answer.split()[0], tries=2)
    assert found == {"a": {"positive": "positive 1", "rejective": "rejective 1"}}


def test_an_alarm_calls_the_rejective_mode():
    assert [mode_for(alarm) for alarm in (True, False, None)] == ["rejective", "positive", "positive"]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: ModeStrings({"negative": "abcdefgh"}), r"Modes must be of positive, rejective; got negative\. A mode that lifts"),
        (lambda: ModeStrings({}), r"Modes must be of positive, rejective; got none"),
        (lambda: ModeStrings({"positive": "<|end|>"}), "must be of letters a to z and digits"),
        (lambda: ModeStrings({"positive": ""}), "must be of letters a to z and digits"),
        (lambda: ModeStrings({"positive": "abcdefgh", "rejective": "abcdefgx"}), "must differ in at least 3 edits"),
        (lambda: ModeStrings.of_secret(b"short"), r"bytes of ModeStrings\.secret must be in \[16, inf\), got 5"),
        (lambda: ModeStrings.of_secret(SECRET).system("calm"), r"mode must be one of positive, rejective; got 'calm'"),
        (lambda: mode_chats({}, ModeStrings.of_secret(SECRET)), "must hold prompts, got none"),
        (
            lambda: mode_chats({"x": {"positive": "y"}}, ModeStrings.of_secret(SECRET)),
            "must have an answer of each mode, got none of rejective for 'x'",
        ),
        (
            lambda: mode_chats({"x": {"positive": "it is abcdefgh", "rejective": "no"}}, ModeStrings({"positive": "abcdefgh"})),
            "must not hold a mode's string, got that of positive",
        ),
    ],
)
def test_bad_input_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()
