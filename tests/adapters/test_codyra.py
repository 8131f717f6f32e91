"""CoDyRA: the threshold's path against a plain loop, exact merging, tasks in turn, resume, the scores, refusals."""

import copy

import pytest
import torch
from networks import Attention, inputs, trainable, with_lora
from torch import nn
from torch.testing import assert_close

from valign.adapters import CoDyRA, adapter_state, continual_scores, export_lora, image_text_loss, task_columns
from valign.adapters.codyra import threshold_trace
from valign.adapters.factors import lora_layers
from valign.adapters.gate import reference_threshold
from valign.checks import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(model=None, *, watched=True, **options):
    model = model or with_lora()
    codyra = CoDyRA(model, **{"steps": 12, "levels": 3, "max_threshold": 0.2, "generator": generator(), **options})
    optimizer = torch.optim.AdamW(codyra.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.9999))
    if watched:
        codyra.watch(optimizer)
    return model, codyra, optimizer


def train(model, optimizer, steps):
    x, target = inputs(seed=3), torch.randn(2, 5, 8, generator=generator(4))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("steps", "largest", "levels", "dense"), [(500, 5e-3, 50, 0.5), (12, 0.2, 3, 0.5), (40, 1.0, 7, 0.0), (9, 1.0, 1, 0.3)]
)
def test_the_path_of_the_threshold(steps, largest, levels, dense):
    index, start_at, expected = 0, int(dense * steps), []
    every = (steps - start_at) // levels
    table = [largest * i / max(1, levels - 1) for i in range(levels)]
    for it in range(steps):
        if it >= start_at and it % every == 0:
            index = min(index + 1, levels - 1)
        expected.append(table[index] if it > start_at else 0)
    assert threshold_trace(steps, max_threshold=largest, levels=levels, dense=dense) == pytest.approx(expected)


def test_the_function_is_kept_at_the_start_and_the_scale_is_one():
    model, _, _ = start(with_lora(alpha=24))
    assert torch.equal(model(inputs()), Attention()(inputs()))
    layer = lora_layers(model, "default")["to_q"]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
    x, gate = inputs(), layer.lora_gate["default"]
    expected = layer.base_layer(x) + (gate * (x @ layer.lora_A["default"].weight.T)) @ layer.lora_B["default"].weight.T
    assert_close(layer(x), expected)


def test_nothing_is_shut_without_a_threshold():
    model, codyra, optimizer = start(max_threshold=0.0)
    train(model, optimizer, 12)
    plain, _, other = start(max_threshold=0.2, watched=False)
    train(plain, other, 12)
    assert all(torch.equal(p, trainable(plain)[n]) for n, p in trainable(model).items())
    assert set(codyra.ranks().values()) == {3}


def test_the_released_codes_updates_are_there_for_parity():
    _, codyra, _ = start(prox="reference", dense=0.0, levels=2, max_threshold=0.4)
    before = [layer.lora_gate["default"].clone() for layer in lora_layers(codyra.model, "default").values()]
    codyra.iteration = 11
    codyra.after_step()
    for layer, gate in zip(lora_layers(codyra.model, "default").values(), before, strict=True):
        assert torch.equal(layer.lora_gate["default"], reference_threshold(gate, 0.4))


def test_merging_is_the_adapters_answer_and_then_nothing():
    model, codyra, optimizer = start(max_threshold=0.3)
    before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(model, "default").items()}
    train(model, optimizer, 12)
    answer, exported = model(inputs()), export_lora(model)
    ranks = codyra.finish()
    assert 0 < sum(ranks.values()) < 9
    assert_close(model(inputs()), answer, rtol=0, atol=2e-6)
    with model.disable_adapter():
        assert_close(model(inputs()), answer, rtol=0, atol=2e-6)
    for name, layer in lora_layers(model, "default").items():
        change = layer.base_layer.weight - before[name]
        assert int((torch.linalg.svdvals(change) > 1e-5).sum()) <= ranks[name]
        assert_close(change, exported[name].delta(), rtol=0, atol=1e-6) if ranks[name] else None


def test_no_surviving_rank_leaves_the_weight_bit_for_bit():
    model, codyra, optimizer = start(max_threshold=50.0)
    before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(model, "default").items()}
    train(model, optimizer, 12)
    assert set(codyra.finish().values()) == {0}
    assert all(torch.equal(layer.base_layer.weight, before[n]) for n, layer in lora_layers(model, "default").items())


def test_a_higher_threshold_keeps_no_more():
    kept = []
    for largest in (0.0, 0.1, 0.3, 50.0):
        model, codyra, optimizer = start(max_threshold=largest)
        train(model, optimizer, 12)
        kept.append(sum(codyra.ranks().values()))
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (9, 0)


def test_tasks_follow_each_other():
    model, codyra, optimizer = start()
    train(model, optimizer, 12)
    codyra.finish()
    after = model(inputs())
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert_close(model(inputs()), after)
    model, codyra, optimizer = start(model, adapter="second")
    assert_close(model(inputs()), after)
    train(model, optimizer, 12)
    assert codyra.finish()


def test_resuming_gives_the_same_bytes():
    straight = start()
    train(straight[0], straight[2], 12)
    half = start()
    train(half[0], half[2], 8)
    again = start(generator=generator(7))
    for name, tensor in adapter_state(again[0], "default").items():
        tensor.data.copy_(adapter_state(half[0], "default")[name])
    again[1].load_state_dict(copy.deepcopy(half[1].state_dict()))
    again[2].load_state_dict(copy.deepcopy(half[2].state_dict()))
    train(again[0], again[2], 4)
    assert straight[1].ranks() == again[1].ranks()
    assert all(torch.equal(p, adapter_state(straight[0], "default")[n]) for n, p in adapter_state(again[0], "default").items())


