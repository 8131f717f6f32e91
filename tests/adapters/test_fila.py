"""FILA: the start on the forget set's directions."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from valign.adapters import AttachContext, export_lora, fila_init, initialize, relative_importance, save_peft_lora, weighted_start
from valign.adapters.fila import FILAOptions, FisherMean
from valign.checks import UserError

SHAPE = (6, 9)


def matrix(seed, *shape):
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def importance(seed=1):
    return matrix(seed).square()


def product(start, scale):
    return scale * start.up @ start.down


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(9, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def wrapped(**options):
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], **options}
    return get_peft_model(TwoLayers().double(), LoraConfig(**given), autocast_adapter_dtype=False)


def importances():
    return {"first": importance(), "second": matrix(2, 4, 6).square()}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_start_is_the_best_approximation_under_the_row_weights(scale):
    weight, rows = matrix(0), importance().sum(1).sqrt()
    start = weighted_start(weight, importance(), 3, scale=scale, eps=1e-12)
    left = (rows[:, None] * (weight - product(start, scale))).norm()
    discarded = torch.linalg.svdvals(rows[:, None] * weight)[3:].norm()
    assert_close(left, discarded, rtol=1e-6, atol=1e-9)
    u, s, vh = torch.linalg.svd(weight)
    for other in (u[:, :3] * s[:3] @ vh[:3], matrix(7, 6, 3) @ matrix(8, 3, 9)):  # PiSSA's, and any
        assert (rows[:, None] * (weight - other)).norm() > left
    assert torch.linalg.matrix_rank(product(start, scale)) == 3


def test_equal_importances_are_pissa_up_to_eps():
    weight, c = matrix(0), 0.04
    u, s, vh = torch.linalg.svd(weight)
    pissa = u[:, :3] * s[:3] @ vh[:3]
    d = (9 * c) ** 0.5
    start = weighted_start(weight, torch.full(SHAPE, c, dtype=torch.float64), 3, scale=2.0, eps=0.1)
    assert_close(product(start, 2.0), d / (d + 0.1) * pissa)


def test_the_scale_of_importances_does_not_matter_and_rows_permute():
    weight, order = matrix(0), torch.tensor([3, 1, 0, 5, 2, 4])
    one, two = (weighted_start(weight, k * importance(), 3, scale=1.0, eps=1e-12) for k in (1, 100))
    assert_close(product(one, 1.0), product(two, 1.0))
    turned = weighted_start(weight[order], importance()[order], 3, scale=1.0, eps=1e-12)
    assert_close(product(turned, 1.0), product(one, 1.0)[order])


def test_the_model_answers_as_before_and_trains_as_many_numbers():
    model, plain = wrapped(), wrapped()
    x = matrix(5, 7, 9)
    before = model(x)
    weight = model.base_model.model.first.base_layer.weight.detach().clone()
    report = fila_init(model, importances())
    assert_close(model(x), before)
    layer = model.base_model.model.first
    assert_close(layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight, weight)
    assert (report.keeps_function, report.keeps_base) == (True, False)
    assert report.trainable == plain.get_nb_trainable_parameters()[0]
    with model.disable_adapter():
        assert not torch.allclose(model(x), before, atol=1e-3)


def test_saved_it_is_plain_lora_on_the_weights_as_they_were(tmp_path):
    model = wrapped()
    fila_init(model, importances())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * matrix(3, *parameter.shape)
    x = matrix(5, 7, 9)
    save_peft_lora(tmp_path / "adapter", export_lora(model))
    again = PeftModel.from_pretrained(TwoLayers().double(), tmp_path / "adapter")
    assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)  # saved in float32
    assert again.base_model.model.first.r["default"] == 6


def test_fisher_values_are_weighed_by_tokens_and_divided():
    mean = FisherMean()
    mean.add(torch.full((2, 2), 2.0), 3)
    mean.add(torch.full((2, 2), 1.0), 1)
    assert_close(mean.mean, torch.full((2, 2), (3 * 4 + 1 * 1) / 4))
    assert_close(relative_importance(torch.full((2, 2), 8.0), torch.full((2, 2), 1.9), eps=0.1), torch.full((2, 2), 4.0))
    with pytest.warns(UserWarning, match="below eps 0.1"):
        relative_importance(torch.ones(2, 2), torch.full((2, 2), 1e-9), eps=0.1)


def test_as_an_adapter_it_takes_the_gradients_of_both_sets():
    network = TwoLayers()
    forget, retain = torch.ones(4, 9), -torch.ones(4, 9)

    def loss(x, count):
        return lambda: (network(x).square().mean(), count)

    context = AttachContext(
        network=network,
        head=(),
        targets=("first", "second"),
        steps=5,
        batch_size=4,
        first_rate=1.0,
        seed=0,
        loss=lambda number, half: network(retain).square().mean(),
        forget=[(loss(forget, 3), loss(retain, 5))],
    )
    gradients = []
    for x in (forget, retain):
        gradients.append(torch.autograd.grad(network(x).square().mean(), network.first.weight)[0].square())
    before = network.first.weight.detach().clone()
    found = FILAOptions(rank=2, eps=1e-9).attach(context).network.base_model.model.first
    expected = weighted_start(before, gradients[0] / (1e-9 + gradients[1]), 2, scale=8.0, eps=1e-9)
    assert_close(found.lora_B["default"].weight @ found.lora_A["default"].weight, expected.up @ expected.down, rtol=1e-4, atol=1e-5)


def test_without_rows_to_forget_it_says_how_to_give_them():
    bare = AttachContext(
        network=TwoLayers(), head=(), targets=("first",), steps=5, batch_size=4, first_rate=1.0, seed=0, loss=lambda *_: None
    )
    with pytest.raises(UserError, match=r"fila must have rows to forget, got none\. Give --forget FILE and --preserve ihl"):
        FILAOptions().attach(bare)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first": importance()}, "FILA.importances must cover every target, got none for second"),
        ({"first": importance().T.contiguous()}, r"The importance of first must have shape \(6, 9\), got \(9, 6\)"),
        ({"first": -importance()}, "The importance of first must be finite and >= 0"),
        ({"first": importance() / 0}, "The importance of first must be finite and >= 0"),
    ],
)
def test_importances_that_do_not_fit_are_refused_and_nothing_is_changed(changed, message, as_in_use):
    model = wrapped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = changed if "cover" in message else importances() | changed
    with pytest.raises(ValueError, match=message):
        fila_init(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_starts_ranks_and_dora_are_refused():
    with pytest.raises(ValueError, match="FILA must start from a plain new LoRA"):
        fila_init(wrapped(use_dora=True), importances())
    with pytest.raises(ValueError, match=r"FILA\.rank must be in \[1, 4\] for second, got 5"):
        fila_init(wrapped(r=5), importances())
    with pytest.raises(ValueError, match=r"weighted_start\.scale must be in \(0, inf\), got 0"):
        weighted_start(matrix(0), importance(), 2, scale=0.0)
    model = wrapped()
    initialize(model, "fila", importances=importances())
    with pytest.raises(ValueError, match="FILA must start from a plain new LoRA, got first which is FILA already"):
        fila_init(model, importances())


def test_rows_without_importance_start_at_zero_and_are_counted():
    dead = importance()
    dead[2] = 0
    with pytest.warns(UserWarning, match="1 rows of the weight have no importance and start at 0"):
        start = weighted_start(matrix(0), dead, 3, scale=1.0)
    assert (start.up[2] == 0).all()
