"""SG-LoRA: the aggregator against its mixture, the divergence against torch, the generator on a small library, bad libraries."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import distributions, nn
from torch.testing import assert_close

from valign.adapters.sg_lora import LoraSchema, SgLoraConfig, TaskExpert, aggregate, build_library, fingerprint, fit_sg_lora
from valign.adapters.sg_lora.chunks import Chunks
from valign.adapters.sg_lora.cvae import DiagonalGaussian, SemanticCvae, kl_divergence
from valign.adapters.sg_lora.library import canonical

CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["lin"]}
NAMES = ("base_model.model.lin.lora_A.weight", "base_model.model.lin.lora_B.weight")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def state(seed, scale=1.0, dtype=torch.float32):
    down, up = torch.randn(2, 5, generator=gen(seed)), torch.randn(6, 2, generator=gen(seed + 1000))
    return {NAMES[0]: (scale * down).to(dtype), NAMES[1]: (scale * up).to(dtype)}


def encode(text):
    """Text -> one of many fixed directions; the same text, the same direction."""
    return torch.randn(4, generator=gen(sum(map(ord, text)))) + 0.5


def expert(name, seed, count=3, **options):
    return TaskExpert(
        **{"name": name, "description": f"a {name}", "checkpoints": [state(seed + i) for i in range(count)], "config": CONFIG}
        | options
    )


@pytest.fixture
def library():
    return build_library([expert(name, 10 * i) for i, name in enumerate("abcdef")], encode)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flattening_is_undone_bit_for_bit(dtype):
    before = state(3, dtype=dtype)
    schema = LoraSchema.of(before)
    vector = schema.flatten(before)
    assert vector.shape == (schema.size,) == (22,)
    after = schema.unflatten(vector)
    assert list(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == dtype for name in before)


def test_the_library_keeps_means_and_population_variances(library):
    vectors = torch.stack([library.schema.flatten(state(20 + i)) for i in range(3)])
    assert_close(library.means[2], vectors.mean(0))
    assert_close(library.variances[2], (vectors - vectors.mean(0)).square().mean(0))
    assert not library.means.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.floats(0.01, 2), st.integers(0, 99))
def test_weights_and_total_variance(top_k, tau, seed):
    library = build_library([expert(name, 10 * i) for i, name in enumerate("abcdef")], encode)
    target = torch.randn(4, generator=gen(seed))
    found = aggregate(library, target, top_k=top_k, tau=tau, floor=-1)
    assert (found.weights >= 0).all()
    assert_close(found.weights.sum(), torch.tensor(1.0))
    assert (found.weights > 0).sum() <= top_k
    mean = found.weights @ library.means
    second = found.weights @ (library.variances + library.means.square())
    assert_close(found.mean, mean)
    assert_close(found.variance, second - mean.square(), atol=1e-4, rtol=1e-4)  # E[x^2] - E[x]^2 of the mixture
    again = aggregate(library, 7.5 * target, top_k=top_k, tau=tau, floor=-1)
    assert_close(again.weights, found.weights, atol=1e-4, rtol=1e-3)


def test_total_variance_is_that_of_samples_of_the_mixture(library):
    found = aggregate(library, library.embeddings[0], top_k=4, tau=0.5)
    which = torch.multinomial(found.weights, 100_000, replacement=True, generator=gen(0))
    draws = library.means[which] + library.variances[which].sqrt() * torch.randn(100_000, 22, generator=gen(1))
    assert_close(draws.var(0), found.variance, rtol=0.03, atol=0)


def test_float64_experts_are_weighed_in_float64():
    experts = [
        expert(name, 10 * i, checkpoints=[state(10 * i + j, dtype=torch.float64) for j in range(3)]) for i, name in enumerate("abc")
    ]
    library = build_library(experts, lambda text: encode(text).double())
    target = torch.randn(4, generator=gen(3), dtype=torch.float64)
    cosines = library.embeddings @ target / library.embeddings.norm(dim=1) / target.norm()
    share = (cosines / 0.05).softmax(0)[:, None]
    mean = (share * library.means).sum(0)
    found = aggregate(library, target, top_k=3, floor=-1)
    assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    spread = (share * (library.variances + (library.means - mean).square())).sum(0)
    assert_close(found.variance, spread, rtol=1e-12, atol=1e-12)
    made = fit_sg_lora(library, SgLoraConfig(latent=2, hidden=8, steps=2, top_k=2)).generate(lambda text: target, "a b")
    assert made[NAMES[0]].dtype == torch.float64


def test_limits_of_the_aggregator(library):
    target = library.embeddings[2] + 0.01
    one = aggregate(library, target, top_k=1)
    assert_close(one.mean, library.means[2])
    assert_close(one.variance, library.variances[2])
    assert one.similarity == pytest.approx(1, abs=1e-3)
    assert aggregate(library, target, top_k=6, tau=1e-4).weights[2] == 1
    assert_close(aggregate(library, target, top_k=6, tau=1e6).weights, torch.full((6,), 1 / 6))
    assert aggregate(library, target, top_k=3, tau=1e6).weights.sort().values.tolist() == pytest.approx([0, 0, 0] + 3 * [1 / 3])
    assert aggregate(library, target, top_k=3, leave_out=2, floor=-1).weights[2] == 0
    same = build_library([expert("a", 0), expert("b", 0)], encode)
    found = aggregate(same, target, top_k=2, floor=-1)
    assert_close(found.mean, same.means[0])
    assert_close(found.variance, same.variances[0], atol=1e-6, rtol=1e-5)
    still = dataclasses.replace(library, variances=torch.zeros_like(library.variances))
    found = aggregate(still, target, top_k=6, tau=0.5)
    assert_close(found.variance, found.weights @ (library.means - found.mean).square())


def test_the_divergence_is_torch_s():
    numbers = [torch.randn(3, 4, generator=gen(i)) for i in range(4)]
    q, p = DiagonalGaussian(numbers[0], numbers[1]), DiagonalGaussian(numbers[2], numbers[3])
    normals = [distributions.Normal(g.mean, (0.5 * g.log_variance).exp()) for g in (q, p)]
    assert_close(kl_divergence(q, p), distributions.kl_divergence(*normals).sum(1))
    assert (kl_divergence(q, p) > 0).all()
    assert_close(kl_divergence(q, q), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_loss_is_error_plus_divergence():
    torch.manual_seed(0)
    network = SemanticCvae(5, latent=3, hidden=8)
    x, condition = torch.randn(4, 5, generator=gen(0)), torch.randn(4, 10, generator=gen(1))
    q, p = network.encode(x, condition), network.prior_of(condition)
    z = q.mean + (0.5 * q.log_variance).exp() * torch.randn(4, 3, generator=gen(2))
    expected = (x - network.decode(z, condition)).square().sum(1) + 0.3 * kl_divergence(q, p)
    assert_close(network.loss(x, condition, gen(2), 0.3), expected)
    assert [len(part) for part in (network.encoder, network.prior, network.decoder)] == [3, 3, 5]  # 2, 2 and 3 linear layers


def smooth_library(count=40, size=20):
    """Experts whose parameters are a smooth function of a unit vector, plus noise; the last 8 are held out."""
    directions = nn.functional.normalize(torch.randn(count + 8, 4, generator=gen(0)), dim=1)
    mix = torch.randn(4, 2 * size, generator=gen(1))
    truth = torch.tanh(2 * directions @ mix)
    by_text = {f"task {i}": directions[i] for i in range(count + 8)}

    def as_state(vector):
        return {NAMES[0]: vector[:size].view(2, -1).clone(), NAMES[1]: vector[size:].view(-1, 2).clone()}

    experts = []
    for i in range(count):
        noise = 0.05 * torch.randn(20, 2 * size, generator=gen(100 + i))
        experts.append(TaskExpert(name=str(i), description=f"task {i}", checkpoints=[as_state(truth[i] + n) for n in noise]))
    return build_library(experts, by_text.__getitem__), by_text.__getitem__, truth


def test_a_generated_adapter_is_nearer_to_an_unseen_task_than_the_mean_of_all():
    """It need not beat the weighted mean of the nearest: the paper's gain over that is in accuracy, not in distance."""
    library, embedding, truth = smooth_library()
    made = fit_sg_lora(library, SgLoraConfig(latent=8, hidden=128, steps=600))
    assert made.losses[-1] < 0.2 * made.losses[0]
    errors = {"all": 0.0, "mean": 0.0, "merge": 0.0}
    for i in range(40, 48):
        text = f"task {i}"
        for mode in ("mean", "merge"):
            vector = library.schema.flatten(made.generate(embedding, text, mode=mode))
            errors[mode] += (vector - truth[i]).square().sum().item()
        errors["all"] += (library.means.mean(0) - truth[i]).square().sum().item()
    assert errors["mean"] < errors["all"]
    assert errors["merge"] < errors["all"]
    draws = torch.stack([library.schema.flatten(made.generate(embedding, "task 41", seed=seed)) for seed in range(5)])
    assert (draws.std(0) > 0).all()


