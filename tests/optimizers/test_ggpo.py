"""GGPO: the standard deviation recomputed densely, the noise's law, evaluation untouched, checkpointing, exact resume."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from valign.checks import UserError
from valign.optimizers import GGPO
from valign.optimizers.ggpo import noise_std
from valign.optimizers.perturbation import row_norms


def network(seed=0, rank=2, alpha=6, rows=6, columns=5, layer=None):
    torch.manual_seed(seed)
    net = nn.ModuleDict({"a": layer or nn.Linear(columns, rows)})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["a"], init_lora_weights=True)
    return get_peft_model(net, config)


def layer_of(model):
    return model.base_model.model["a"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(columns=5, rows=6, count=7):
    return torch.randn(count, columns, generator=generator(3)), torch.randn(count, rows, generator=generator(4))


def start(model=None, steps=0, **options):
    model = model or network()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ggpo = GGPO(model, optimizer, **{"generator": generator(), **options})
    train(model, optimizer, steps)
    return model, optimizer, ggpo


def train(model, optimizer, steps):
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer_of(model)(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_row_norms_of_a_product():
    left, right = torch.randn(6, 3, generator=generator(1)), torch.randn(3, 5, generator=generator(2))
    assert_close(row_norms(left, right), (left @ right).norm(dim=1))


@pytest.mark.parametrize(("norm_dim", "size"), [("out", 6), ("in", 5)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_deviation_is_the_formula_of_the_step_before(norm_dim, size, scaled):
    seen = {}
    model = network()
    layer = layer_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            {n: (p.detach().double().clone(), p.grad.double()) for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    ggpo = GGPO(model, optimizer, generator=generator(), sigma=0.3, beta=0.2, norm_dim=norm_dim, scaled=scaled)
    train(model, optimizer, 3)
    a, grad_a = next(v for n, v in seen.items() if "lora_A" in n)
    b, grad_b = next(v for n, v in seen.items() if "lora_B" in n)
    weight, s = layer.base_layer.weight.double(), 3.0
    wn = (weight.norm(dim=1).mean() ** 2 + ((s if scaled else 1) * b @ a).norm(dim=1) ** 2).sqrt()
    gn = (s * (b @ grad_a + grad_b @ a)).norm(dim=1)
    assert not torch.equal(b.float(), layer.lora_B["default"].weight)  # the weights have moved since
    assert_close(ggpo.std["a"].double(), (0.3 * wn + 0.2 * gn**2) / size**0.5, rtol=1e-4, atol=1e-7)
    assert (wn >= weight.norm(dim=1).mean()).all()


def test_float64_stays_float64():
    model = network().double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ggpo = GGPO(model, optimizer, generator=generator(), sigma=0.3, beta=0.2)
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.grad, b.grad = torch.full_like(a, 0.1), torch.full_like(b, -0.2)
    ggpo.before_step()
    wn = (layer.base_layer.weight.norm(dim=1).mean() ** 2 + (b @ a).norm(dim=1) ** 2).sqrt()
    gn = (3.0 * (b @ a.grad + b.grad @ a)).norm(dim=1)
    assert_close(ggpo.std["a"], (0.3 * wn + 0.2 * gn**2) / 6**0.5, rtol=1e-12, atol=0)


def test_the_noise_lets_gradients_through_to_its_input_alone():
    model, _, ggpo = start(steps=1, sigma=0.5)
    x = torch.randn(1, 5, generator=generator(5), requires_grad=True)
    shift = ggpo.shift("a", x)
    (gradient,) = torch.autograd.grad(shift.sum(), x)
    assert_close((gradient * x).sum(), shift.sum())  # linear in x, so its gradient gives it back
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(g is not None for g in torch.autograd.grad(ggpo.shift("a", x).sum(), trained, allow_unused=True))


def test_at_the_start_only_the_base_and_the_gradient_of_b_count():
    found = noise_std(2.0, torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), sigma=0.5, beta=0.1, size=4)
    assert_close(found, torch.tensor([0.5, 0.55, 0.7]))  # (0.5 * 2 + 0.1 * g^2) / 2
    model, _, ggpo = start(steps=1)
    assert not (layer_of(model).lora_A["default"].weight.grad).any()  # B was zero
    assert (ggpo.std["a"] > 0).all()


@pytest.mark.parametrize("noise", ["weight", "output"])
def test_the_noise_has_its_variance(noise):
    model, _, ggpo = start(steps=1, sigma=0.5, noise=noise)
    x = torch.randn(1, 5, generator=generator(5))
    quiet = model.eval() and layer_of(model)(x)
    model.train()
    with torch.no_grad():
        draws = torch.stack([layer_of(model)(x) - quiet for _ in range(6000)])
    expected = ggpo.std["a"] ** 2 * x.square().sum()
    assert_close(draws.square().mean(0)[0], expected, rtol=0.08, atol=0)
    assert draws.mean(0).abs().max() < 4 * expected.max().sqrt() / 6000**0.5


def test_squared_error_grows_by_the_closed_form():
    model, _, ggpo = start(steps=1, sigma=0.5)
    x, y = data(count=1)
    with torch.no_grad():
        noisy = torch.stack([(layer_of(model)(x) - y).square().sum() for _ in range(6000)]).mean()
        model.eval()
        quiet = (layer_of(model)(x) - y).square().sum()
    assert_close(noisy - quiet, ggpo.std["a"].square().sum() * x.square().sum(), rtol=0.1, atol=0)


def test_no_noise_at_evaluation_off_merged_or_before_the_first_step():
    x, _ = data()
    model, optimizer, _ = start(sigma=1.0)
    plain = copy.deepcopy(layer_of(network())).train()
    assert torch.equal(layer_of(model)(x), plain(x))  # before the first step
    train(model, optimizer, 1)
    model.eval()
    assert torch.equal(layer_of(model)(x), layer_of(model)(x))
    model.train()
    assert not torch.equal(layer_of(model)(x), layer_of(model)(x))
    with model.disable_adapter():
        assert torch.equal(layer_of(model)(x), layer_of(model).base_layer(x))
    model.merge_adapter()
    assert torch.equal(layer_of(model)(x), layer_of(model).base_layer(x))


def test_zero_sigma_and_beta_are_plain_lora_bit_for_bit():
    model, optimizer, _ = start(sigma=0.0, beta=0.0)
    plain = network().train()
    other = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    assert train(model, optimizer, 4) == train(plain, other, 4)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_removing_it_leaves_no_trace():
    model, _, ggpo = start(steps=1, sigma=1.0)
    ggpo.remove()
    x, _ = data()
    assert torch.equal(layer_of(model)(x), layer_of(model)(x))
    assert not layer_of(model)._forward_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_noise(reentrant):
    gradients = []
    for use in (False, True):
        model, optimizer, _ = start(steps=1, sigma=0.5)
        optimizer.zero_grad()
        x, y = data()
        x = x.requires_grad_()
        for _ in range(2):  # two micro-batches, each with noise of its own
            layer = layer_of(model)
            out = checkpoint(layer, x, use_reentrant=reentrant) if use else layer(x)
            (out - y).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_resuming_gives_the_same_losses():
    model, optimizer, _ = start(sigma=0.5)
    straight = train(model, optimizer, 6)
    model, optimizer, ggpo = start(sigma=0.5)
    first = train(model, optimizer, 3)
    again, other, second = start(network(seed=9), sigma=0.5, generator=generator(77))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(ggpo.state_dict()))
    assert first + train(again, other, 3) == straight


def test_the_estimate_takes_random_rows():
    tall = network(rows=3000, columns=2, rank=1)
    weight = layer_of(tall).base_layer.weight
    ggpo = start(tall, row_norms="estimate")[2]
    rows = torch.randperm(3000, generator=generator())[:1000]
    assert ggpo.base_norms["a"] == pytest.approx(weight[rows].norm(dim=1).mean().item(), rel=1e-5)
    assert ggpo.base_norms["a"] != pytest.approx(weight.norm(dim=1).mean().item(), rel=1e-7)


def test_noise_trades_training_error_for_test_error():
    """LoRA r = 16 on a 16 x 32 map, 40 samples with label noise 1, Adam 1e-2, 800 steps."""
    errors = {}
    for sigma, beta in ((0.0, 0.0), (0.6, 0.1)):
        torch.manual_seed(0)
        net = nn.ModuleDict({"a": nn.Linear(32, 16, bias=False)})
        model = get_peft_model(net, LoraConfig(r=16, lora_alpha=16, target_modules=["a"])).train()
        layer, g = layer_of(model), generator(1)
        truth = layer.base_layer.weight + 0.1 * torch.randn(16, 32, generator=g)
        x, new = torch.randn(40, 32, generator=g), torch.randn(500, 32, generator=g)
        y = x @ truth.T + torch.randn(40, 16, generator=g)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        GGPO(model, optimizer, sigma=sigma, beta=beta, generator=generator(2))
        for _ in range(800):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        model.eval()
        errors[sigma] = ((layer(x) - y).square().mean().item(), (layer(new) - new @ truth.T).square().mean().item())
    assert errors[0.6][0] > errors[0.0][0]
    assert errors[0.6][1] < 0.8 * errors[0.0][1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({"sigma": -0.1}, r"GGPO\.sigma must be in \[0, inf\), got -0\.1"), ({"beta": -1.0}, r"GGPO\.beta must be in \[0, inf\)")],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    def test_one_of_two_is_zero_with_a_warning(self):
        with pytest.warns(UserWarning, match="GGPO has only one of sigma and beta; the other is 0"):
            assert start(sigma=None)[2].sigma == 0

    def test_convolutions_quantized_weights_and_other_modules(self):
        with pytest.raises(ValueError, match=r"GGPO must have linear layers only, got a, a Conv2d"):
            start(network(layer=nn.Conv2d(3, 3, 3)))
        model = network()
        layer_of(model).base_layer.weight = nn.Parameter(torch.ones(6, 5, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"GGPO must read float weights, got a quantized"):
            start(model)
        ggpo = start()[2]
        with pytest.raises(UserError, match=r"GGPO: the state was saved for other modules: a, b"):
            ggpo.load_state_dict({"seed": 0, "calls": {"b": 0}, "std": {}})
