"""IncreLoRA: scores against the closed form, growth on time and within the budget, no jump, exact export and resume, refusals."""

import copy

import pytest
import torch
from networks import Attention, inputs, with_lora
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from valign.adapters import AttachContext, IncreLoRA, adapter_state, export_lora, save_peft_lora
from valign.adapters.factors import lora_layers
from valign.adapters.increlora import IncreLoRAOptions, importance, restart_rate
from valign.checks import UserError

TARGET = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(model=None, lr=1e-2, **options):
    model = model or with_lora(rank=1, alpha=4)
    incre = IncreLoRA(model, **{"generator": generator(), "init_warmup": 2, "interval": 3, "top": 1, **options})
    optimizer = torch.optim.AdamW(incre.parameters(), lr=lr, weight_decay=0.0)
    incre.watch(optimizer)
    return model, incre, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs(seed=3)) - TARGET).square().mean().backward()
        optimizer.step()


def grow(incre, **scores):
    """Steps in which the modules have these scores (the others 0), until one of the steps gives rank."""
    while not incre.growths:
        for name, score in scores.items():
            incre.note(name, torch.tensor(score))
        incre.before_step()


def test_the_start_is_the_base_model():
    base = Attention()(inputs())
    assert torch.equal(start(early=False)[0](inputs()), base)
    model, _, _ = start()
    assert_close(model(inputs()), base, rtol=0, atol=1e-5)  # the reserve's gain is 1e-5
    layer = lora_layers(model, "default")["to_q"]
    blocks = layer.lora_blocks["default"]
    down, up = blocks.down[0], blocks.up[0]
    assert_close(export_lora(model)["to_q"].delta(), 4 / (1 + 1e-5) * 1e-5 * up @ down)
    assert not layer.lora_blocks["default"].first_gain.any()


def test_alpha_zero_is_the_rank_at_the_start():
    model, incre, _ = start(with_lora(rank=2, alpha=0), total=20, step_rank=1, early=False)
    grow(incre, to_q=1.0)
    assert incre.growths[0]["grown"] == {"to_q": 1}
    with torch.no_grad():
        incre.layers["to_q"].lora_blocks["default"].first_gain.fill_(1.0)
    assert export_lora(model)["to_q"].scale == pytest.approx(2 / (3 + 1e-5))


def test_the_score_is_the_closed_form():
    model, incre, _ = start(early=False)
    layers, seen, scores = lora_layers(model, "default"), {}, {}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_blocks["default"].first_gain.fill_(0.7)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}) or out.retain_grad())
    (model(inputs(seed=3)) - TARGET).square().mean().backward()
    for name, (x, out) in seen.items():
        gradient = out.grad.flatten(0, 1).T @ x.flatten(0, 1)
        delta = export_lora(model)[name].delta()
        expected = (delta * gradient).abs().sum() / delta.numel() ** 0.5
        assert_close(importance(delta, gradient), expected)
        scores[name] = float(expected)
    incre.before_step()
    assert incre.mean == pytest.approx({name: 0.15 * score for name, score in scores.items()}, rel=1e-4, abs=1e-9)
    first = {name: mean / 0.15 for name, mean in incre.mean.items()}
    for _ in range(2):  # the micro-batches of a step add up
        (model(inputs(seed=3)) - TARGET).square().mean().backward()
    incre.before_step()
    for name, score in first.items():
        mean = 0.85 * 0.15 * score + 0.15 * 2 * score
        assert incre.mean[name] == pytest.approx(mean, rel=1e-5)
        assert incre.spread[name] == pytest.approx(0.85 * 0.15 * 0.85 * score + 0.15 * (2 * score - mean), rel=1e-5)
        assert incre.scores()[name] == pytest.approx(incre.mean[name] * incre.spread[name])