@pytest.fixture(scope="module")
def generator():
    library = build_library([expert(name, 10 * i) for i, name in enumerate("abcdef")], encode)
    return fit_sg_lora(library, SgLoraConfig(latent=2, hidden=8, steps=3))


def test_same_seed_same_adapter(generator):
    def flat(**options):
        return generator.library.schema.flatten(generator.generate(encode, "a red a", **options))

    assert torch.equal(flat(seed=1), flat(seed=1))
    assert not torch.equal(flat(seed=1), flat(seed=2))
    assert torch.equal(flat(mode="mean", seed=1), flat(mode="mean", seed=2))
    again = fit_sg_lora(generator.library, generator.config)
    assert again.losses == generator.losses


def test_training_leaves_experts_encoder_and_global_generator_alone(generator):
    weight = torch.eye(4, requires_grad=True)
    before, rng = generator.library.means.clone(), torch.get_rng_state()
    fit_sg_lora(generator.library, SgLoraConfig(latent=2, hidden=8, steps=2))
    generator.generate(lambda text: weight @ encode(text), "a b")
    assert torch.equal(generator.library.means, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert weight.grad is None
    assert not any(parameter.requires_grad for parameter in generator.network.parameters())


def test_what_is_generated_loads_into_peft(generator):
    model = get_peft_model(nn.ModuleDict({"lin": nn.Linear(5, 6)}), generator.lora_config())
    made = generator.generate(encode, "a b")
    result = set_peft_model_state_dict(model, made)
    assert not result.unexpected_keys
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[name], made[name]) for name in made)


