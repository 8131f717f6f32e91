"""DARE: seeded masks, unbiased, and the same election as TIES."""

import hashlib

import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from test_ties import FULL, dense_ties
from torch.testing import assert_close

from valign.merging import merge_dare_ties, merge_ties
from valign.merging.dare_ties import drop, generator


@pytest.mark.parametrize("normalize", ["weights", "count", "none"])
def test_equals_the_dense_transcription(normalize, three):
    merged = deltas(merge_dare_ties(three, density=0.6, seed=3, normalize=normalize, rank=FULL))
    for module in SHAPES:
        parts = []
        for expert in three:
            delta = expert.file.factors(module).delta().numpy()
            mask = torch.rand(delta.shape, generator=generator(3, module, expert.name)).numpy() < 0.6
            parts.append((delta * mask / 0.6).astype("float32"))
        expected = dense_ties(parts, [1.0] * 3, 1.0, normalize)
        assert_close(merged[module], torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_density_one_is_untrimmed_ties(three):
    one, other = deltas(merge_dare_ties(three, density=1.0)), deltas(merge_ties(three, density=1.0))
    assert all(torch.equal(one[module], other[module]) for module in SHAPES)


def test_the_expected_delta_is_unchanged():
    delta = torch.ones(400, 500)
    dropped = drop(delta, 0.2, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 5.0}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)  # 200,000 draws: standard error 0.0045


def test_seed_decides_and_global_state_does_not(three):
    torch.manual_seed(1)
    one = deltas(merge_dare_ties(three, seed=0))
    torch.manual_seed(2)
    same, other = deltas(merge_dare_ties(three, seed=0)), deltas(merge_dare_ties(three, seed=1))
    assert all(torch.equal(one[module], same[module]) for module in SHAPES)
    assert any(not torch.equal(one[module], other[module]) for module in SHAPES)


def test_order_of_experts_does_not_matter(three):
    one, other = deltas(merge_dare_ties(three, rank=FULL)), deltas(merge_dare_ties(three[::-1], rank=FULL))
    for module in SHAPES:
        assert_close(one[module], other[module], rtol=1e-4, atol=1e-5)


def test_a_mask_is_drawn_by_seed_module_and_expert():
    digest = hashlib.sha256(b"3\nmid.to_q\nhate").digest()
    expected = torch.rand(5, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2))
    assert torch.equal(torch.rand(5, generator=generator(3, "mid.to_q", "hate")), expected)


def test_errors_are_reported_and_other_bases_allowed_on_request(three, make_expert):
    errors = {}
    stranger = make_expert("stranger", random_factors(), base_fingerprint="c" * 64)
    whole = deltas(merge_dare_ties([three[0], stranger], rank=FULL, allow_base_mismatch=True))
    cut = deltas(merge_dare_ties([three[0], stranger], rank=1, errors=errors, allow_base_mismatch=True))
    for module in SHAPES:
        assert errors[module] == pytest.approx(float((whole[module] - cut[module]).norm() / whole[module].norm()), rel=1e-3)
    with pytest.raises(ValueError, match=r"^DareTies\.experts must come from one base model"):
        merge_dare_ties([three[0], stranger])
    with pytest.raises(ValueError, match=r"^DareTies\.scale must be in"):
        merge_dare_ties(three, scale=float("inf"))
