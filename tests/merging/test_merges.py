"""What every merge keeps, whatever its method: the table is walked, so a new row is tested by being there."""

import dataclasses
import sys

import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import MERGES, Votes, merge_metadata, write_merge
from valign.models.files.adapter_files import WEIGHTS, open_adapter

LINEAR = {"ties": {"normalize": "count"}, "dare-ties": {"normalize": "count"}}  # a weight is a strength here, not a share


def even_votes(experts):
    """Neuron j votes for expert j modulo N, by a margin that no tie can touch."""
    counts = {}
    for module, (fan_out, _) in SHAPES.items():
        winner = torch.arange(fan_out) % max(1, len(experts))
        counts[module] = (winner == torch.arange(len(experts))[:, None]).long() * 5
    return Votes.from_counts([expert.name for expert in experts], counts)


def merge(slug, experts, **options):
    needs = {
        "co-merge": lambda: (even_votes(experts),),
        "best-single": lambda: ({expert.name: float(i) for i, expert in enumerate(experts)},),
    }
    exact = {"ties": {"density": 1.0}, "dare-ties": {"density": 1.0}}
    arguments = needs.get(slug, tuple)()
    return MERGES[slug](experts, *arguments, **{**exact.get(slug, {}), **options})


def weighted(experts, *weights):
    return [dataclasses.replace(expert, weight=weight) for expert, weight in zip(experts, weights)]


@pytest.fixture(params=MERGES)
def slug(request):
    return request.param


def test_every_row_declares_its_method(slug):
    method = sys.modules[MERGES[slug].__module__].METHOD
    assert (method.slug, method.room) == (slug, "merging")
    assert method.entry == f"{MERGES[slug].__module__}:{MERGES[slug].__name__}"


def test_one_expert_is_kept(slug, three):
    merged, kept = deltas(merge(slug, three[:1])), deltas(three[0].file.items())
    for module in SHAPES:
        assert_close(merged[module], kept[module], rtol=1e-5, atol=1e-6)


def test_identical_experts_are_kept(slug, make_expert):
    factors = random_factors(rank=3)
    experts = [make_expert(name, factors) for name in "abc"]
    merged = deltas(merge(slug, experts))
    times = 3 if slug == "sum" else 1
    for module, lora in factors.items():
        assert_close(merged[module], times * lora.delta(), rtol=1e-5, atol=1e-6)


def test_weight_zero_is_the_base_model(slug, three):
    for delta in deltas(merge(slug, weighted(three, 0, 0, 0))).values():
        assert delta.abs().max() == 0


def test_weight_is_a_strength_never_squared(slug, three):
    options = LINEAR.get(slug, {})
    once = deltas(merge(slug, three, **options))
    for strength in (0.5, -2.0):
        scaled = deltas(merge(slug, weighted(three, strength, strength, strength), **options))
        for module in SHAPES:
            assert_close(scaled[module], strength * once[module], rtol=1e-4, atol=1e-5)


def test_order_of_experts_does_not_matter(slug, three):
    if slug == "co-merge":
        pytest.skip("the votes carry the order; see test_co_merge.py")
    one = deltas(merge(slug, three))
    other = deltas(merge(slug, three[1:] + three[:1])) if slug != "best-single" else None
    if other is None:  # the scores go with the names
        scores = {expert.name: float(i) for i, expert in enumerate(three)}
        other = deltas(MERGES[slug](three[::-1], scores))
    for module in SHAPES:
        assert_close(one[module], other[module], rtol=1e-4, atol=1e-5)


def test_modules_come_sorted_and_scale_is_one(slug, three):
    stream = list(merge(slug, three))
    assert [module for module, _ in stream] == sorted(SHAPES)
    assert all(lora.scale == 1 and lora.down.dtype == lora.up.dtype == torch.float32 for _, lora in stream)


def test_saved_merge_reads_back_and_is_reproducible(slug, three, tmp_path):
    expected = dict(merge(slug, three))
    for folder in ("one", "two"):
        write_merge(merge(slug, three), tmp_path / folder, merge_metadata(slug, three, {}))
    opened = open_adapter(tmp_path / "one")
    for module, lora in opened.items():  # the factors, bit for bit; their product depends on how they lie in memory
        assert torch.equal(lora.down, expected[module].down)
        assert torch.equal(lora.up, expected[module].up)
        assert lora.scale == expected[module].scale
    assert [source["name"] for source in opened.metadata["sources"]] == ["hate", "shocking", "violence"]
    for name in (WEIGHTS, "valign.json", "merge_config.yml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_checks_come_before_the_first_module(slug, three, make_expert):
    with pytest.raises(UserError, match="experts must not be empty"):
        merge(slug, [])
    with pytest.raises(UserError, match="must have different names, got hate twice"):
        merge(slug, [three[0], three[0]])
    stranger = make_expert("stranger", random_factors(), base_fingerprint="c" * 64)
    with pytest.raises(UserError, match="must come from one base model"):
        merge(slug, [three[0], stranger])
    assert deltas(merge(slug, [three[0], stranger], allow_base_mismatch=True))
