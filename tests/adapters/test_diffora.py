"""DiffoRA: two levels that leave each other alone, selection by rank, folding and sharing exact, resume, refusals."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, inputs, trainable, with_lora
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from valign.adapters import DiffoRA, adapter_state, export_lora, gram_matrix, halves, save_peft_lora, share_unselected
from valign.adapters.diffora import choose, position_of
from valign.adapters.factors import lora_layers
from valign.checks import UserError

TARGET = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def loss_on(model, seed):
    return lambda: (model(inputs(seed=seed)) - TARGET).square().mean()


def start(model=None, **options):
    model = model or with_lora()
    return model, DiffoRA(model, **{"steps": 10, "lr": 1e-2, **options})


def search(model, found, steps):
    for step in range(steps):
        found.step(loss_on(model, 3 + step % 2), loss_on(model, 6))


@pytest.mark.parametrize(
    ("module", "row", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3", "self_attn.q_proj"),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "mid_block.attentions.0.transformer_blocks.0",
            "attn1.to_out.0",
        ),
        ("to_q", "", "to_q"),
        ("0.to_q", "0", "to_q"),
    ],
)
def test_places(module, row, kind):
    assert position_of(module) == (row, kind)


@given(st.dictionaries(st.from_regex(r"l\.[0-3]\.[a-f]", fullmatch=True), st.floats(0, 1), min_size=2), st.floats(0.05, 1))
@pytest.mark.filterwarnings("ignore:DiffoRA has a layer")
def test_the_budget_is_exact_and_order_does_not_matter(weights, ratio):
    rows = {}
    for module in weights:
        rows.setdefault(position_of(module).row, []).append(module)
    kept = choose(weights, ratio=ratio)
    assert kept == choose(dict(reversed(weights.items())), ratio=ratio) == sorted(kept)
    for modules in rows.values():
        chosen = [module for module in modules if module in kept]
        assert len(chosen) == max(1, round(ratio * len(modules)))
        assert min(weights[m] for m in chosen) >= max([weights[m] for m in modules if m not in kept], default=0)
    assert len(choose(weights, ratio=ratio, scope="global")) == max(1, round(ratio * len(weights)))


def test_equals_go_to_the_first_name():
    assert choose({"l.0.b": 0.5, "l.0.a": 0.5, "l.0.c": 0.5}, ratio=0.34) == ["l.0.a"]


@given(st.integers(2, 40), st.integers(0, 5))
def test_halves_are_disjoint_and_cover(count, seed):
    one, two = halves(count, generator=torch.Generator().manual_seed(seed))
    assert sorted(one + two) == list(range(count))
    assert abs(len(one) - len(two)) <= 1


def test_the_defaults():
    found = DiffoRA(with_lora(), steps=200)
    assert (found.warmup_steps, found.clip, found.budget) == (20, 1.0, 0.0)
    assert (found.upper.defaults["lr"], found.upper.defaults["betas"]) == (3e-2, (0.5, 0.999))
    assert found.upper.defaults["weight_decay"] == found.lower.defaults["weight_decay"] == 0
    assert set(found.select().gates.values()) == {0.5}


@pytest.mark.parametrize("relaxation", ["sigmoid", "row_softmax"])
def test_the_start_is_the_base_and_choices_have_no_gradient_yet(relaxation):
    model, found = start(relaxation=relaxation)
    with torch.no_grad():
        for index, choice in enumerate(found.choices().values()):
            choice.fill_(index - 1.0)
    assert torch.equal(model(inputs()), Attention()(inputs()))
    loss_on(model, 3)().backward()
    assert all(choice.grad == 0 for choice in found.choices().values())
    gates = [found.gate_of(layer).item() for layer in found.layers.values()]
    expected = torch.tensor([-1.0, 0.0, 1.0])
    expected = expected.sigmoid() if relaxation == "sigmoid" else 3 * expected.softmax(0)
    assert gates == pytest.approx(expected.tolist())


def test_all_chosen_is_plain_lora():
    model, found = start()
    plain = with_lora()
    with torch.no_grad():
        for choice in found.choices().values():
            choice.fill_(1e4)
    other = torch.optim.AdamW(trainable(plain).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        found.step(loss_on(model, 3), loss_on(model, 6))
        other.zero_grad()
        loss_on(plain, 3)().backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(plain).values()), 1.0)
        other.step()
    assert_close(model(inputs()), plain(inputs()))
    assert found.select(ratio=1.0).selected == ("to_k", "to_q", "to_v")


def test_each_level_leaves_the_other_alone():
    model, found = start(warmup=0.2)
    names = {"w": lambda: [p.clone() for p in found.weights()], "a": lambda: [p.clone() for p in found.choices().values()]}
    before = {kind: read() for kind, read in names.items()}
    search(model, found, 2)  # the warm-up
    assert all(torch.equal(x, y) for x, y in zip(before["a"], names["a"](), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(before["w"], names["w"](), strict=True))
    middle = {}

    def held_out():
        middle.update({kind: read() for kind, read in names.items()})
        return loss_on(model, 6)()

    found.step(loss_on(model, 3), held_out)
    assert all(torch.equal(x, y) for x, y in zip(before["a"], middle["a"], strict=True))  # the lower step left the choices
    assert all(torch.equal(x, y) for x, y in zip(middle["w"], names["w"](), strict=True))  # the upper step left the weights
    assert not any(torch.equal(x, y) for x, y in zip(middle["a"], names["a"](), strict=True))


def test_micro_batches_add_up_in_both_levels():
    ends = []
    for parts in (False, True):
        model, found = start(warmup=0.0, budget=0.1)

        def losses(one, two, model=model, parts=parts):
            each = [loss_on(model, seed) for seed in (one, two)]
            return (lambda: (loss() for loss in each)) if parts else (lambda: sum(loss() for loss in each))

        for _ in range(3):
            found.step(losses(3, 4), losses(5, 6))
        ends.append([p.detach() for p in (*found.weights(), *found.choices().values())])
    assert all(torch.allclose(whole, summed, atol=1e-5) for whole, summed in zip(*ends, strict=True))


def test_gradients_of_both_levels_may_be_reduced():
    model, found = start(warmup=0.0, reduce=torch.zeros_like)
    before = [p.clone() for p in (*found.weights(), *found.choices().values())]
    search(model, found, 2)
    assert all(torch.equal(x, y) for x, y in zip(before, (*found.weights(), *found.choices().values()), strict=True))


@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_gradients_of_both_levels_are_clipped_to_the_norm(clip):
    model, found = start(warmup=0.0, clip=clip)
    norms = {"lower": [], "upper": []}
    for name, seen in norms.items():
        optimizer = getattr(found, name)

        def note(optimizer, *_, seen=seen):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())

        optimizer.register_step_pre_hook(note)
    for size in (1e5, 1e-5):
        found.step(lambda size=size: size * loss_on(model, 3)(), lambda size=size: size * loss_on(model, 6)())
    for seen in norms.values():
        assert seen[0] == pytest.approx(clip, rel=1e-4)
        assert 0 < seen[1] < 1e-2 * clip


def test_a_budget_pulls_the_choices_down():
    gates = []
    for budget in (0.0, 5.0):
        model, found = start(budget=budget, clip=1e9)
        search(model, found, 6)
        gates.append(sum(found.select().gates.values()))
    assert gates[1] < gates[0]


def test_keeping_the_factors_changes_no_answer_of_selected_modules():
    model, found = start()
    search(model, found, 6)
    outcome = found.select(ratio=1.0)
    answer = model(inputs())
    found.keep(outcome)
    assert_close(model(inputs()), answer, rtol=0, atol=1e-6)
    assert not any("choice" in name for name, _ in model.named_parameters())
    model, found = start()
    search(model, found, 6)
    outcome = found.select(ratio=0.4)
    found.keep(outcome)
    model.set_adapter("default")  # does not bring the others back
    assert list(export_lora(model)) == list(outcome.selected)
    assert len(trainable(model)) == 2 * len(outcome.selected)
    assert outcome.table() == {"": dict(sorted(outcome.gates.items()))}


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["b"](layer["a"](x).tanh())
        return x


def test_unselected_modules_share_one_pair(tmp_path):
    torch.manual_seed(0)
    model = with_lora(Stack(), rank=2, targets=("a", "b"))
    assert share_unselected(model, ["layers.0.a", "layers.1.b"]) == 2
    layers = lora_layers(model, "default")
    assert layers["layers.1.a"].lora_A["default"].weight is layers["layers.2.a"].lora_A["default"].weight
    assert layers["layers.0.b"].lora_B["default"].weight is layers["layers.2.b"].lora_B["default"].weight
    assert layers["layers.0.a"].lora_A["default"].weight is not layers["layers.1.a"].lora_A["default"].weight
    assert sum(p.numel() for p in trainable(model).values()) == (2 + 2) * 2 * (6 + 6)
    free = copy.deepcopy(model)
    users = lora_layers(free, "default")
    for name in ("layers.1.a", "layers.2.a"):
        users[name].lora_B["default"].weight = nn.Parameter(users[name].lora_B["default"].weight.detach().clone())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for network in (model, free):
        network(x).square().sum().backward()
    total = sum(users[name].lora_B["default"].weight.grad for name in ("layers.1.a", "layers.2.a"))
    assert_close(layers["layers.1.a"].lora_B["default"].weight.grad, total)
    with torch.no_grad():
        layers["layers.1.a"].lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Stack(), str(save_peft_lora(tmp_path / "lora", export_lora(model))))
    assert_close(again(x), model(x))
    with pytest.raises(UserError, match=r"share_unselected\.selected must name modules of the LoRA, got layers\.9\.a"):
        share_unselected(model, ["layers.9.a"])


def test_unequal_shapes_and_ranks_of_a_kind_do_not_share():
    wide = nn.ModuleDict({str(i): nn.ModuleDict({"a": nn.Linear(4, out)}) for i, out in enumerate((4, 4, 6, 4))})
    model = with_lora(wide, rank=2, targets=("a",), rank_pattern={"3.a": 1})
    assert share_unselected(model, []) == 3


def test_kept_factors_may_share_too():
    model, found = start(with_lora(Stack(), rank=2, targets=("a", "b")))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        found.step(lambda: model(x).square().mean(), lambda: model(x).square().mean())
    outcome = found.select(ratio=1 / 3, scope="global")
    found.keep(outcome, share=True)
    others = {name: lora for name, lora in export_lora(model).items() if name not in outcome.selected}
    assert len(others) == 4
    assert not any(lora.delta().any() for lora in others.values())
    assert len({id(layer.lora_B["default"].weight) for layer in found.layers.values()}) < 6


def test_the_gram_matrix_of_the_diagnostic():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(4, 3, generator=g, dtype=torch.float64)
    for slope in (lambda z: (z > 0).double(), lambda z: 1 - z.tanh() ** 2):
        expected = [[(a @ b * (slope(weight @ a) @ slope(weight @ b)) / 7).item() for b in x] for a in x]
        found = gram_matrix(weight, x, slope=slope)
        assert_close(found, torch.tensor(expected, dtype=torch.float64))
        assert torch.linalg.eigvalsh(found)[0] > -1e-12
    assert_close(gram_matrix(weight, x), gram_matrix(weight, x, slope=lambda z: (z > 0).double()))


def test_resuming_gives_the_same_bytes():
    straight = start()
    search(*straight, 8)
    half = start()
    search(*half, 4)
    again = start()
    for name, tensor in adapter_state(again[0], "default").items():
        tensor.data.copy_(adapter_state(half[0], "default")[name])
    again[1].load_state_dict(copy.deepcopy(half[1].state_dict()))
    search(*again, 4)
    assert all(torch.equal(p, adapter_state(straight[0], "default")[n]) for n, p in adapter_state(again[0], "default").items())


def test_useful_modules_rank_first():
    """The card's experiment: six parallel 12 x 12 maps, 1 and 4 need a rank-2 update; 60 + 60 noisy samples."""
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        net = nn.ModuleDict({f"m{i}": nn.Linear(12, 12, bias=False) for i in range(6)})
        for layer in net.values():
            layer.weight.data.zero_()
        teacher = {i: torch.randn(12, 2, generator=g) @ torch.randn(2, 12, generator=g) / 4 for i in (1, 4)}
        x = torch.randn(120, 6, 12, generator=g)
        y = torch.stack([x[:, i] @ teacher[i].T if i in teacher else torch.zeros(120, 12) for i in range(6)], 1)
        y = y + 0.5 * torch.randn(y.shape, generator=g)
        model = with_lora(net, rank=4, alpha=4, targets=[f"m{i}" for i in range(6)], seed=seed)
        found = DiffoRA(model, steps=150, lr=2e-2, choice_lr=5e-2, clip=1e9)
        layers = lora_layers(model, "default")

        def loss(rows, x=x, y=y, layers=layers):
            return (torch.stack([layers[f"m{i}"](x[rows, i]) for i in range(6)], 1) - y[rows]).square().mean() * 6

        for _ in range(150):
            found.step(lambda: loss(slice(0, 60)), lambda: loss(slice(60, 120)))
        assert found.select(ratio=1 / 3, scope="global").selected == ("m1", "m4"), (seed, found.select().gates)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, r"DiffoRA\.steps must be in \[1, inf\), got 0"),
            ({"lr": 0.0}, r"DiffoRA\.lr must be in \(0, inf\), got 0"),
            ({"warmup": 1.0}, r"DiffoRA\.warmup must be in \[0, 1\), got 1\.0"),
            ({"budget": -1.0}, r"DiffoRA\.budget must be in \[0, inf\), got -1"),
        ],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    @pytest.mark.parametrize("ratio", [0.0, 1.5])
    def test_ratios(self, ratio):
        with pytest.raises(ValueError, match=r"choose\.ratio must be in \(0, 1\], got"):
            choose({"a": 1.0}, ratio=ratio)

    def test_a_single_kind_and_too_little_data(self):
        with pytest.warns(UserWarning, match="a layer with fewer than 2 kinds"):
            choose({"l.0.a": 1.0, "l.1.a": 0.5})
        with pytest.raises(UserError, match=r"DiffoRA must split the data in two, got 1 rows"):
            halves(1, generator=torch.Generator())
        with pytest.raises(UserError, match=r"got 7 rows for two batches of 4\. Give it more data"):
            halves(7, generator=torch.Generator(), batch_size=4)

    def test_another_search(self):
        model, found = start()
        with pytest.raises(UserError, match=r"DiffoRA: the state was saved for other modules: to_q, to_v"):
            found.load_state_dict({**found.state_dict(), "modules": ["to_k"]})
        with pytest.raises(ValueError, match=r"DiffoRA must start from a plain new LoRA, got to_k which is DiffoRA already"):
            DiffoRA(model, steps=1)