@pytest.mark.parametrize("early", [True, False])
def test_it_grows_on_time_and_never_beyond_the_total(early):
    model, incre, optimizer = start(total=6, early=early)
    totals, groups = [], []
    for _ in range(14):
        train(model, optimizer, 1)
        totals.append(sum(incre.ranks.values()))
        groups.append(len(optimizer.param_groups))
    assert totals == [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6]  # steps 3, 6 and 9
    assert groups[-1] == 4 + early
    assert not incre.scoring
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})


def test_the_last_round_takes_what_is_left_best_first():
    model, incre, _ = start(total=8, step_rank=2, top=3)
    grow(incre, to_k=3.0, to_q=1.0, to_v=2.0)
    assert incre.ranks == {"to_k": 3, "to_q": 2, "to_v": 3}  # 5 left: 2, then 2 for to_v, then 1
    assert incre.growths[0]["grown"] == {"to_k": 2, "to_v": 2, "to_q": 1}
    gains = {n: layer.lora_blocks["default"].gain for n, layer in lora_layers(model, "default").items()}
    assert [g.item() for g in gains["to_q"]] == pytest.approx([1e-5, 0.0, 0.0])  # the leftover reserve is nothing


def test_running_means_by_hand():
    defaults = IncreLoRA(with_lora(rank=1), generator=generator())
    assert (defaults.betas, defaults.init_warmup, defaults.interval) == ((0.85, 0.85), 1000, 1000)
    for betas, expected in (
        ((0.85, 0.85), [(0.3, 0.255), (0.405, 0.306)]),  # 0.15 x 2, 0.15 x 1.7; 0.85 x 0.3 + 0.15, 0.85 x 0.255 + 0.15 x 0.595
        ((0.5, 0.75), [(1.0, 0.25), (1.0, 0.1875)]),  # 0.5 x 2, 0.25 x 1; 0.5 + 0.5, 0.75 x 0.25 + 0.25 x 0
    ):
        incre = IncreLoRA(with_lora(rank=1), generator=generator(), betas=betas)
        for score, (mean, spread) in zip((2.0, 1.0), expected, strict=True):
            incre.note("to_q", torch.tensor(score))
            incre.before_step()
            assert (incre.mean["to_q"], incre.spread["to_q"]) == pytest.approx((mean, spread))
            assert incre.scores()["to_q"] == pytest.approx(mean * spread)


@pytest.mark.parametrize(("warmup", "first"), [(2, 3), (3, 6), (4, 6)])
def test_the_first_growth_comes_after_the_warm_up_never_at_its_last_step(warmup, first):
    model, incre, optimizer = start(init_warmup=warmup, interval=3)
    train(model, optimizer, 7)
    assert incre.growths[0]["step"] == first


def test_the_adapter_warms_up_for_a_tenth_of_the_steps_and_is_done_by_half():
    context = AttachContext(
        network=Attention(),
        head=(),
        targets=("to_q", "to_k", "to_v"),
        steps=200,
        batch_size=1,
        first_rate=1.0,
        seed=0,
        loss=lambda number, half: torch.zeros(()),
    )
    incre = IncreLoRAOptions(rank=4).attach(context).increlora
    assert (incre.betas, incre.target, incre.step_rank, incre.top) == ((0.85, 0.85), 12, 2, 2)
    assert (incre.init_warmup, incre.interval) == (20, 26)  # 9 components in 3 rounds of 2 x 2 within steps 20 to 100


def test_equals_of_the_last_of_the_best_grow_too_while_there_is_rank():
    for total, expected in ((8, {"to_k": 2, "to_q": 1, "to_v": 2}), (4, {"to_k": 2, "to_q": 1, "to_v": 1})):
        _, incre, _ = start(total=total, top=1)
        grow(incre, to_k=3.0, to_q=1.0, to_v=3.0)
        assert incre.ranks == expected


def test_only_the_order_of_scores_counts():
    grown = []
    for factor in (1.0, 1e6):
        _, incre, _ = start(total=5)
        grow(incre, to_k=1.0 * factor, to_q=3.0 * factor, to_v=2.0 * factor)
        grown.append(dict(incre.ranks))
    assert grown[0] == grown[1] == {"to_k": 1, "to_q": 2, "to_v": 1}


