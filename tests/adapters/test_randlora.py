"""RandLoRA: the paper's scale and counts on peft's tuner, budgets, weights, what peft would silently accept."""

import math

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from tuner_models import UNET_TARGETS, ask, build, shake

from valign.adapters import randlora_config, set_randlora_scale
from valign.adapters.randlora import paper_alpha, rank_like_lora, trained_numbers


def net(*shapes):
    torch.manual_seed(0)
    return nn.ModuleDict({f"lin{i}": nn.Linear(fan_in, fan_out) for i, (fan_out, fan_in) in enumerate(shapes)})


def test_the_paper_s_scale():
    """alpha / r = 2 / sqrt(n): d = 896, r = 6 is n = 150 in Qwen2-0.5B's sizes."""
    assert paper_alpha(896, 6) / 6 == pytest.approx(2 / math.sqrt(150))
    config = randlora_config(net((12, 8), (8, 8), (12, 8)), target_modules=["lin0", "lin1", "lin2"], r=4)
    assert isinstance(config, RandLoraConfig)
    assert config.randlora_alpha == pytest.approx(2 * 4 / math.sqrt(2))
    assert randlora_config(net((40, 40)), target_modules=["lin0"], randlora_alpha=5).randlora_alpha == 5
    assert randlora_config(net((40, 40)), target_modules=["lin0"]).r == 32


@pytest.mark.parametrize(
    ("d", "r", "count"),
    [(768, 4, 148224), (768, 8, 74496), (768, 32, 19200), (1024, 8, 132096), (1024, 32, 33792), (4096, 4, 4198400)],
)
def test_counts(d, r, count):
    """n (r + d), ceil(d / r) bases: the table of published sizes."""
    assert trained_numbers(d, r) == count


@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (8, 12), (7, 9)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_peft_trains_that_many(shape, r):
    model = net(shape)
    model = get_peft_model(model, randlora_config(model, target_modules=["lin0"], r=min(r, min(shape))))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == trained_numbers(min(shape), min(r, min(shape)))


@pytest.mark.parametrize(("longer", "shorter", "q"), [(768, 768, 32), (3072, 768, 16), (4096, 4096, 64)])
def test_a_budget_like_a_lora_s(longer, shorter, q):
    r = rank_like_lora(longer, shorter, q)
    assert trained_numbers(shorter, r) == pytest.approx(q * (longer + shorter), rel=0.1)
    assert rank_like_lora(8, 8, 100) == 1
    config = randlora_config(net((12, 8)), target_modules=["lin0"], like_lora=2)
    assert config.r == round(64 / (2 * 20 - 8))


def trained(shape=(9, 7), r=2, **options):
    model = net(shape)
    model = get_peft_model(model, randlora_config(model, target_modules=["lin0"], r=r, **options))
    layer = model.base_model.model["lin0"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.randlora_lambda["default"].copy_(torch.randn(layer.randlora_lambda["default"].shape, generator=generator))
        layer.randlora_gamma["default"].copy_(torch.randn(layer.randlora_gamma["default"].shape, generator=generator))
    return model, layer


def test_the_start_lets_the_first_gradient_reach_lambda_alone():
    model = net((9, 7))
    model = get_peft_model(model, randlora_config(model, target_modules=["lin0"], r=3))
    layer = model.base_model.model["lin0"]
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    assert torch.equal(lam, torch.zeros(3, 3))
    assert torch.equal(gamma, torch.full((3, 7), 1 / 7))  # 1 / max(n, d)
    layer(torch.ones(2, 7)).square().sum().backward()
    assert lam.grad.abs().min() > 0
    assert torch.equal(gamma.grad, torch.zeros(3, 7))


@pytest.mark.parametrize(
    ("options", "zeros"),  # entries -1, 0, 1 with probabilities 1 / 2s, 1 - 1 / s, 1 / 2s; s = 3 or sqrt(d)
    [({}, 0.0), ({"sparse": True}, 1 - 1 / 3), ({"very_sparse": True}, 1 - 1 / 8)],
)
def test_the_bases_have_unit_spread(options, zeros):
    _, layer = trained((80, 64), r=8, **options)
    for basis in (layer.randlora_A["default"].float(), layer.randlora_B["default"].float()):
        assert basis.std() == pytest.approx(1, rel=0.01)
        assert (basis == 0).float().mean() == pytest.approx(zeros, abs=0.06)
        if zeros:
            assert len(basis.unique()) == 3


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_a_file_without_bases_draws_them_again_from_its_key_and_says_so(tmp_path):
    model, layer = trained(save_projection=False, projection_prng_key=5)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="restored using the PRNG key"):  # on every load: another machine may draw others
        loaded = PeftModel.from_pretrained(net((9, 7)), tmp_path)
    again = loaded.base_model.model["lin0"]
    assert torch.equal(again.randlora_B["default"], layer.randlora_B["default"])
    assert torch.equal(again.get_delta_weight("default"), layer.get_delta_weight("default"))
    _, other = trained(save_projection=False, projection_prng_key=6)
    assert not torch.equal(other.randlora_B["default"], layer.randlora_B["default"])


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)])
def test_the_change_has_full_rank(shape):
    _, layer = trained(shape)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default").double()) == min(shape)


