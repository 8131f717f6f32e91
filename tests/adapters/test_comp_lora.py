"""Comp-LoRA: the protected directions stay as they were, whatever is trained; the three modes; exact export; every refusal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, inputs, train, trainable, with_lora
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from valign.adapters import CompLoRA, export_lora, initialize, save_peft_lora
from valign.adapters.comp_lora import energy_directions, outside, overlap, penalty, protected, reproject
from valign.adapters.factors import lora_layers, weight_of
from valign.adapters.spectrum import Spectrum


def linear_model(rank=2, rows=8, columns=6, seed=0, **options):
    """One map ``a`` under LoRA."""
    net = nn.ModuleDict({"a": nn.Linear(columns, rows, bias=False)})
    net["a"].weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    model = with_lora(net, rank=rank, alpha=rank, targets=("a",))
    if options:
        initialize(model, "comp-lora", **options)
    return model, lora_layers(model, "default")["a"]


def fit(model, layer, steps=20, optimizer=None, after=lambda: None, extra=lambda: 0.0):
    x = torch.randn(30, layer.in_features, generator=torch.Generator().manual_seed(7))
    y = torch.randn(30, layer.out_features, generator=torch.Generator().manual_seed(8))
    optimizer = optimizer or torch.optim.Adam(trainable(model).values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        ((layer(x) - y).square().mean() + extra()).backward()
        optimizer.step()
        after()


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_the_fewest_directions_that_hold_the_energy(values, energy):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    count, share = energy_directions(s, energy), s.square().cumsum(0) / s.square().sum()
    assert share[count - 1] >= energy - 1e-9
    assert count == 1 or share[count - 2] < energy + 1e-9


@pytest.mark.parametrize(
    ("values", "energy", "count"), [([1.0, 1.0], 0.5, 1), ([2.0, 2.0, 2.0, 2.0], 0.75, 3), ([4.0, 2.0, 2.0, 0.0], 1.0, 3)]
)
def test_directions_that_hold_exactly_the_energy_are_enough(values, energy, count):
    assert energy_directions(torch.tensor(values), energy) == count


@given(st.integers(3, 8), st.integers(3, 8), st.sampled_from(["left", "right", "both"]), st.data())
def test_the_change_is_the_formula_with_explicit_projectors(rows, columns, side, data):
    """``s P_U B A P_V`` in float64, as a change of weight and token by token, for any A and B; its rank is what they leave."""
    rank, q, seed = data.draw(st.integers(1, 2)), data.draw(st.integers(0, min(rows, columns) - 2)), data.draw(st.integers(0, 99))
    net = nn.ModuleDict({"a": nn.Linear(columns, rows, dtype=torch.float64)})
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    model = with_lora(net, rank=rank, alpha=3, targets=("a",))
    initialize(model, "comp-lora", side=side, directions=q)
    layer = lora_layers(model, "default")["a"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up.data = torch.randn(up.shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weight_of(layer), full_matrices=False)
    left = torch.eye(rows, dtype=torch.float64) - (u[:, :q] @ u[:, :q].T if side != "right" else 0)
    right = torch.eye(columns, dtype=torch.float64) - (vh[:q].T @ vh[:q] if side != "left" else 0)
    expected = (3 / rank * left @ up @ down @ right).detach()
    lora = export_lora(model)["a"]
    assert_close(lora.scale * lora.up @ lora.down, expected, rtol=1e-9, atol=1e-12)
    x = torch.randn(4, columns, generator=generator, dtype=torch.float64)
    assert_close(layer(x), layer.base_layer(x) + x @ expected.T, rtol=1e-9, atol=1e-12)
    most = min(rank, rows - (q if side != "right" else 0), columns - (q if side != "left" else 0))
    assert int((torch.linalg.svdvals(expected) > 1e-9).sum()) <= most


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_training_leaves_the_protected_directions_alone(side):
    model, layer = linear_model(side=side, directions=3)
    weight, basis = weight_of(layer).clone(), protected(layer, "default")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert (basis.left.shape[1], basis.right.shape[1]) == {"left": (3, 0), "right": (0, 3), "both": (3, 3)}[side]
    fit(model, layer)
    delta = export_lora(model)["a"].delta()
    assert delta.norm() > 0.1
    if side in ("left", "both"):
        assert (u[:, :3].T @ delta).abs().max() < 1e-5
        assert overlap(delta, u[:, :3]) < 1e-5
    if side in ("right", "both"):
        assert (delta @ vh[:3].T).abs().max() < 1e-5
        assert_close(layer(vh[:3]), vh[:3] @ weight.T, rtol=0, atol=1e-5)
    if side == "both" and delta.norm() < s[2]:
        assert_close(torch.linalg.svdvals(weight + delta)[:3], s[:3])
    assert int((torch.linalg.svdvals(delta) > 1e-5).sum()) <= 2


def test_strong_triplets_survive_a_smaller_change():
    model, layer = linear_model(directions=2)
    fit(model, layer, steps=3)
    weight, delta = weight_of(layer), export_lora(model)["a"].delta()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert 0 < torch.linalg.matrix_norm(delta, 2) < s[1]
    assert_close(torch.linalg.svdvals(weight + delta)[:2], s[:2])
    assert_close((weight + delta) @ vh[:2].T, u[:, :2] * s[:2], rtol=0, atol=1e-5)
    assert_close(u[:, :2].T @ (weight + delta), s[:2, None] * vh[:2], rtol=0, atol=1e-5)


def test_gradients_are_projected_by_themselves():
    model, layer = linear_model(directions=3)
    fit(model, layer, steps=1)
    basis = protected(layer, "default")
    x = torch.randn(5, 6)
    layer(x).square().sum().backward()
    assert (layer.lora_A["default"].weight.grad @ basis.right).abs().max() < 1e-4
    assert (basis.left.T @ layer.lora_B["default"].weight.grad).abs().max() < 1e-4


def test_nothing_protected_is_plain_lora():
    model, layer = linear_model(directions=0)
    other, plain = linear_model()
    for network, one in ((model, layer), (other, plain)):
        fit(network, one, steps=4)
    for part in ("lora_A", "lora_B"):
        assert torch.equal(getattr(layer, part)["default"].weight, getattr(plain, part)["default"].weight)


def test_the_function_is_kept_at_the_start_and_the_base_always():
    model = with_lora()
    report = initialize(model, "comp-lora")
    assert torch.equal(model(inputs()), Attention()(inputs()))
    assert (report.keeps_function, report.keeps_base) == (True, True)
    assert report.trainable == sum(p.numel() for p in trainable(with_lora()).values())
    size = 12
    for name, layer in lora_layers(model, "default").items():
        s = torch.linalg.svdvals(weight_of(layer))
        count = protected(layer, "default").left.shape[1]
        assert count == min(energy_directions(s, 0.9), min(layer.out_features, size) - 3)
        assert report.roles[name] == f"both, {count} protected"


def test_export_and_merge_are_the_trained_model(tmp_path):
    model = with_lora()
    initialize(model, "comp-lora", fraction=0.5)
    train(model)
    model.eval()
    answer = model(inputs())
    exported = export_lora(model)
    assert {lora.rank for lora in exported.values()} == {3}
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", exported)))
    assert_close(again(inputs()), answer, rtol=0, atol=1e-6)
    assert not any("protect" in key for key in model.state_dict())
    assert_close(model.merge_and_unload()(inputs()), answer, rtol=0, atol=1e-6)


def test_gradient_mode_with_sgd_walks_as_the_hard_constraint_from_the_same_start():
    deltas = []
    for mode in ("hard", "gradient"):
        model, layer = linear_model(directions=2, mode=mode)
        reproject(model)  # the hard one then starts at the projected A, too
        fit(model, layer, optimizer=torch.optim.SGD(trainable(model).values(), lr=0.1))
        deltas.append(export_lora(model)["a"].delta())
    assert deltas[0].norm() > 1e-2
    assert_close(deltas[0], deltas[1], rtol=0, atol=1e-6)


def test_adam_leaves_the_subspace_and_reprojection_brings_it_back():
    left = {}
    for name in ("drifts", "held"):
        model, layer = linear_model(directions=3, mode="gradient")
        fit(model, layer, after=(lambda m=model: reproject(m)) if name == "held" else lambda: None)
        basis = protected(layer, "default")
        left[name] = overlap(export_lora(model)["a"].delta(), basis.left)
    assert left["held"] < 1e-5 < 1e-2 < left["drifts"]


def test_the_penalty_is_the_sum_of_squares_and_holds_softly():
    model, layer = linear_model(directions=3, mode="penalty")
    assert type(layer.lora_variant.get("default")).__name__ == "NoneType"
    basis, a = protected(layer, "default"), layer.lora_A["default"].weight
    assert_close(penalty(model, weight=2.0), 2 * (a @ basis.right).square().sum())  # B is zero
    fit(model, layer, steps=1)
    parts = (basis.left.T @ layer.lora_B["default"].weight, a @ basis.right)
    assert parts[0].abs().max() > 1e-3
    assert_close(penalty(model), sum(part.square().sum() for part in parts))  # weight 1
    found = {}
    for weight in (0.0, 1.0):
        model, layer = linear_model(directions=3, mode="penalty")
        fit(model, layer, extra=lambda m=model, w=weight: penalty(m, weight=w))
        found[weight] = overlap(export_lora(model)["a"].delta(), protected(layer, "default").left)
    assert found[1.0] < 0.5 * found[0.0]


def test_less_is_forgotten_and_less_is_learnt_when_the_task_lives_in_protected_directions():
    """The card's experiment: 6 strong and 18 weak singular values, old inputs in the strong ones, a rank-2 task of 12 samples."""
    errors = {name: [] for name in ("lora", "left", "both")}  # of old inputs, and of the new task on unseen inputs
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q for _ in range(2))
        s = torch.cat([torch.linspace(4, 2, 6), torch.full((18,), 0.2)])
        weight = u * s @ v.T
        old = torch.randn(200, 6, generator=generator) @ v[:, :6].T + 0.05 * torch.randn(200, 24, generator=generator)
        new = torch.randn(12, 24, generator=generator)
        shift = torch.randn(24, 2, generator=generator) @ torch.randn(2, 24, generator=generator) / 24**0.5
        unseen = torch.randn(200, 24, generator=generator)
        for side, found in errors.items():
            net = nn.ModuleDict({"a": nn.Linear(24, 24, bias=False)})
            net["a"].weight.data = weight.clone()
            model = with_lora(net, rank=2, alpha=2, targets=("a",), seed=seed)
            if side != "lora":
                initialize(model, "comp-lora", side=side, directions=6)
            layer = lora_layers(model, "default")["a"]
            optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
            for _ in range(200):
                optimizer.zero_grad()
                (layer(new) - new @ (weight + shift).T).square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                forgotten = (layer(old) - old @ weight.T).norm() / (old @ weight.T).norm()
                missed = (layer(unseen) - unseen @ (weight + shift).T).norm() / (unseen @ shift.T).norm()  # 1: nothing learnt
                found.append(torch.stack([forgotten, missed]))
    forgotten, missed = ({side: float(torch.stack(found).mean(0)[part]) for side, found in errors.items()} for part in (0, 1))
    assert forgotten["both"] < 0.3 * forgotten["lora"], forgotten
    assert forgotten["left"] < forgotten["lora"], forgotten
    assert missed["lora"] < missed["left"] < 1 < missed["both"], missed