def test_growth_changes_the_answer_by_the_scale_alone():
    model, incre, optimizer = start(total=6)
    train(model, optimizer, 3)
    before = export_lora(model)
    grow(incre, to_q=1e6)
    after = export_lora(model)
    assert_close(after["to_q"].delta(), before["to_q"].delta() * (1 + 1e-5) / (2 + 1e-5), rtol=0, atol=1e-7)
    assert torch.equal(after["to_k"].delta(), before["to_k"].delta())


def test_reserve_directions_learn_early_or_not_at_all():
    for early in (True, False):
        model, incre, optimizer = start(early=early)
        blocks = lora_layers(model, "default")["to_q"].lora_blocks["default"]
        before = [blocks.down[0].clone(), blocks.gain[0].clone()]
        for _ in range(2):
            optimizer.zero_grad()
            ((model(inputs(seed=3)) - TARGET).square().mean() + 0.1 * incre.orthogonality()).backward()
            optimizer.step()
        assert torch.equal(blocks.down[0], before[0]) is not early
        assert torch.equal(blocks.gain[0], before[1])


def test_orthogonality_is_over_all_ranks_of_a_layer_together():
    model, incre, _ = start()
    terms = []
    for layer in lora_layers(model, "default").values():
        blocks = layer.lora_blocks["default"]
        a = torch.cat([layer.lora_A["default"].weight, *blocks.down])
        b = torch.cat([layer.lora_B["default"].weight, *blocks.up], dim=1)
        terms += [torch.linalg.matrix_norm(a @ a.T - torch.eye(2)), torch.linalg.matrix_norm(b.T @ b - torch.eye(2))]
    assert_close(incre.orthogonality(), sum(terms) / 6)


def test_groups_warm_up_anew_and_end_together():
    assert [restart_rate(s, start=0, warmup=2, total=6) for s in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [restart_rate(s, start=3, warmup=2, total=6) for s in (3, 4, 5, 6)] == [0.0, 0.5, 1.0, 0.0]
    model, _, optimizer = start(total=6, restart_warmup=2, total_steps=20)
    train(model, optimizer, 5)  # the step of number 4 was the last
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-2 * share for share in (16 / 18, 16 / 18, 0.5)])


def test_each_group_has_a_rate_of_its_own():
    model = with_lora(rank=1, alpha=4)
    incre = IncreLoRA(model, generator=generator(), restart_warmup=2, total_steps=10)
    head = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": incre.parameters(), "lr": 1.0}, {"params": [head], "lr": 0.1}])
    incre.watch(optimizer)
    for _ in range(2):
        incre.before_step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05, 0.5])


def test_the_export_is_the_trained_model(tmp_path):
    model, incre, optimizer = start(total=6)
    train(model, optimizer, 14)
    model.eval()
    answer, exported = model(inputs()), export_lora(model)
    assert {name: lora.rank for name, lora in exported.items()} == incre.ranks
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", exported)))
    assert_close(again(inputs()), answer, rtol=0, atol=1e-6)
    assert_close(model.merge_and_unload()(inputs()), answer, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("early", "stop"), [(True, 5), (False, 5), (True, 12)])