def two_layers(seed):
    """A wide and a narrow layer."""
    wide, narrow = state(seed), state(seed + 1)
    return {f"wide.{name}": wide[name] for name in NAMES} | {f"narrow.{name}": narrow[name][:, :2] for name in NAMES}


def test_a_chunk_for_each_layer():
    before = two_layers(0)
    schema = LoraSchema.of(before)
    chunks, vector = Chunks.of(schema, "layer"), schema.flatten(before)
    rows = chunks.split(vector)
    assert rows.shape == (2, 22)  # narrow: 2 x 2 and 6 x 2 numbers and 6 of padding
    narrow = [before[f"narrow.{name}"].flatten() for name in NAMES]
    assert torch.equal(rows[0], torch.cat([*narrow, torch.zeros(6)]))
    assert torch.equal(chunks.join(rows + ~chunks.counted), vector)
    assert torch.equal(Chunks.of(schema, "none").split(vector), vector[None])


def test_chunks_share_networks_that_know_the_layer():
    experts = [expert(name, 0, checkpoints=[two_layers(10 * i), two_layers(10 * i + 5)]) for i, name in enumerate("abcd")]
    library = build_library(experts, encode)
    options = {"latent": 2, "hidden": 32, "steps": 60, "learning_rate": 1e-2, "top_k": 2}
    whole, chunked = (SgLoraConfig(**options, chunk=chunk) for chunk in ("none", "layer"))
    sizes = [sum(p.numel() for p in config.network(library.schema).parameters()) for config in (whole, chunked)]
    assert sizes[1] < sizes[0]
    made = fit_sg_lora(library, chunked)
    assert made.losses[-1] < 0.85 * made.losses[0]
    found = made.generate(encode, "a b", mode="mean")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in two_layers(0).items()}
    rows = torch.randn(1, 44, generator=gen(1)).expand(2, -1)  # the same condition for both layers
    prior = made.network.prior_of(rows)
    assert not torch.equal(prior.mean[0], prior.mean[1])