def test_randomized_protects_nearly_the_same():
    bases = []
    for options in ({}, {"niter": 8, "generator": torch.Generator().manual_seed(0)}):
        _, layer = linear_model(directions=3, rows=20, columns=20, **options)
        bases.append(protected(layer, "default").left)
    assert_close(bases[0] @ bases[0].T, bases[1] @ bases[1].T, rtol=0, atol=1e-2)


def test_outside_is_the_projection():
    basis = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrix = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(outside(matrix.T, basis).T, (torch.eye(7, dtype=torch.float64) - basis @ basis.T) @ matrix)
    assert overlap(torch.zeros(7, 4, dtype=torch.float64), basis) == 0


@pytest.mark.parametrize("kept", [1, 3, 4, 5])
def test_the_smaller_of_the_two_bases_is_kept_and_says_what_is_protected(kept):
    _, layer = linear_model(rows=8, columns=6, rank=1, directions=kept)
    names = {name for name, _ in layer.named_buffers()}
    for side, size in (("left", 8), ("right", 6)):
        assert (f"lora_free_{side}.default" in names) == (2 * kept > size) != (f"lora_protect_{side}.default" in names)
    u, _, vh = torch.linalg.svd(weight_of(layer), full_matrices=False)
    for basis, expected in zip(protected(layer, "default"), (u[:, :kept], vh[:kept].T), strict=True):
        assert basis.shape == expected.shape
        assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-5)


