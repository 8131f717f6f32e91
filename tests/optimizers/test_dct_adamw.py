"""DCT-AdamW: AdamW in the cosine basis, nothing lost with feedback, moments that follow, exact resume, every refusal."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.optimizers import DCTAdamW
from valign.optimizers.dct import vectors

NUMBERS = {"rank": 2, "lr": 0.1, "weight_decay": 0.01}


def weight(rows=6, columns=4, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradients(parameter, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) for _ in range(count)]


def run(parameter, optimizer, found):
    for gradient in found:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
def test_full_rank_is_adamw_in_the_rotated_coordinates(shape, basis):
    ours = weight(*shape)
    found = gradients(ours, 5)
    q = vectors(min(shape), basis, ours.detach())
    turn = (lambda m: m @ q) if shape[0] >= shape[1] else (lambda m: q.T @ m)
    theirs = nn.Parameter(turn(ours.detach()).clone())
    run(ours, DCTAdamW([ours], **{**NUMBERS, "rank": min(shape)}, basis=basis), found)
    run(theirs, torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01), [turn(gradient) for gradient in found])
    assert_close(turn(ours.detach()), theirs.detach())


def test_vectors_scalars_and_large_tables_are_plain_adamw():
    for shape in ((5,), (), (1, 7), (40, 3)):
        ours = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        theirs, found = copy.deepcopy(ours), gradients(ours, 4)
        with pytest.warns(UserWarning, match="a parameter group without a matrix: it is plain Adam there"):
            optimizer = DCTAdamW([ours], **NUMBERS, max_dim=40)
        run(ours, optimizer, found)
        run(theirs, torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01), found)
        assert_close(ours, theirs)


def test_kernels_of_convolutions_are_matrices():
    kernel, flat = nn.Parameter(torch.ones(4, 2, 3, 1)), nn.Parameter(torch.ones(4, 6))
    found = gradients(flat, 3)
    run(kernel, DCTAdamW([kernel], **NUMBERS), [gradient.view(4, 2, 3, 1) for gradient in found])
    run(flat, DCTAdamW([flat], **NUMBERS), found)
    assert torch.equal(kernel.view(4, 6), flat)
    assert not torch.equal(flat, torch.ones(4, 6))


def transcript(parameter, found, *, rank, feedback, rotate, every, betas=(0.9, 0.999), eps=1e-8, lr=0.1, decay=0.01):
    """The step, dense and slow, float64, with the rotation as the product it stands for."""
    p, q = parameter.detach().clone(), vectors(min(parameter.shape), "dct2", parameter.detach())
    left = p.shape[0] < p.shape[1]
    p = p.T if left else p
    error, m, v, chosen = torch.zeros_like(p), 0, 0, None
    for t, gradient in enumerate(found, start=1):
        p = p * (1 - lr * decay)
        a_full = (gradient.T if left else gradient) + error
        if t == 1 or t % every == 0:
            old, scores = chosen, (a_full @ q).norm(dim=0)
            chosen = sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:rank])
            if t > 1 and rotate:
                turn = q[:, old].T @ q[:, chosen]
                m, v = m @ turn, (v @ turn).abs()
        small = a_full @ q[:, chosen]
        if feedback:
            error = a_full - small @ q[:, chosen].T
        m, v = betas[0] * m + (1 - betas[0]) * small, betas[1] * v + (1 - betas[1]) * small**2
        u = m / (v**0.5 + eps * (1 - betas[1] ** t) ** 0.5)
        p = p - lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * u @ q[:, chosen].T
    return p.T if left else p


@pytest.mark.parametrize("shape", [(6, 4), (4, 7)])
@pytest.mark.parametrize(
    ("feedback", "rotate", "every"), [("full", True, 1), ("none", False, 1), ("full", True, 3), ("none", True, 2)]
)
def test_agrees_with_the_formulas(shape, feedback, rotate, every):
    ours = weight(*shape)
    found = gradients(ours, 8)
    expected = transcript(ours, found, rank=2, feedback=feedback == "full", rotate=rotate, every=every)
    run(ours, DCTAdamW([ours], **NUMBERS, feedback=feedback, rotate=rotate, update_every=every), found)
    assert_close(ours.detach(), expected)


def test_nothing_is_lost_with_feedback():
    parameter = weight()
    optimizer = DCTAdamW([parameter], **NUMBERS, feedback="full")
    before = torch.zeros(6, 4, dtype=torch.float64)
    for gradient in gradients(parameter, 4):
        moment = optimizer.state[parameter].get("exp_avg")
        old, old_indices = (None, None) if moment is None else (moment.clone(), optimizer.state[parameter]["indices"])
        run(parameter, optimizer, [gradient])
        state = optimizer.state[parameter]
        kept = vectors(4, "dct2", gradient)[:, state["indices"]]
        small = (gradient + before) @ kept
        assert_close(state["error"] + small @ kept.T, gradient + before)
        assert not (state["error"] @ kept).abs().max() > 1e-12
        assert old is None or old_indices.shape == state["indices"].shape
        before = state["error"]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (6, 2)
    assert (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize(("shape", "thin"), [((6, 4), (6, 2)), ((4, 7), (2, 7))])
def test_moments_are_thin_along_the_projected_side(shape, thin):
    parameter = weight(*shape)
    optimizer = DCTAdamW([parameter], **NUMBERS)
    run(parameter, optimizer, gradients(parameter, 2))
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == thin
    assert state["indices"].shape == (2,)


def test_the_reference_code_is_one_choice_of_options():
    """Norm 1, columns of the DCT-II matrix, no rotation, no feedback: the moments stay in their slots."""
    ours, found = weight(), gradients(weight(), 4)
    p, q, m, v = ours.detach().clone(), vectors(4, "dct3", ours.detach()), 0, 0
    for t, gradient in enumerate(found, start=1):
        p = p * (1 - 0.1 * 0.01)
        chosen = (gradient @ q).abs().sum(0).topk(2).indices.sort().values
        a = gradient @ q[:, chosen]
        m, v = 0.9 * m + 0.1 * a, 0.999 * v + 0.001 * a**2
        root = (1 - 0.999**t) ** 0.5
        p = p - 0.1 * root / (1 - 0.9**t) * m / (v**0.5 + 1e-8 * root) @ q[:, chosen].T
    run(ours, DCTAdamW([ours], **NUMBERS, norm=1, basis="dct3", rotate=False, feedback="none"), found)
    assert_close(ours.detach(), p)


def test_a_gradient_inside_the_cosines_leaves_nothing_over():
    parameter = weight()
    basis = vectors(4, "dct2", parameter.detach())[:, [1, 3]]
    gradient = torch.ones(6, 2, dtype=torch.float64) @ basis.T
    optimizer = DCTAdamW([parameter], **NUMBERS, feedback="full")
    run(parameter, optimizer, [gradient])
    assert optimizer.state[parameter]["indices"].tolist() == [1, 3]
    assert optimizer.state[parameter]["error"].abs().max() < 1e-12


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_both_transforms_train_alike(transform):
    parameter = weight()
    run(parameter, DCTAdamW([parameter], **NUMBERS, transform=transform), gradients(parameter, 5))
    other = weight()
    run(other, DCTAdamW([other], **NUMBERS), gradients(other, 5))
    assert_close(parameter, other)


@pytest.mark.parametrize("feedback", ["none", "full", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_bytes(feedback, dtype):
    straight = weight(dtype=dtype)
    found = gradients(straight, 6)
    run(straight, DCTAdamW([straight], **NUMBERS, feedback=feedback, update_every=2), found)
    half = weight(dtype=dtype)
    first = DCTAdamW([half], **NUMBERS, feedback=feedback, update_every=2)
    run(half, first, found[:3])
    again = nn.Parameter(half.detach().clone())
    second = DCTAdamW([again], **NUMBERS, feedback=feedback, update_every=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, value in first.state[half].items():
        same = second.state[again][name]
        assert torch.equal(value, same) and value.dtype == same.dtype if isinstance(value, torch.Tensor) else value == same
    run(again, second, found[3:])
    assert torch.equal(again, straight)


def test_checkpoints_of_the_trainer_hold_it(tmp_path):
    from valign.training.engine.checkpoint import Checkpoints

    one, two = weight(), weight(seed=5)
    first, second = (DCTAdamW([p], **NUMBERS, feedback="8bit") for p in (one, two))
    run(one, first, gradients(one, 3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": one}, first, {})
    checkpoints.load(1, {"w": two}, second)
    more = gradients(one, 2, seed=9)
    assert torch.equal(run(one, first, more), run(two, second, more))


def test_it_learns_and_rotation_with_feedback_helps():
    """32-32-32 tanh net, correlated inputs, r = 4, over three seeds."""
    for seed in range(3):
        final = {}
        for name, options in {"both": {}, "neither": {"rotate": False, "feedback": "none"}}.items():
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
            x = torch.randn(128, 32, generator=generator).cumsum(1) / 4
            y = torch.tanh(x @ torch.randn(32, 32, generator=generator) / 4)
            optimizer = DCTAdamW(net.parameters(), rank=4, lr=3e-3, weight_decay=0.0, **options)
            for _ in range(150):
                optimizer.zero_grad()
                loss = (net(x) - y).square().mean()
                loss.backward()
                optimizer.step()
            final[name] = loss.item()
        assert final["both"] < final["neither"] < 0.5, (seed, final)


class TestRefusals:
    def test_a_rank_above_the_matrix_names_the_parameter(self):
        layer = nn.Linear(3, 5)
        with pytest.raises(ValueError, match=r"DCTAdamW\.rank for weight must be in \[1, 3\], got 4\. It is 5 x 3"):
            DCTAdamW(layer.named_parameters(), **{**NUMBERS, "rank": 4})
        with pytest.raises(ValueError, match=r"DCTAdamW\.rank for parameter 0 must be in"):
            DCTAdamW(layer.parameters(), **{**NUMBERS, "rank": 4})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, r"DCTAdamW\.rank must be in \[1, inf\), got 0"),
            ({"lr": 0.0}, r"DCTAdamW\.lr must be in \(0, inf\), got 0"),
            ({"eps": 0.0}, r"DCTAdamW\.eps must be in \(0, inf\), got 0"),
            ({"weight_decay": -1.0}, r"DCTAdamW\.weight_decay must be in \[0, inf\), got -1"),
            ({"betas": (1.0, 0.9)}, r"DCTAdamW\.beta1 must be in \[0, 1\), got 1"),
            ({"betas": (0.9, -0.1)}, r"DCTAdamW\.beta2 must be in \[0, 1\), got -0\.1"),
            ({"update_every": 0}, r"DCTAdamW\.update_every must be in \[1, inf\), got 0"),
            ({"norm": 3}, r"DCTAdamW\.norm must be one of 1, 2; got 3"),
            ({"transform": "fft", "basis": "dct3"}, r"DCTAdamW\.transform must be 'matmul' with basis 'dct3', got 'fft'"),
        ],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            DCTAdamW([weight()], **{**NUMBERS, **options})

    @pytest.mark.parametrize("name", ["feedback", "basis", "transform", "side"])
    def test_words(self, name, as_in_use):
        with pytest.raises(ValueError, match=rf"DCTAdamW\.{name} must be one of .*; got '5bit'"):
            DCTAdamW([weight()], **NUMBERS, **{name: "5bit"})

    def test_a_group_that_is_refused_is_not_kept(self):
        optimizer = DCTAdamW([weight()], **NUMBERS)
        with pytest.raises(ValueError, match=r"DCTAdamW\.rank for parameter 0 must be in \[1, 4\], got 5"):
            optimizer.add_param_group({"params": [weight()], "rank": 5})
        optimizer.add_param_group({"params": [weight()], "rank": 4})
        assert [group["rank"] for group in optimizer.param_groups] == [2, 4]

    def test_parameters_and_gradients_it_cannot_take(self):
        with pytest.raises(TypeError, match=r"DCTAdamW must have real float parameters, got parameter 0 in torch\.complex64"):
            DCTAdamW([nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], **NUMBERS)
        with pytest.raises(TypeError, match=r"DCTAdamW must have real float parameters, got parameter 0 in torch\.int64"):
            DCTAdamW([nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)], **NUMBERS)
        parameter = weight()
        parameter.grad = torch.ones(6, 4, dtype=torch.float64).to_sparse()
        with pytest.raises(TypeError, match=r"DCTAdamW must have dense gradients, got a sparse one of \(6, 4\)"):
            DCTAdamW([parameter], **NUMBERS).step()
        with pytest.raises(ValueError, match=r"feedback must be '8bit' for a matrix of \(6, 5\), got '4bit'\. 5 is odd"):
            DCTAdamW([weight(6, 5)], **NUMBERS, feedback="4bit")