def test_the_change_is_bilinear_and_its_gradient_autograd_s():
    """peft's backward pass is its own: compare it with autograd of the same product written out."""
    _, layer = trained()
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    once = layer.get_delta_weight("default").detach()
    with torch.no_grad():
        lam.mul_(3)
    assert_close(layer.get_delta_weight("default").detach(), 3 * once)
    with torch.no_grad():
        gamma.mul_(0.5)
    assert_close(layer.get_delta_weight("default").detach(), 1.5 * once)
    pull = torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((layer.get_delta_weight("default") * pull).sum(), (lam, gamma))
    a, b = layer.randlora_A["default"][:, : layer.num_bases, :7], layer.randlora_B["default"][:9, : layer.num_bases]
    plain = b.flatten(1) @ (lam[:, :, None] * a * gamma[None]).flatten(end_dim=1) * layer.scaling["default"]
    assert_close(plain.detach(), layer.get_delta_weight("default").detach())
    for ours, autograd in zip(grads, torch.autograd.grad((plain * pull).sum(), (lam, gamma)), strict=True):
        assert_close(ours, autograd, atol=1e-5, rtol=1e-4)


def test_peft_pairs_the_bases_in_another_order_than_the_formula():
    """Alike in distribution, but sum_j B_j diag(lambda_j) A diag(gamma_j) of the same tensors is another matrix."""
    _, layer = trained()
    lam, gamma = layer.randlora_lambda["default"].detach(), layer.randlora_gamma["default"].detach()
    a, b = layer.randlora_A["default"][:, 0].float(), layer.randlora_B["default"].float()
    literal = layer.scaling["default"] * sum(b[:, j] @ torch.diag(lam[:, j]) @ a @ torch.diag(gamma[j]) for j in range(4))
    delta = layer.get_delta_weight("default").detach()
    assert literal.shape == delta.shape
    assert (literal - delta).norm() > 0.1 * delta.norm()


def test_an_orthogonal_target_is_fitted_better_than_by_any_lora_of_equal_size():
    """d = 30, r = 10, 120 numbers; measured 0.0271, while a LoRA of 120 numbers (rank 2) cannot go below 28/30/30 = 0.0311."""
    torch.manual_seed(0)
    target, _ = torch.linalg.qr(torch.randn(30, 30))
    model = net((30, 30))
    config = randlora_config(model, target_modules=["lin0"], r=10, randlora_alpha=200)
    model = get_peft_model(model, config)
    layer = model.base_model.model["lin0"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = (layer.get_delta_weight("default") - target).square().mean()
        loss.backward()
        optimizer.step()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 120
    assert loss < 28 / 30 / 30


def test_weights_like_diffusers_set_adapters():
    model, layer = trained()
    full = layer.get_delta_weight("default").detach()
    for weight in (0.5, 0.25, 0.0, 1.0):
        set_randlora_scale(model, "default", weight)
        assert_close(layer.get_delta_weight("default").detach(), weight * full)
    with pytest.raises(ValueError, match="must have a RandLoRA adapter called 'other'"):
        set_randlora_scale(model, "other", 1.0)
    with pytest.raises(ValueError, match=r"set_randlora_scale\.weight must be in"):
        set_randlora_scale(model, "default", math.inf)


def test_on_a_diffusers_unet():
    unet = build("unet")
    base = ask(unet)
    unet.add_adapter(randlora_config(unet, target_modules=UNET_TARGETS, r=4), adapter_name="expert")
    assert torch.equal(ask(unet), base)
    shake(unet, "expert")
    full = ask(unet)
    with pytest.raises(AttributeError, match="set_scale"):  # peft's layer lacks it, hence `set_randlora_scale`
        unet.set_adapters(["expert"], weights=[0.5])
    set_randlora_scale(unet, "expert", 0.0)
    assert torch.equal(ask(unet), base)
    set_randlora_scale(unet, "expert", 1.0)
    unet.fuse_lora()
    assert_close(ask(unet), full, atol=1e-4, rtol=1e-4)
    unet.unfuse_lora()
    assert_close(ask(unet), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, r"randlora_config\.r must be in \[1, inf\), got 0"),
        ({"like_lora": 0}, r"rank_like_lora\.lora_rank must be in \[1, inf\), got 0"),
        ({"r": 2, "like_lora": 2}, "must have r or like_lora, got both"),
        ({"sparse": True, "very_sparse": True}, "must have sparse or very_sparse, got both"),
        ({"target_modules": ["nowhere"]}, r"must name modules of the model, got \['nowhere'\]\. It can name lin0, lin1\."),
        ({"target_modules": ["conv"]}, r"randlora_config\.target_modules must name nn\.Linear .* got conv, a Conv2d"),
    ],
)
def test_bad_input(options, match):
    model = net((8, 8), (8, 6))
    model["conv"] = nn.Conv2d(2, 2, 3)
    with pytest.raises(ValueError, match=match):
        randlora_config(model, **({"target_modules": ["lin0"]} | options))


def test_adapters_of_one_model_share_their_bases():
    model, _ = trained()
    for options in ({"r": 3}, {"r": 2, "projection_prng_key": 4}, {"r": 2, "save_projection": False}):
        field = list(options)[-1]
        with pytest.raises(ValueError, match=rf"randlora_config\.{field} must be .*, as adapter 'default' of this model has it"):
            randlora_config(model, target_modules=["lin0"], **options)
    assert randlora_config(model, target_modules=["lin0"], r=2).r == 2


def test_one_basis_warns():
    with pytest.warns(UserWarning, match="r is 9, above the smaller side 8 of most weights"):
        randlora_config(net((8, 8)), target_modules=["lin0"], r=9)
