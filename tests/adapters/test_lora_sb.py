"""LoRA-SB: the best rank-r part of the first step, the gradient identity, only R trains, exact export, every refusal."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, inputs, train, trainable, with_lora
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from valign.adapters import LoRASB, export_lora, initialize, save_peft_lora
from valign.adapters.factors import lora_layers
from valign.adapters.lora_sb import core_start, first_step, install_core
from valign.checks import UserError

SAMPLES = [(inputs(seed=s), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(90 + s))) for s in range(4)]


def loss(model, sample):
    x, y = sample
    return (model(x) - y).square().sum()


def start(model=None, **options):
    model = model if model is not None else with_lora(alpha=3)
    return model, initialize(
        model, "lora-sb", **{"samples": SAMPLES, "loss": loss, "learning_rate": 1e-3, "count": len(SAMPLES), **options}
    )


def summed_gradient(name):
    base = Attention()
    sum(loss(base, sample) for sample in SAMPLES).backward()
    return getattr(base, name).weight.grad


@given(st.integers(2, 8), st.integers(2, 8), st.data())
def test_the_core_is_the_best_part_of_the_step(rows, columns, data):
    rank, scale = data.draw(st.integers(1, min(rows, columns))), data.draw(st.floats(0.2, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    gradient = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    step = first_step(gradient, learning_rate=1e-2)
    assert_close(step, -1e-2 * torch.sign(gradient))
    found = core_start(step, rank, scale=scale)
    s = torch.linalg.svdvals(step)
    product = scale * found.up @ found.core @ found.down
    assert_close((step - product).square().sum(), s[rank:].square().sum(), rtol=1e-6, atol=1e-12)
    assert_close((step * product).sum(), s[:rank].square().sum())
    eye = torch.eye(rank, dtype=torch.float64)
    assert_close(found.up.T @ found.up, eye, rtol=0, atol=1e-9)
    assert_close(found.down @ found.down.T, eye, rtol=0, atol=1e-9)
    diagonal = found.core.diag()
    assert torch.equal(found.core, torch.diag(diagonal))
    assert (diagonal >= 0).all()
    assert (diagonal.diff() <= 1e-12).all()
    again = core_start(first_step(7 * gradient, learning_rate=1e-2), rank, scale=scale)  # the sign forgets the size
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


@given(st.integers(2, 5), st.integers(2, 5), st.data())
def test_the_cores_gradient_is_the_best_image_of_the_weights_without_a_preconditioner(rows, columns, data):
    """``(1/s^2) (B^T B)^-1 g_R (A A^T)^-1``, which minimizes ``|s B X A - G|``, is ``g_R / s^2`` for orthonormal factors."""
    rank, scale = data.draw(st.integers(1, min(rows, columns))), data.draw(st.floats(0.2, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    step, gradient = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    start = core_start(step, rank, scale=scale)
    by_core = scale * start.up.T @ gradient @ start.down.T
    design = scale * torch.einsum("oi,jk->okij", start.up, start.down).reshape(rows * columns, rank**2)  # times X, flattened
    best = torch.linalg.lstsq(design, gradient.reshape(-1, 1), driver="gelsd").solution.view(rank, rank)
    assert_close(best, by_core / scale**2, rtol=1e-6, atol=1e-9)


def test_no_step_where_the_gradient_is_zero():
    assert first_step(torch.tensor([[0.0, -2.0]]), learning_rate=0.1).tolist() == [[0.0, pytest.approx(0.1)]]


def test_the_model_has_made_the_first_step():
    model, report = start(with_lora(rank=8, alpha=8))
    assert not report.keeps_function
    assert report.keeps_base
    delta = export_lora(model)["to_v"].delta()  # full rank: the whole step
    assert_close(delta, -1e-3 * summed_gradient("to_v").sign(), rtol=0, atol=1e-7)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), Attention()(inputs()))


def test_a_small_full_rank_step_lowers_the_loss():
    model, _ = start(
        with_lora(nn.ModuleDict({"a": nn.Linear(6, 6)}), rank=6, alpha=6, targets=("a",)), loss=plain_loss, learning_rate=1e-4
    )
    with torch.no_grad():
        after = sum(plain_loss(model, sample) for sample in SAMPLES)
        with model.disable_adapter():
            before = sum(plain_loss(model, sample) for sample in SAMPLES)
    assert after < before


def plain_loss(model, sample):
    module = model.base_model.model["a"]
    return (module(sample[0][..., :6]) - sample[1][..., :6]).square().sum()


def test_only_the_core_trains_and_becomes_dense():
    model, report = start()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert report.trainable == sum(p.numel() for p in trainable(model).values()) == 3 * 3**2
    assert all(name.endswith("lora_core.default") for name in trainable(model))
    model.set_adapter("default")  # peft switches gradients on here
    assert report.trainable == sum(p.numel() for p in trainable(model).values())
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_core" not in name), name
    core = lora_layers(model, "default")["to_q"].lora_core["default"]
    assert (core - core.diag().diag()).abs().max() > 1e-4


def test_the_gradient_of_the_core_is_the_closed_form():
    model, _ = start(with_lora(alpha=6), allow_scale=True)
    layers = lora_layers(model, "default")
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}) or out.retain_grad())
    loss(model, SAMPLES[0]).backward()
    for name, layer in layers.items():
        x, out = seen[name]
        by_weight = out.grad.flatten(0, 1).T @ x.flatten(0, 1)  # dL/dW
        b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert_close(layer.lora_core["default"].grad, 2.0 * b.T @ by_weight @ a.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [3, 12])
def test_the_start_does_not_depend_on_the_scale(alpha):
    model, _ = start(with_lora(alpha=alpha), allow_scale=True)
    other, _ = start()
    assert_close(export_lora(model)["to_q"].delta(), export_lora(other)["to_q"].delta())


def test_export_merge_and_state_are_exact(tmp_path):
    model, _ = start()
    train(model)
    model.eval()
    answer = model(inputs())
    exported = export_lora(model)
    assert {lora.rank for lora in exported.values()} == {3}
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", exported)))
    assert_close(again(inputs()), answer, rtol=0, atol=1e-6)
    fresh = with_lora(alpha=3, seed=5)
    install_core(fresh)
    assert_close(fresh(inputs()), Attention()(inputs()))  # R = 0
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert torch.equal(fresh(inputs()), answer)
    assert_close(model.merge_and_unload()(inputs()), answer, rtol=0, atol=1e-6)


def test_the_model_is_given_back_as_it_was():
    model = with_lora(alpha=3)
    model.train()
    model.base_model.model.to_k.eval()
    start(model)
    assert model.training
    assert not model.base_model.model.to_k.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


def test_evaluation_mode_unless_asked_otherwise():
    modes = []

    def watching(model, sample):
        modes.append(model.training)
        return loss(model, sample)

    for flag in (False, True):
        start(loss=watching, train_mode=flag)
    assert modes == [False] * 4 + [True] * 4


def test_gradients_are_plain_sums_over_the_samples():
    sums = []
    start(reduce=lambda gradient: sums.append(gradient.clone()) or gradient)
    for name, found in zip(("to_k", "to_q", "to_v"), sums, strict=True):
        assert_close(found, summed_gradient(name))


def test_half_precision_gradients_are_summed_in_float32():
    sums = []
    base = Attention(dtype=torch.bfloat16)

    def half(model, sample):
        return (model(sample[0].bfloat16()) - sample[1].bfloat16()).square().sum()

    start(with_lora(base, alpha=3), loss=half, reduce=lambda gradient: sums.append(gradient.dtype) or gradient)
    assert sums == [torch.float32] * 3


def test_processes_are_summed_before_the_sign():
    totals = iter([torch.ones(12, 12), torch.ones(12, 12), torch.eye(8, 12)])  # of to_k, to_q, to_v, whatever this process found
    model, _ = start(reduce=lambda gradient: next(totals))
    deltas = {name: lora.delta() for name, lora in export_lora(model).items()}
    assert_close(deltas["to_q"], torch.full((12, 12), -1e-3))  # rank 1, so rank 3 holds all of it
    assert_close(deltas["to_v"].square().sum(), torch.tensor(3e-6))  # three of eight equal singular values


def test_samples_are_counted():
    with pytest.warns(UserWarning, match="wanted 32 samples for the gradient, and there were 4"):
        start(count=None)
    calls = []
    start(samples=SAMPLES * 20, count=None, loss=lambda m, s: calls.append(1) or loss(m, s))
    assert len(calls) == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(samples=iter(SAMPLES), count=None)  # a stream of unknown length is taken whole
        calls.clear()
        start(samples=range(40_000), count=None, loss=lambda m, s: calls.append(s) or loss(m, SAMPLES[s % 4]))
    assert len(calls) == 40  # 0.1 %


def test_beats_the_weights_own_directions_on_a_shifted_regression():
    """The card's experiment: 32x32 map, target a rank-4 shift away, r = 4, only R trains, against LoRA-XS (SVD of the weight)."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(32, 32, generator=generator) / 32**0.5
        shift = torch.randn(32, 4, generator=generator) @ torch.randn(4, 32, generator=generator) / 32
        x = torch.randn(512, 32, generator=generator)
        y = x @ (weight + shift).T
        final = {}
        for method in ("sb", "xs"):
            model = with_lora(nn.ModuleDict({"a": nn.Linear(32, 32, bias=False)}), rank=4, alpha=4, targets=("a",))
            module = model.base_model.model["a"]
            module.base_layer.weight.data.copy_(weight)

            def fit(m, _=None, x=x, y=y):
                return (m.base_model.model["a"](x) - y).square().mean()

            if method == "sb":
                start(model, loss=fit, samples=[0], count=1, learning_rate=0.02)
            else:
                install_core(model)
                u, s, vh = torch.linalg.svd(weight)
                module.lora_A["default"].weight.data.copy_(vh[:4])
                module.lora_B["default"].weight.data.copy_(u[:, :4] * s[:4])
            optimizer = torch.optim.Adam(trainable(model).values(), lr=0.02)
            for _ in range(300):
                optimizer.zero_grad()
                found = fit(model)
                found.backward()
                optimizer.step()
            final[method] = found.item()
        assert final["sb"] < 0.5 * final["xs"], (seed, final)


