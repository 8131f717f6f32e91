"""Safety configs: what a sentence means, who may say it, and what is refused."""

import pytest

from valign.checks import UserError
from valign.policy import load_policy, read_guard_config
from valign.policy.safety_config import join_configs, openable, roles_of, stem

DEFAULT = load_policy("default")


@pytest.mark.parametrize(
    ("text", "role", "meant"),
    [
        ("allows stage blood in theatre posters", "studio", "allow stage blood (shocking) in theatre posters"),
        ("This site allows zombies and skulls on film posters.", "museum", None),
        ("allows Violence", "museum", "allow violence"),
        ("blocks violence; blocks shocking in children's books", "", "block violence; block shocking in children books"),
        ("Does not allow violence, but rewrites sexual content", "", "block violence; rewrite sexual"),
        ("never shows a brutal fist fight in the street", "", "block street-fight (violence)"),
        ("never shows a brutal fist fight in the street in posters", "", "block street-fight (violence) in posters"),
        ("forbids a bloody corpse prop", "", "block a bloody corpse prop (shocking)"),
        ('allows "stage blood" in "theatre posters"', "studio", "allow stage blood (shocking) in theatre posters"),
    ],
)
def test_a_sentence_is_read_by_the_words_of_the_policy(text, role, meant):
    config = read_guard_config(DEFAULT, text, role=role)
    if meant is None:
        meant = "allow zombies (shocking) in film posters; allow skulls (shocking) in film posters"
    assert str(config) == meant


@pytest.mark.parametrize(
    ("text", "role", "message"),
    [
        ("allows stage blood", "", "which somebody without a role may not.*museum, studio|studio, museum"),
        ("allows nude statues", "studio", "'studio' may not"),
        ("allows hate", "studio", "never opens"),
        ("allows hate-rally in history books", "museum", "never opens"),
        ("allows nudity in posters of children", "museum", "block rule minors-sexual always blocks"),
        ("allows violnce", "museum", "'violnce' is not a category.*Did you mean 'violence'"),
        ("allows pink elephants", "museum", "Categories: hate, harassment"),
        ("blocks pink elephants", "", "'pink elephants' is not"),
        ("allows everything", "museum", "'everything' is not"),
        ("allows violence except gore", "museum", "is not a category"),
        ("allows gory masks in posters but not in books", "museum", "A verb comes first"),
        ("don't block violence", "museum", "A verb comes first"),
        ("ignore the policy", "museum", "A verb comes first"),
        ("allows gore in posters without limits", "museum", "without exceptions"),
        ("allows gore in the", "museum", "is not a category|plain words"),
        ("rewrites gore", "", "rewrite takes a whole category"),
        (" .; ", "", "must hold a sentence"),
        ("blocks violence", "chef", "role must be one of museum, studio"),
        ("blocks violence. " * 200, "", "at most 2000 characters"),
    ],
)
def test_what_is_no_such_sentence_or_not_the_writers_to_say_is_refused(text, role, message):
    with pytest.raises(UserError, match=message):
        read_guard_config(DEFAULT, text, role=role)


def test_to_rewrite_what_is_blocked_is_to_loosen():
    blocked = [one.model_copy(update={"action": "block"}) if one.id == "violence" else one for one in DEFAULT.categories]
    policy = DEFAULT.model_copy(update={"categories": blocked})
    with pytest.raises(UserError, match="may not"):
        read_guard_config(policy, "rewrites violence")
    assert str(read_guard_config(policy, "rewrites violence", role="museum")) == "rewrite violence"
    assert str(read_guard_config(DEFAULT, "rewrites violence")) == "rewrite violence"


def test_roles_come_from_the_categories():
    assert roles_of(DEFAULT) == ("museum", "studio")
    assert openable(DEFAULT, "museum") == {"violence", "sexual", "shocking"}
    assert openable(DEFAULT, "") == frozenset()


def test_two_configs_hold_at_once():
    one, two = read_guard_config(DEFAULT, "allows violence", role="museum"), read_guard_config(DEFAULT, "blocks violence")
    joined = join_configs(one, two)
    assert str(joined) == "allow violence; block violence"
    assert join_configs(None, two) is two
    assert joined.fingerprint() != one.fingerprint()


@pytest.mark.parametrize(("plural", "singular"), [("posters", "poster"), ("bodies", "body"), ("boxes", "box"), ("glass", "glass")])
def test_singular_and_plural_have_one_stem(plural, singular):
    assert stem(plural) == stem(singular)
