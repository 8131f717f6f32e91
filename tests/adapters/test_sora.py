"""SoRA: plain LoRA when every gate is one, shut gates, exact pruned export, exact resume, refusals."""

import copy

import pytest
import torch
from networks import Attention, inputs, trainable, with_lora
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from valign.adapters import SoRA, adapter_state, export_lora, prune_in_rounds, save_peft_lora
from valign.adapters.factors import lora_layers
from valign.adapters.gate import reference_threshold
from valign.checks import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(model=None, **options):
    model = model or with_lora()
    sora = SoRA(model, **{"generator": generator(), "threshold": 0.05, **options})
    return model, sora, torch.optim.AdamW(sora.weights(), lr=1e-2), sora.gate_optimizer(lr=1e-2)


def train(model, sora, main, gate, steps):
    x = inputs(seed=3)
    target = torch.randn(2, 5, 8, generator=generator(4))
    for _ in range(steps):
        main.zero_grad(), gate.zero_grad()
        ((model(x) - target).square().mean() + sora.l1()).backward()
        main.step(), gate.step()


def test_the_function_is_kept_whatever_the_gates_are():
    model, sora, _, _ = start()
    assert torch.equal(model(inputs()), Attention()(inputs()))
    drawn = torch.cat([gate.detach() for gate in sora.gates().values()])
    assert drawn.dtype == torch.float32
    again = generator()
    assert torch.equal(drawn, torch.cat([torch.randn(3, generator=again) for _ in range(3)]))


def test_open_gates_are_plain_lora_bit_for_bit():
    model, sora, main, _ = start(gate_init="ones", threshold=0.0)
    plain = with_lora()
    other = torch.optim.AdamW(trainable(plain).values(), lr=1e-2)
    x = inputs()
    for _ in range(3):
        for network, optimizer in ((model, main), (plain, other)):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    for name, layer in lora_layers(plain, "default").items():
        for part in ("lora_A", "lora_B"):
            ours = getattr(lora_layers(model, "default")[name], part)["default"].weight
            assert torch.equal(ours, getattr(layer, part)["default"].weight)
    assert sora.ranks() == {"to_k": 3, "to_q": 3, "to_v": 3}


def test_a_shut_gate_stops_its_component_but_may_open_again():
    model, _, _, _ = start()
    layer = lora_layers(model, "default")["to_q"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=generator(1))
        layer.lora_gate["default"][1] = 0.0
    layer(inputs()).square().sum().backward()
    assert not layer.lora_A["default"].weight.grad[1].any()
    assert not layer.lora_B["default"].weight.grad[:, 1].any()
    assert layer.lora_A["default"].weight.grad[0].any()
    assert layer.lora_gate["default"].grad[1] != 0


def test_gates_shut_after_the_step_of_their_optimizer():
    model, sora, main, gate = start(threshold=0.3)
    before = {name: g.clone() for name, g in sora.gates().items()}
    train(model, sora, main, gate, 1)
    for name, g in sora.gates().items():
        moved = before[name] - 0.01 * torch.sign(gate.state[g]["exp_avg"])  # Adam's first step, up to eps
        assert_close(g.detach(), moved.sign() * (moved.abs() - 0.3).clamp(min=0), rtol=0, atol=2e-4)


def test_the_released_codes_updates_are_there_for_parity():
    _, sora, _, _ = start(prox="reference", threshold=0.4)
    before = {name: gate.clone() for name, gate in sora.gates().items()}
    sora.shut()
    assert all(torch.equal(gate, reference_threshold(before[name], 0.4)) for name, gate in sora.gates().items())
    soft = start(threshold=0.4)[1]
    soft.shut()
    assert sum(sora.ranks().values()) < sum(soft.ranks().values())


def test_a_threshold_may_follow_the_learning_rate():
    found = []
    for options in ({"threshold": 0.5, "threshold_times_lr": True}, {"threshold": 0.005}):
        model, sora, main, gate = start(**options)
        train(model, sora, main, gate, 2)
        found.append(torch.cat([g.detach() for g in sora.gates().values()]))
    assert_close(*found)


def test_the_penalty_is_the_mean_of_all_gates():
    _, sora, _, _ = start(l1_weight=3.0)
    assert_close(sora.l1(), 3 * torch.cat([g.abs() for g in sora.gates().values()]).sum() / 9)


def test_the_pruned_export_is_the_trained_model(tmp_path):
    model, sora, main, gate = start()
    train(model, sora, main, gate, 20)
    ranks = sora.ranks()
    assert 0 < sum(ranks.values()) < 9, ranks
    model.eval()
    answer, exported = model(inputs()), export_lora(model)
    assert {name: lora.rank for name, lora in exported.items()} == {name: rank for name, rank in ranks.items() if rank}
    assert sora.parameters_left() == sum(lora.down.numel() + lora.up.numel() for lora in exported.values())
    assert all(lora.scale == 2.0 for lora in exported.values())  # of the full rank: 6 / 3
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", exported)))
    assert_close(again(inputs()), answer, rtol=0, atol=1e-6)
    assert_close(model.merge_and_unload()(inputs()), answer, rtol=0, atol=1e-6)