def test_resuming_gives_the_same_bytes(early, stop):
    options = {"total": 6, "early": early, "restart_warmup": 2, "total_steps": 30}
    straight = start(**options)
    train(straight[0], straight[2], 16)
    half = start(**options)
    train(half[0], half[2], stop)
    again = start(**{**options, "generator": generator(9)})
    again[1].load_state_dict(copy.deepcopy(half[1].state_dict()))
    for name, tensor in adapter_state(again[0], "default").items():
        tensor.data.copy_(adapter_state(half[0], "default")[name])
    again[2].load_state_dict(copy.deepcopy(half[2].state_dict()))
    train(again[0], again[2], 16 - stop)
    assert again[1].ranks == straight[1].ranks
    left, right = (adapter_state(run[0], "default") for run in (again, straight))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_rank_goes_where_the_teacher_needs_it():
    """The card's experiment: four 16 x 16 maps, teacher ranks 4, 0, 1, 0, total rank 8; uniform rank 2 cannot fit the first."""
    g = generator(0)
    teacher = [
        torch.randn(16, r, generator=g) @ torch.randn(r, 16, generator=g) / 4 if r else torch.zeros(16, 16) for r in (4, 0, 1, 0)
    ]
    net = nn.ModuleDict({f"m{i}": nn.Linear(16, 16, bias=False) for i in range(4)})
    for layer in net.values():
        layer.weight.data.zero_()
    model = with_lora(net, rank=1, alpha=16, targets=[f"m{i}" for i in range(4)])
    incre = IncreLoRA(model, generator=g, total=8, step_rank=1, top=1, init_warmup=50, interval=50)
    optimizer = torch.optim.AdamW(incre.parameters(), lr=1e-2, weight_decay=0.0)
    incre.watch(optimizer)
    layers = lora_layers(model, "default")
    x = torch.randn(200, 4, 16, generator=g)
    for _ in range(700):
        optimizer.zero_grad()
        loss = sum((layers[f"m{i}"](x[:, i]) - x[:, i] @ teacher[i].T).square().mean() for i in range(4))
        loss.backward()
        optimizer.step()
    assert incre.ranks["m0"] >= 4
    assert sum(incre.ranks.values()) == 8
    assert loss < 0.02


class NoGroups(torch.optim.Optimizer):
    """As a wrapper that does not pass it on."""

    def __init__(self):
        pass

    add_param_group = property(lambda self: (_ for _ in ()).throw(AttributeError()))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"total": 2}, r"IncreLoRA\.total must be in \[3, inf\), got 2\. That is the rank at the start"),
            ({"top": 0}, r"IncreLoRA\.top must be in \[1, inf\), got 0"),
            ({"interval": 0}, r"IncreLoRA\.interval must be in \[1, inf\), got 0"),
            ({"betas": (0.9, 1.0)}, r"IncreLoRA\.betas must be in \(0, 1\), got 1\.0"),
            ({"average_rank": 3}, r"IncreLoRA\.step_rank must be given for average rank 3, got None"),
            ({"step_rank": 0}, r"IncreLoRA\.step_rank must be in \[1, inf\), got 0"),
            ({"average_rank": 0}, r"IncreLoRA\.average_rank must be in \[1, inf\), got 0"),
            ({"init_warmup": -1}, r"IncreLoRA\.init_warmup must be in \[0, inf\), got -1"),
            ({"restart_warmup": -1, "total_steps": 5}, r"IncreLoRA\.restart_warmup must be in \[0, inf\), got -1"),
            ({"restart_warmup": 1, "total_steps": 0}, r"IncreLoRA\.total_steps must be in \[1, inf\), got 0"),
            ({"restart_warmup": 2}, r"IncreLoRA\.restart_warmup and total_steps must come together"),
        ],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    def test_states_and_optimizers(self):
        model, incre, optimizer = start()
        with pytest.raises(UserError, match=r"IncreLoRA: the state was saved for other modules: to_k, x"):
            incre.load_state_dict({**incre.state_dict(), "modules": ["to_q", "to_v", "x"]})
        state = incre.state_dict()
        train(model, optimizer, 1)
        with pytest.raises(UserError, match=r"must be called on a new object, got one at step 1"):
            incre.load_state_dict(state)
        with pytest.raises(UserError, match=r"must get an optimizer with add_param_group"):
            IncreLoRA(with_lora(rank=1), generator=generator()).watch(NoGroups())
        lone = IncreLoRA(with_lora(rank=1), generator=generator(), total=6, init_warmup=0, interval=1)
        with pytest.raises(UserError, match=r"IncreLoRA must watch an optimizer before it grows"):
            grow(lone, to_q=1.0)