class TestRefusals:
    def test_a_random_basis_that_is_not_orthonormal(self, monkeypatch):
        crooked = Spectrum(u=torch.ones(8, 2), s=torch.ones(2), vh=torch.ones(2, 6))
        monkeypatch.setattr("valign.adapters.comp_lora.randomized_svd", lambda *_, **__: crooked)
        with pytest.raises(ValueError, match=r"CompLoRA\.niter must give an orthonormal basis, got an error of 8\.0e\+00 in a"):
            linear_model(directions=2, niter=1, generator=torch.Generator())

    def test_tied_and_quantized_weights(self):
        with pytest.raises(ValueError, match=r"CompLoRA must have weights of its own, got to_k, which is tied"):
            initialize(with_lora(Attention(tie=True)), "comp-lora")
        model = with_lora()
        layer = model.base_model.model.to_q.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"CompLoRA must read float weights, got to_q in torch\.int8"):
            initialize(model, "comp-lora")

    def test_a_lora_that_it_did_not_start(self):
        for use in (penalty, reproject):
            with pytest.raises(ValueError, match=r"Comp-LoRA must have started the adapter, got 'default', which it did not"):
                use(with_lora())

    def test_no_room_for_the_rank(self):
        with pytest.raises(ValueError, match=r"leave room for the rank in a: at most 6 - 2 = 4, got 5\. Protect fewer"):
            linear_model(directions=5)

    def test_what_has_no_support(self):
        for layer in (nn.Conv2d(4, 4, 3), nn.Embedding(5, 4)):
            model = with_lora(nn.ModuleDict({"a": layer}), rank=2, targets=("a",))
            with pytest.raises(ValueError, match=rf"CompLoRA must have linear layers only, got a, a {type(layer).__name__}"):
                initialize(model, "comp-lora")
        base = Attention()
        base.to_q.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"CompLoRA must have finite weights, got NaN or infinity in to_q"):
            initialize(with_lora(base), "comp-lora")

    def test_twice(self):
        model, _ = linear_model(directions=1)
        with pytest.raises(ValueError, match=r"CompLoRA must start from a plain new LoRA, got a which is CompLoRA already"):
            initialize(model, "comp-lora")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"directions": -1}, r"CompLoRA\.directions must be in \[0, inf\), got -1"),
            ({"fraction": 1.0}, r"CompLoRA\.fraction must be in \(0, 1\), got 1\.0"),
            ({"energy": 0.0}, r"CompLoRA\.energy must be in \(0, 1\), got 0\.0"),
            ({"energy": float("nan")}, r"CompLoRA\.energy must be in \(0, 1\), got nan"),
            ({"directions": 1, "fraction": 0.5}, r"CompLoRA must have directions or fraction, got both"),
            ({"niter": 2, "generator": torch.Generator()}, r"CompLoRA\.niter must come with directions or fraction"),
            ({"niter": 2, "directions": 1}, r"CompLoRA\.generator must be given with niter"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            CompLoRA(**options)


def test_a_half_precision_adapter_leaves_a_full_precision_base_alone():
    _, layer = linear_model(directions=2)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].to(torch.bfloat16)
    for name in ("lora_protect_left", "lora_protect_right"):
        getattr(layer, name)["default"] = getattr(layer, name)["default"].to(torch.bfloat16)
    x = torch.randn(3, 5, 6)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero, so nothing may be rounded
    assert torch.equal(layer(x[0, 0]), layer.base_layer(x[0, 0]))  # a single token, too