def test_all_gates_shut_is_an_adapter_that_does_nothing(tmp_path):
    model, sora, main, gate = start()
    train(model, sora, main, gate, 2)
    sora.threshold = 100.0
    sora.shut()
    assert sora.parameters_left() == 0
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", export_lora(model))))
    assert torch.equal(again(inputs()), Attention()(inputs()))


def test_resuming_gives_the_same_bytes():
    straight = start()
    train(*straight, 6)
    half = start()
    train(*half, 3)
    again = start(threshold=0.9, generator=generator(8))
    for name, tensor in adapter_state(again[0], "default").items():
        tensor.data.copy_(adapter_state(half[0], "default")[name])
    again[1].load_state_dict(half[1].state_dict())
    for mine, theirs in zip(again[2:], half[2:], strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(*again, 3)
    assert all(torch.equal(p, adapter_state(straight[0], "default")[n]) for n, p in adapter_state(again[0], "default").items())


def test_a_module_without_a_rank_is_left_out():
    model, sora, _, _ = start()
    with torch.no_grad():
        sora.gates()["to_k"].zero_()
    assert sora.ranks()["to_k"] == 0
    assert sorted(export_lora(model)) == ["to_q", "to_v"]


def test_rounds_go_on_from_each_others_weights():
    model, sora, _, _ = start()
    first = []

    def once():
        first.append((sora.threshold, torch.cat([gate.detach().clone() for gate in sora.gates().values()])))
        train(model, sora, torch.optim.AdamW(sora.weights(), lr=1e-2), sora.gate_optimizer(lr=1e-2), 2)
        return float(len(first))

    rounds = prune_in_rounds(sora, [0.0, 0.3, 50.0], once)
    assert (
        [(r.threshold, r.score) for r in rounds]
        == [(0.0, 1.0), (0.3, 2.0), (50.0, 3.0)]
        == [(t, n) for n, (t, _) in enumerate(first, 1)]
    )
    assert rounds[0].parameters == 3 * (24 + 24 + 20) > rounds[1].parameters > rounds[2].parameters == 0
    assert not torch.equal(first[0][1], first[1][1])
    with pytest.raises(ValueError, match=r"prune_in_rounds\.thresholds must be in \[0, inf\), got -1"):
        prune_in_rounds(sora, [0.1, -1.0], once)


def test_a_higher_threshold_keeps_less_and_the_fit_stays():
    """The card's experiment: rank-2 teacher of width 20, r_max 8, 400 noisy samples, soft prox."""
    kept, errors, missed = {}, {}, {}
    for threshold in (0.0, 3e-3):
        ranks, found, apart = [], [], []
        for seed in range(2):
            g = generator(seed)
            net = nn.ModuleDict({"a": nn.Linear(20, 20, bias=False)})
            teacher = torch.randn(20, 2, generator=g) @ torch.randn(2, 20, generator=g) / 20
            x = torch.randn(400, 20, generator=g)
            y = x @ teacher.T + 0.05 * torch.randn(400, 20, generator=g)
            net["a"].weight.data.zero_()
            model = with_lora(net, rank=8, alpha=8, targets=("a",), seed=seed)
            sora = SoRA(model, threshold=threshold, generator=g)
            main, gate = torch.optim.AdamW(sora.weights(), lr=1e-2, weight_decay=0), sora.gate_optimizer(lr=1e-2)
            layer = lora_layers(model, "default")["a"]
            for _ in range(600):
                main.zero_grad(), gate.zero_grad()
                loss = (layer(x) - y).square().mean()
                loss.backward()
                main.step(), gate.step()
            ranks.append(sora.ranks()["a"])
            found.append(loss.item())
            apart.append(float((export_lora(model)["a"].delta() - teacher).norm() / teacher.norm()))
        kept[threshold], errors[threshold], missed[threshold] = sum(ranks) / 2, sum(found) / 2, sum(apart) / 2
    assert kept[0.0] == 8
    assert 2 <= kept[3e-3] < 6
    assert errors[3e-3] < 1.5 * errors[0.0]
    assert missed[3e-3] < missed[0.0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": -1e-3}, r"SoRA\.threshold must be in \[0, inf\), got -0\.001"),
            ({"l1_weight": -1.0}, r"SoRA\.l1_weight must be in \[0, inf\), got -1"),
        ],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    def test_a_second_time_and_other_modules(self):
        model, sora, _, _ = start()
        with pytest.raises(ValueError, match=r"SoRA must start from a plain new LoRA, got to_k which is SoRA already"):
            SoRA(model, generator=generator())
        with pytest.raises(UserError, match=r"SoRA: the state was saved for other modules: to_q, to_v, x"):
            sora.load_state_dict({"threshold": 0.1, "modules": ["to_k", "x"]})

    def test_optimizers(self):
        _, sora, main, _ = start()
        with pytest.raises(UserError, match=r"SoRA\.watch must get the optimizer that holds the gates"):
            sora.watch(main)
        with pytest.warns(UserWarning, match="gates should have no weight decay"):
            sora.watch(torch.optim.AdamW(sora.gates().values(), weight_decay=0.1))
