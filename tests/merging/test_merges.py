"""What every merge keeps, whatever its method: the table is walked, so a new row is tested by being there."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import MERGES, DenseDelta, Expert, MergeContext, NamedDeltas, Votes, merge_metadata, regmean, write_merge
from valign.models.files.adapter_files import WEIGHTS, open_adapter

LINEAR = {"ties": {"normalize": "count"}, "dare-ties": {"normalize": "count"}}  # a weight is a strength here, not a share


def even_votes(experts):
    """Neuron j votes for expert j modulo N, by a margin far from a tie."""
    counts = {}
    for module, (fan_out, _) in SHAPES.items():
        winner = torch.arange(fan_out) % max(1, len(experts))
        counts[module] = (winner == torch.arange(len(experts))[:, None]).long() * 5
    return Votes.from_counts([expert.name for expert in experts], counts)


def read_by(experts):
    """Second moments of more inputs than each layer has, different for each expert, by its name."""
    moments = []
    for expert in experts:
        g = torch.Generator().manual_seed(ord(expert.name[0]))
        rows = {module: torch.randn(40, fan_in, generator=g).double() for module, (_, fan_in) in SHAPES.items()}
        moments.append({module: inputs.T @ inputs for module, inputs in rows.items()})
    return moments


@pytest.fixture
def merge(tmp_path_factory):
    """``merge(slug, experts, allow_base_mismatch=False, **options)``: what the row of the table makes of the experts."""

    def merged(slug, experts, allow_base_mismatch=False, **options):
        if slug == "regmean":
            return regmean(experts, read_by(experts), None, ridge=0.0, allow_base_mismatch=allow_base_mismatch, **options)
        given = {"ties": {"density": 1.0}, "dare-ties": {"density": 1.0}}.get(slug, {})
        if slug == "co-merge":
            given = {"votes": tmp_path_factory.mktemp("votes")}
            even_votes(experts).save(given["votes"])
        if slug == "best-single":
            given = {"scores": {expert.name: float(ord(expert.name[0])) for expert in experts}}
        return MERGES[slug](**given | options)(experts, MergeContext(allow_base_mismatch=allow_base_mismatch))

    return merged


def weighted(experts, *weights):
    return [dataclasses.replace(expert, weight=weight) for expert, weight in zip(experts, weights)]


@pytest.fixture(params=MERGES)
def slug(request):
    return request.param


def test_every_row_declares_its_method(slug):
    kind = MERGES[slug]
    module = sys.modules[kind.__module__]
    assert (module.METHOD.slug, module.METHOD.room) == (slug, "merging")
    assert callable(getattr(module, module.METHOD.entry.removeprefix(f"{kind.__module__}:")))
    assert kind.__doc__.endswith(".")
    assert set(kind.recorded) <= {item.name for item in dataclasses.fields(kind)}


def test_one_expert_is_kept(slug, three, merge):
    merged, kept = deltas(merge(slug, three[:1])), deltas(three[0].file.items())
    for module in SHAPES:
        assert_close(merged[module], kept[module], rtol=1e-5, atol=1e-6)


def test_identical_experts_are_kept(slug, make_expert, merge):
    factors = random_factors(rank=3)
    experts = [make_expert(name, factors) for name in "abc"]
    merged = deltas(merge(slug, experts))
    times = 3 if slug == "sum" else 1
    for module, lora in factors.items():
        assert_close(merged[module], times * lora.delta(), rtol=1e-5, atol=1e-6)


def test_weight_zero_is_the_base_model(slug, three, merge):
    for delta in deltas(merge(slug, weighted(three, 0, 0, 0))).values():
        assert delta.abs().max() == 0


def test_weight_is_a_strength_never_squared(slug, three, merge):
    options = LINEAR.get(slug, {})
    once = deltas(merge(slug, three, **options))
    for strength in (0.5, -2.0):
        scaled = deltas(merge(slug, weighted(three, strength, strength, strength), **options))
        for module in SHAPES:
            assert_close(scaled[module], strength * once[module], rtol=1e-4, atol=1e-5)


def test_order_of_experts_does_not_matter(slug, three, merge):
    if slug == "co-merge":
        pytest.skip("the votes carry the order; see test_co_merge.py")
    one, other = deltas(merge(slug, three)), deltas(merge(slug, three[1:] + three[:1]))
    for module in SHAPES:
        assert_close(one[module], other[module], rtol=1e-4, atol=1e-5)


def test_modules_come_sorted_and_scale_is_one(slug, three, merge):
    stream = list(merge(slug, three))
    assert [module for module, _ in stream] == sorted(SHAPES)
    assert all(lora.scale == 1 and lora.down.dtype == lora.up.dtype == torch.float32 for _, lora in stream)


def test_saved_merge_reads_back_and_is_reproducible(slug, three, tmp_path, merge):
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


def test_checks_come_before_the_first_module(slug, three, make_expert, merge):
    with pytest.raises(UserError, match="experts must not be empty"):
        merge(slug, [])
    with pytest.raises(UserError, match="must have different names, got hate twice"):
        merge(slug, [three[0], three[0]])
    stranger = make_expert("stranger", random_factors(), base_fingerprint="c" * 64)
    with pytest.raises(UserError, match="must come from one base model"):
        merge(slug, [three[0], stranger])
    assert deltas(merge(slug, [three[0], stranger], allow_base_mismatch=True))


def test_dense_experts_give_the_same_dense_change(slug, three, merge):
    """The same changes as matrices, or one of them as a matrix, in memory."""
    expected = deltas(merge(slug, three))
    dense = [
        Expert(expert.name, NamedDeltas({module: DenseDelta(lora.delta()) for module, lora in expert.file.items()}))
        for expert in three
    ]
    for experts in (dense, [dense[0], *three[1:]]):
        merged = dict(merge(slug, experts))
        assert list(merged) == sorted(SHAPES)
        for module, delta in merged.items():
            assert_close(delta.delta(), expected[module], rtol=1e-4, atol=1e-5)
    assert all(isinstance(delta, DenseDelta) for _, delta in merge(slug, dense))
    with pytest.raises(UserError, match="must be low-rank, got a dense change of down_blocks"):
        write_merge(merge(slug, dense), Path("never"), merge_metadata(slug, dense, {}))


def test_factors_in_memory_are_as_good_as_files(slug, three, merge, tmp_path):
    held = [Expert(expert.name, NamedDeltas(dict(expert.file.items()), expert.file.metadata)) for expert in three]
    for folder, experts in (("files", three), ("memory", held)):
        write_merge(merge(slug, experts), tmp_path / folder, {})
    assert (tmp_path / "files" / WEIGHTS).read_bytes() == (tmp_path / "memory" / WEIGHTS).read_bytes()


def test_the_record_names_all_options_but_the_seed(three):
    made = MERGES["dare-ties"](density=0.25, seed=3, scale=2.0)
    assert made.record(three, MergeContext()) == {"density": 0.25, "normalize": "weights", "scale": 2.0, "rank": None}
    assert MERGES["mean"]().record(three, MergeContext()) == {}
