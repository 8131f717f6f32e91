"""Nothing in the log can be changed, moved, taken out or put in unseen."""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from valign.serving.audit_chain import GENESIS, BrokenChain, Entry, extend, link_hash, verify

texts = st.text(max_size=20)
entries = st.builds(Entry, at=texts, request=texts, prompt=texts, body=texts)
chains = st.lists(entries, min_size=1, max_size=8).map(lambda found: extend(0, GENESIS, found))
FIELDS = ("at", "request", "prompt", "body", "hash")


def test_the_formula_by_hand():
    text = json.dumps([GENESIS, 1, "now", "r", "p", '{"ä": 1}'], separators=(",", ":"))
    import hashlib

    assert link_hash(GENESIS, 1, "now", "r", "p", '{"ä": 1}') == hashlib.sha256(text.encode()).hexdigest()


@given(chains)
def test_a_whole_chain_passes_and_gives_its_head(chain):
    found = verify(chain)
    assert (found.entries, found.head) == (len(chain), chain[-1].hash)
    for link in chain:
        assert verify(chain, head=link.hash) == found
    assert verify([]) == type(found)(0, GENESIS)


@given(st.lists(entries, max_size=6), st.integers(0, 6))
def test_appending_in_parts_gives_the_same_chain(found, cut):
    first = extend(0, GENESIS, found[:cut])
    head = first[-1].hash if first else GENESIS
    assert first + extend(len(first), head, found[cut:]) == extend(0, GENESIS, found)


@given(chains, st.data())
def test_any_change_shows_where_it_is(chain, data):
    index = data.draw(st.integers(0, len(chain) - 1))
    field = data.draw(st.sampled_from(FIELDS))
    new = data.draw(texts)
    assume(new != getattr(chain[index], field))
    changed = [*chain[:index], replace(chain[index], **{field: new}), *chain[index + 1 :]]
    with pytest.raises(BrokenChain) as caught:
        verify(changed)
    assert caught.value.seq == index + 1


@given(chains, st.data())
def test_a_missing_or_moved_entry_shows(chain, data):
    assume(len(chain) > 1)
    index = data.draw(st.integers(0, len(chain) - 2))
    with pytest.raises(BrokenChain):
        verify(chain[:index] + chain[index + 1 :])
    with pytest.raises(BrokenChain):
        verify([*chain[:index], chain[index + 1], chain[index], *chain[index + 2 :]])
    renumbered = [replace(link, seq=seq) for seq, link in enumerate(chain[:index] + chain[index + 1 :], start=1)]
    with pytest.raises(BrokenChain):
        verify(renumbered)


@given(chains, st.integers(0, 7))
def test_a_noted_head_shows_a_cut_end_and_a_log_written_anew(chain, kept):
    assume(kept < len(chain))
    with pytest.raises(BrokenChain, match="noted head"):
        verify(chain[:kept], head=chain[-1].hash)
    anew = extend(0, GENESIS, [Entry(at="x" * 30, request="", prompt="", body="") for _ in chain])
    with pytest.raises(BrokenChain, match="noted head"):
        verify(anew, head=chain[-1].hash)
