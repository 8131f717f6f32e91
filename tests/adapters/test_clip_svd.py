"""CLIP-SVD: truncation, weight decay, default targets, what the diagonal can and cannot reach."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from valign.adapters import ClipSvdConfig, singular_changes
from valign.adapters.clip_svd import head_changes
from valign.adapters.tuner_layer import tuner_layers


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(weight, **options):
    torch.manual_seed(0)
    linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = get_peft_model(nn.ModuleDict({"lin": linear}), ClipSvdConfig(target_modules=["lin"], **options))
    return model, model.base_model.model["lin"]


@pytest.mark.parametrize(
    ("options", "rank"),
    [({}, 10), ({"round_to": 4}, 8), ({"ratio": 0.5}, 5), ({"ratio": 0.5, "round_to": 4}, 4), ({"ratio": 0.01}, 1)],
)
def test_what_is_kept(options, rank):
    """floor(floor(10 ratio) / round_to) round_to, at least 1; the rest of the spectrum is dropped, as in the released code."""
    weight = random(12, 10)
    _, layer = layer_of(weight, **options)
    assert len(layer.vtune_values["default"]) == rank
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert_close(weight + layer.get_delta_weight("default"), u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])


def test_the_formula_for_any_values():
    weight, values = random(6, 5), random(3, seed=1)
    _, layer = layer_of(weight, ratio=0.6)
    with torch.no_grad():
        layer.vtune_values["default"].copy_(values)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    merged = weight + layer.get_delta_weight("default")
    assert_close(merged, u[:, :3] @ torch.diag(values) @ vh[:3])
    assert_close(torch.linalg.svdvals(merged)[:3], values.abs().sort(descending=True).values)
    inside = u.T @ merged @ vh.T
    assert_close(inside, torch.diag(inside.diagonal()), atol=1e-12, rtol=0)


def test_values_times_c_are_the_layer_times_c():
    weight, x = random(6, 5), random(3, 5, seed=1)
    _, layer = layer_of(weight)
    linear = layer(x) - layer.base_layer.bias
    with torch.no_grad():
        layer.vtune_values["default"].mul_(0.3)
    assert_close(layer(x) - layer.base_layer.bias, 0.3 * linear)


@pytest.mark.parametrize("decay_towards", ["zero", "init"])
def test_weight_decay_pulls_to_zero_or_to_the_start(decay_towards):
    model, layer = layer_of(random(6, 5), decay_towards=decay_towards)
    start = layer.vtune_start["default"].clone()
    parameter = layer.vtune_values["default"]
    with torch.no_grad():
        parameter.add_(0.5)  # s = S + 0.5
    optimizer = torch.optim.SGD([parameter], lr=0.1, weight_decay=0.2)
    for _ in range(10):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    left = (1 - 0.1 * 0.2) ** 10
    expected = (start + 0.5) * left if decay_towards == "zero" else start + 0.5 * left
    assert_close(layer.singular_values("default"), expected)
    assert_close(singular_changes(model)["base_model.model.lin"], (expected - start) / start)


def test_both_parameters_have_the_same_gradient():
    gradients = []
    for decay_towards in ("zero", "init"):
        _, layer = layer_of(random(6, 5), decay_towards=decay_towards)
        layer(random(3, 5, seed=1)).square().sum().backward()
        gradients.append(layer.vtune_values["default"].grad)
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_gradient_is_the_diagonal_of_the_weight_gradient_in_singular_vectors(ratio):
    weight, x, pull = random(6, 5), random(3, 5, seed=1), random(3, 6, seed=2)
    _, layer = layer_of(weight, ratio=ratio)
    (layer(x) * pull).sum().backward()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    found = layer.vtune_values["default"].grad
    assert_close(found, (u.T @ (pull.T @ x) @ vh.T).diagonal()[: len(found)])  # G = pull^T x


def test_order_of_the_triplets_does_not_matter():
    _, layer = layer_of(random(6, 5))
    with torch.no_grad():
        layer.vtune_values["default"].add_(random(5, seed=1))
    before, order = layer.get_delta_weight("default"), torch.tensor([3, 0, 4, 1, 2])
    for name, turned in (("vtune_down", order), ("vtune_up", (slice(None), order)), ("vtune_start", order)):
        getattr(layer, name)["default"] = getattr(layer, name)["default"][turned]
    layer.vtune_values["default"].data = layer.vtune_values["default"].data[order]
    assert_close(layer.get_delta_weight("default"), before)


def clip():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(hidden_size=8, intermediate_size=32, vocab_size=20, **sizes)
    vision = CLIPVisionConfig(hidden_size=12, intermediate_size=48, image_size=8, patch_size=4, **sizes)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def test_clip_has_default_targets():
    """Six linears in every block of both encoders: 12 (6 * 768) + 12 (6 * 512) = 92,160 numbers for ViT-B/16."""
    model = get_peft_model(clip(), ClipSvdConfig())
    assert len(list(tuner_layers(model))) == 2 * 2 * 6
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 2 * 6 * 8 + 2 * 6 * 12


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"layers_to_transform": [1]}, 2 * 6),  # the top blocks
        ({"exclude_modules": r".*text_model.*"}, 2 * 6),  # the image encoder
        ({"target_modules": ["v_proj", "out_proj"]}, 2 * 2 * 2),
        ({"target_modules": r".*vision_model.*\.1\..*fc[12]"}, 2),
    ],
)
def test_blocks_encoders_and_kinds_of_linear_are_chosen_by_name(options, count):
    assert len(list(tuner_layers(get_peft_model(clip(), ClipSvdConfig(**options))))) == count


def test_changes_by_head_are_norms_of_blocks():
    delta = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    assert head_changes(delta, 2, side="rows").tolist() == [5.0, 1.0]  # rows 0 and 1, rows 2 and 3
    assert_close(head_changes(delta, 2, side="columns"), torch.tensor([3.0, 17.0**0.5]))
    with pytest.raises(ValueError, match=r"head_changes\.heads must divide the 4 rows, got 3\. Take it from the model's config"):
        head_changes(delta, 3, side="rows")


def fit(layer, x, y, steps=500):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - layer.base_layer.bias - y).square().mean().backward()
        optimizer.step()


def test_few_noisy_examples_are_enough_for_a_change_of_the_values_and_too_few_for_a_lora():
    """24 x 24, 8 samples: measured 0.001 for the values against 0.94 for rank-2 LoRA."""
    from peft import LoraConfig

    weight = random(24, 24) / 24**0.5
    u, s, vh = torch.linalg.svd(weight)
    target = u @ torch.diag(s * (1 + 0.3 * random(24, seed=1))) @ vh
    x, noise, test = random(8, 24, seed=2), 0.01 * random(8, 24, seed=3), random(200, 24, seed=4)
    _, values = layer_of(weight)
    linear = nn.Linear(24, 24).double()
    linear.weight.data.copy_(weight)
    torch.manual_seed(0)
    lora = get_peft_model(nn.ModuleDict({"lin": linear}), LoraConfig(target_modules=["lin"], r=2)).base_model.model["lin"]
    errors = []
    for layer in (values, lora):
        fit(layer, x, x @ target.T + noise)
        error = (layer(test) - layer.base_layer.bias - test @ target.T).square().sum()
        errors.append(error / (test @ (target - weight).T).square().sum())
    assert errors[0] < 0.05
    assert errors[1] > 0.5


def test_what_is_off_the_diagonal_cannot_be_fitted():
    weight, change = random(6, 6), random(6, 6, seed=1)
    _, layer = layer_of(weight)
    u, _, vh = torch.linalg.svd(weight)
    inside = u.T @ change @ vh.T
    x = torch.eye(6, dtype=torch.float64)
    fit(layer, x, (weight + change).T, steps=3000)
    left = (layer.get_delta_weight("default") - change).norm()
    assert_close(left, (inside - torch.diag(inside.diagonal())).norm(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": 0.0}, r"ClipSvdConfig\.ratio must be in \(0, 1\], got 0\.0"),
        ({"ratio": 1.1}, r"ClipSvdConfig\.ratio must be in \(0, 1\]"),
        ({"round_to": 0}, r"ClipSvdConfig\.round_to must be in \[1, inf\), got 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ClipSvdConfig(**options)


def test_an_unknown_aim_of_decay():
    config = ClipSvdConfig()
    config.decay_towards = "one"
    with pytest.raises(ValueError, match=r"ClipSvdConfig\.decay_towards must be one of zero, init"):
        config.__post_init__()