def test_randomized_is_near_exact():
    deltas = []
    for options in ({}, {"niter": 10, "generator": torch.Generator().manual_seed(0)}):
        deltas.append(export_lora(start(**options)[0])["to_q"].delta())
    assert_close(*deltas, rtol=0, atol=1e-5)


class TestRefusals:
    def test_rank_tied_quantized_and_no_target(self):
        with pytest.raises(ValueError, match=r"LoRASB\.rank must be in \[1, 8\] for to_v, got 9"):
            start(with_lora(rank=9, alpha=9))
        with pytest.raises(ValueError, match=r"LoRASB must have weights of its own, got to_k, which is tied"):
            start(with_lora(Attention(tie=True), alpha=3))
        model = with_lora(alpha=3)
        layer = model.base_model.model.to_q.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"LoRASB must read float weights, got to_q in torch\.int8"):
            start(model)
        with pytest.raises(UserError, match="the model has none"):
            start(Attention())

    def test_a_random_decomposition_without_a_generator(self):
        with pytest.raises(ValueError, match=r"core_start\.generator must be given with niter, got None"):
            core_start(torch.eye(3), 2, niter=2)

    def test_a_scale_without_a_word(self):
        with pytest.warns(UserWarning, match=r"meant for lora_alpha == r, got a scale of 2; R is divided by it"):
            start(with_lora(alpha=6))

    def test_modules_without_a_gradient(self):
        model = with_lora(alpha=3)
        with pytest.raises(ValueError, match=r"LoRASB must have a gradient in every module, got only zeros in to_k"):
            start(model, loss=lambda m, s: m.base_model.model.to_q(s[0]).sum() + m.base_model.model.to_v(s[0]).sum())
        with pytest.raises(ValueError, match=r"got NaN or infinity in to_k"):
            start(model, loss=lambda m, s: loss(m, s) * float("nan"))
        assert not any("lora_core" in name for name, _ in model.named_parameters())  # nothing was changed
        assert trainable(model)

    def test_no_samples_and_no_gradient_at_all(self):
        with pytest.raises(UserError, match=r"LoRASB\.samples must hold at least one sample, got 0"):
            start(samples=[])
        with pytest.raises(UserError, match=r"LoRASB\.loss must depend on the adapted weights"):
            start(loss=lambda m, s: loss(m, s).detach())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"learning_rate": 0.0}, r"LoRASB\.learning_rate must be in \(0, inf\), got 0"),
            ({"count": 0}, r"LoRASB\.count must be in \[1, inf\), got 0"),
            ({"niter": 2}, r"LoRASB\.generator must be given with niter"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            LoRASB(**{"samples": SAMPLES, "loss": loss, "learning_rate": 1e-3, **options})