def test_what_stands_in_the_padding_costs_nothing():
    torch.manual_seed(0)
    network = SemanticCvae(5, latent=3, hidden=8, layers=2)
    x, condition = torch.randn(4, 2, 5, generator=gen(0)), torch.randn(4, 2, 10, generator=gen(1))
    counted = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    q, p = network.encode(x, condition), network.prior_of(condition)
    error = (x - network.decode(q.sample(gen(2)), condition)).square() * counted
    assert_close(network.loss(x, condition, gen(2), 1.0, counted), error.sum(2) + kl_divergence(q, p))


def test_the_fingerprint_is_of_names_and_numbers():
    assert fingerprint(state(0)) == fingerprint(dict(reversed(state(0).items()))) != fingerprint(state(1))
    known = build_library([expert("a", 0, start=fingerprint(state(0)))], encode)
    assert known.start == fingerprint(state(0))


def test_variances_may_be_given():
    given = {name: torch.full_like(tensor, 0.25) for name, tensor in state(0).items()}
    library = build_library([expert("a", 0, count=1, variances=given)], encode)
    assert (library.variances == 0.25).all()
    with pytest.raises(ValueError, match=r"variances of a must have the tensors of its checkpoints, got others"):
        build_library([expert("a", 0, variances={NAMES[0]: given[NAMES[0]]})], encode)
    with pytest.raises(ValueError, match=r"variances of a must be finite and not negative, got -1 at least"):
        build_library([expert("a", 0, variances=given | {NAMES[1]: -torch.ones(6, 2)})], encode)
    with pytest.raises(ValueError, match=r"variances of a must not be given with canonicalize=True"):
        build_library([expert("a", 0, variances=given)], encode, canonicalize=True)


def test_canonical_factors_keep_the_product_and_forget_the_gauge():
    before = state(4)
    turn = torch.randn(2, 2, generator=gen(5))
    turned = {NAMES[0]: torch.linalg.inv(turn) @ before[NAMES[0]], NAMES[1]: before[NAMES[1]] @ turn}
    after, other = canonical(before), canonical(turned)
    assert_close(after[NAMES[1]] @ after[NAMES[0]], before[NAMES[1]] @ before[NAMES[0]], atol=1e-5, rtol=1e-4)
    for name in NAMES:
        assert_close(other[name], after[name], atol=1e-4, rtol=1e-3)
        assert after[name].shape == before[name].shape
    wide = {NAMES[0]: torch.randn(4, 3, generator=gen(6)), NAMES[1]: torch.randn(3, 4, generator=gen(7))}
    assert_close(canonical(wide)[NAMES[1]] @ canonical(wide)[NAMES[0]], wide[NAMES[1]] @ wide[NAMES[0]], atol=1e-5, rtol=1e-4)
    foreign = [expert("a", 0, start="x"), expert("b", 10, start="y")]
    assert_close(build_library(foreign, encode, canonicalize=True).samples[0][0], LoraSchema.of(after).flatten(canonical(state(0))))