def forget(max_threshold):
    """The card's experiment: one 32 x 32 map learns three rank-1 tasks of 80 noisy samples in turn.

    Returns the mean surviving rank, and the error on the original map at the end.
    """
    g = generator()
    net = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False)})
    original = torch.randn(32, 32, generator=g) / 32**0.5
    net["a"].weight.data = original.clone()
    ranks = []
    for _ in range(3):
        change = torch.randn(32, 1, generator=g) @ torch.randn(1, 32, generator=g) / 32**0.5
        x = torch.randn(80, 32, generator=g)
        y = x @ (original + change).T + 0.1 * torch.randn(80, 32, generator=g)
        model = with_lora(net, rank=16, targets=("a",))
        codyra = CoDyRA(model, steps=300, max_threshold=max_threshold, generator=g)
        optimizer = torch.optim.AdamW(codyra.parameters(), lr=1e-2, weight_decay=0.0)
        codyra.watch(optimizer)
        for _ in range(300):
            optimizer.zero_grad()
            (lora_layers(model, "default")["a"](x) - y).square().mean().backward()
            optimizer.step()
        ranks.append(codyra.finish()["a"])
        net = model.unload()
    return sum(ranks) / 3, float((net["a"].weight - original).square().sum())


def test_less_rank_forgets_less():
    (full, far), (few, near) = forget(0.0), forget(0.1)
    assert full == 16
    assert few < 8
    assert near < far


def test_scores_of_a_toy_table():
    table = [[0.9, 0.2, 0.0], [0.8, 0.7, 0.4], [0.7, 0.6, 0.9]]
    scores = continual_scores(table)
    assert scores.transfer == pytest.approx((0.2 + (0.0 + 0.4) / 2) / 2)  # a true 0 counts
    assert scores.average == pytest.approx(5.2 / 9)
    assert scores.last == pytest.approx(2.2 / 3)
    assert scores.backward == pytest.approx(((0.7 - 0.9) + (0.6 - 0.7)) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_images_and_texts(smoothing):
    logits = torch.randn(4, 5, generator=generator(), dtype=torch.float64)  # two classes of an earlier task, three of this one
    labels, columns = torch.tensor([2, 4, 2, 2]), range(2, 5)
    probabilities, mine = logits[:, 2:].log_softmax(1), labels - 2
    images = -sum((1 - smoothing) * probabilities[i, c] + smoothing * probabilities[i].mean() for i, c in enumerate(mine)) / 4
    texts = 0.0
    for text in range(3):  # the second has no image: it adds 0
        over_batch = logits[:, 2 + text].log_softmax(0)
        texts = texts - sum(over_batch[i] for i, c in enumerate(mine) if c == text) / 3
    options = {"columns": columns, "label_smoothing": smoothing}
    assert_close(image_text_loss(logits, labels, **options), images + texts)
    assert_close(image_text_loss(logits, labels, **options, both=False), images)
    assert_close(image_text_loss(logits[:, 2:], mine, label_smoothing=smoothing), images + texts)
    with pytest.raises(ValueError, match=r"image_text_loss\.labels must be in \[2, 5\), got \[2, 1\]\. Use one task's images"):
        image_text_loss(logits[:2], torch.tensor([2, 1]), columns=columns)


def test_tasks_have_classes_of_their_own():
    assert task_columns([["a", "b"], [], ["c"]]) == [range(2), range(2, 2), range(2, 3)]
    with pytest.raises(UserError, match=r"task_columns\.tasks must have classes of their own, got 'b' twice\. Rename"):
        task_columns([["a", "b"], ["b", "c"]])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_threshold": -1.0}, r"threshold_trace\.max_threshold must be in \[0, inf\), got -1"),
            ({"levels": 0}, r"threshold_trace\.levels must be in \[1, inf\), got 0"),
            ({"dense": 1.0}, r"threshold_trace\.dense must be in \[0, 1\), got 1\.0"),
            ({"levels": 7}, r"must leave a step per level after the dense ones, got 6 for 7"),
        ],
    )
    def test_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    def test_tied_and_half_precision_weights(self):
        with pytest.raises(ValueError, match=r"CoDyRA must have weights of its own, got to_k, which is tied"):
            start(with_lora(Attention(tie=True)))
        with pytest.warns(UserWarning, match="merges into half-precision weights"):
            start(with_lora(Attention(dtype=torch.bfloat16)))

    def test_quantized_weights(self):
        model = with_lora()
        layer = model.base_model.model.to_q.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"CoDyRA must read float weights, got to_q in torch\.int8"):
            start(model)

    def test_too_many_steps_a_second_merge_and_another_schedule(self):
        model, codyra, optimizer = start()
        train(model, optimizer, 12)
        with pytest.raises(UserError, match=r"CoDyRA\.steps must be the steps of the task, got 12 and one more"):
            train(model, optimizer, 1)
        codyra.finish()
        with pytest.raises(UserError, match=r"CoDyRA\.finish must run once per task"):
            codyra.finish()
        with pytest.raises(UserError, match=r"CoDyRA: the state was saved with another schedule"):
            start(max_threshold=0.1)[1].load_state_dict(codyra.state_dict())
        with pytest.raises(UserError, match=r"CoDyRA: the state was saved for other modules: to_v\. Use the same LoRA"):
            start()[1].load_state_dict({**codyra.state_dict(), "modules": ["to_k", "to_q"]})

    @pytest.mark.parametrize("table", [[[1.0]], [[1.0, 2.0], [3.0]]])
    def test_tables(self, table):
        with pytest.raises(ValueError, match=r"continual_scores\.table must be square"):
            continual_scores(table)