NAN = {NAMES[0]: torch.full((2, 5), torch.nan), NAMES[1]: torch.zeros(6, 2)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config": CONFIG | {"r": 4}}, "must share rank, alpha and targets, got b unlike a"),
        ({"config": CONFIG | {"lora_alpha": 8}}, "must share rank, alpha and targets, got b unlike a"),
        ({"config": CONFIG | {"base_model_name_or_path": "other"}}, "must share rank, alpha and targets, got b unlike a"),
        ({"checkpoints": [state(0) | {"classifier.weight": torch.ones(6)}]}, "must hold LoRA factors alone, got classifier"),
        ({"start": "other"}, "must share their start, got b unlike a"),
        ({"description": " "}, "must be described, got an empty description of b"),
        ({"checkpoints": []}, "must have checkpoints, got none in b"),
        ({"checkpoints": [NAN, NAN]}, "must be finite, got NaN or infinity in b"),
        ({"checkpoints": [{NAMES[0]: torch.zeros(2, 5)}]}, "must have the same tensors, got b unlike a"),
        (
            {"checkpoints": [state(0) | {"x.lora_magnitude_vector": torch.ones(6)}]},
            "must hold LoRA factors alone, got x.lora_magnitude",
        ),
        (
            {"checkpoints": [state(0) | {NAMES[0]: torch.zeros(2, 5).half()}]},
            "must be of one dtype, got torch.float16, torch.float32",
        ),
    ],
)
def test_experts_that_do_not_go_together(changes, match):
    with pytest.raises(ValueError, match=match):
        build_library([expert("a", 0), dataclasses.replace(expert("b", 10), **changes)], encode)


def test_other_bad_input(library):
    with pytest.raises(ValueError, match="experts must not be empty"):
        build_library([], encode)
    with pytest.raises(ValueError, match="must have checkpoints, got none in a"):
        build_library([expert("a", 0, checkpoints=[])], encode)
    with pytest.raises(ValueError, match="encode must give vectors of one size"):
        build_library([expert("a", 0), expert("bb", 10)], lambda text: torch.ones(len(text)))
    with pytest.raises(ValueError, match=r"encode must give a finite vector other than 0, got a tensor of shape \(1, 4\)"):
        build_library([expert("a", 0)], lambda text: torch.ones(1, 4))
    with pytest.warns(UserWarning, match="b has one checkpoint, so its variance is taken as 0"):
        alone = build_library([expert("b", 0, count=1)], encode)
    assert not alone.variances.any()
    with pytest.raises(ValueError, match=r"fit_sg_lora\.library must be in \[2, inf\), got 1"):
        fit_sg_lora(alone)
    with pytest.raises(ValueError, match=r"aggregate\.tau must be in \(0, inf\), got 0\.0"):
        aggregate(library, torch.ones(4), tau=0.0)
    with pytest.raises(ValueError, match=r"aggregate\.top_k must be in \[1"):
        aggregate(library, torch.ones(4), top_k=0)
    with pytest.raises(ValueError, match=r"embedding must have 4 numbers as the library's, got \(3,\)"):
        aggregate(library, torch.ones(3))
    with pytest.raises(ValueError, match="an expert besides the one left out"):
        aggregate(alone, torch.ones(4), leave_out=0)
    with pytest.warns(UserWarning, match="top_k is 9, but only 6 experts are there"):
        aggregate(library, library.embeddings[0], top_k=9)
    with pytest.warns(UserWarning, match="No related expert: the nearest, "):
        aggregate(library, library.embeddings[0], floor=1.1)


def test_bad_options_and_requests(generator):
    for name in ("top_k", "latent", "hidden", "steps", "batch", "tau", "learning_rate"):
        with pytest.raises(ValueError, match=rf"SgLoraConfig\.{name} must be in"):
            SgLoraConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"SgLoraConfig\.kl_weight must be in \[0"):
        SgLoraConfig(kl_weight=-1.0)
    with pytest.raises(ValueError, match=r"description must not be empty"):
        generator.generate(encode, "")
    with pytest.warns(UserWarning, match=r"No related expert"):
        generator.generate(lambda text: -generator.library.embeddings.mean(0), "far away")
    assert isinstance(generator.lora_config(), LoraConfig)
