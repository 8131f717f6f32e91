"""SOMF: masks, their rescaling, what is learned, what is exported; in the product's and in the factors' space."""

import pytest
import torch
from realign_data import named, tensors
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging.deltas import NamedDeltas
from valign.merging.realign import AdapterChanges, RealignContext, Somf, Vectors, somf
from valign.merging.realign.somf import concrete, masked_space, rescaled
from valign.models.files.adapter_files import LoraFactors
from valign.models.files.tensor_stream import stream_tensors


class Linear2:
    """Preferences of a linear classifier: the safe class is to be more likely than the other."""

    def __init__(self, weight, inputs, labels):
        self.network = nn.Linear(weight.shape[1], 2, bias=False)
        self.network.weight.data = weight.clone()
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def fingerprint(self):
        return "linear"

    def score(self, places, weights, draw):
        logits = functional_call(self.network, dict(weights), (self.inputs[list(places)],)).log_softmax(1)
        safe = self.labels[list(places)]
        return torch.stack([logits.gather(1, safe[:, None])[:, 0], logits.gather(1, 1 - safe[:, None])[:, 0]], dim=1)


@pytest.fixture
def world():
    """Inputs 0-7 decide safety, 8-15 the task; the fine-tuning is right about the task, and random about safety."""
    g = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(8, generator=g), dim=0)
    safe = torch.zeros(2, 16)
    safe[1, :8] = 2 * direction
    change = 0.1 * torch.randn(2, 16, generator=g)
    change[1, :8] -= 3 * direction
    inputs = torch.randn(64, 16, generator=g)
    inputs[:, 8:] *= 0.1
    return safe, change, inputs, (inputs[:, :8] @ direction > 0).long()


def accuracy(weight, inputs, labels):
    return float((F.linear(inputs, weight).argmax(1) == labels).float().mean())


def test_learning_a_mask_brings_safety_back(world, tmp_path):
    safe, change, inputs, labels = world
    assert accuracy(safe, inputs, labels) == 1.0
    assert accuracy(safe + change, inputs, labels) < 0.3
    objective = Linear2(safe, inputs, labels)
    ((name, delta),) = somf({"t": named({"weight": change})}, objective, tmp_path, steps=150, learning_rate=0.1, beta=1.0)
    assert name == "weight"
    assert accuracy(safe + delta.delta(), inputs, labels) > 0.9
    assert torch.equal(objective.network.weight, safe)  # the live model is as it was


def test_only_the_logits_train_one_for_each_entry(world, tmp_path):
    from valign.merging.realign.somf import MaskTask

    safe, change, inputs, labels = world
    vectors = Vectors(AdapterChanges(NamedDeltas({}), ""), {"t": AdapterChanges(named({"weight": change}), "")})
    task = MaskTask(Somf(), vectors, masked_space("product", vectors), Linear2(safe, inputs, labels))
    assert sum(p.numel() for p in task.parameters()) == change.numel()
    task.gradients(0)
    assert all(p.grad is not None for p in task.parameters())
    assert task.objective.network.weight.grad is None


def test_the_first_loss_is_that_of_no_margin_without_noise():
    assert_close(rescaled(torch.full((3, 4), 0.3), "detach"), torch.ones(3, 4))  # a constant mask changes nothing
    assert_close(rescaled(torch.full((3, 4), 1e-6), "mean"), torch.ones(3, 4))  # however small it is
    assert_close(rescaled(torch.full((3, 4), 0.3), "none"), torch.full((3, 4), 0.3))


def test_the_means_gradient_is_what_tells_the_rescalings_apart():
    logits = {how: torch.zeros(1, 2).requires_grad_(True) for how in ("detach", "mean")}
    for how, one in logits.items():
        rescaled(one.sigmoid(), how)[0, 0].backward()  # only the first entry matters
    # d(m0/c)/dz0 = 0.25/0.5 with the mean held; through the mean also -m0/c^2 * 0.25/2 for both entries
    assert_close(logits["detach"].grad, torch.tensor([[0.5, 0.0]]))
    assert_close(logits["mean"].grad, torch.tensor([[0.25, -0.25]]))


def test_cold_masks_are_binary_with_the_logits_probability():
    logits = torch.full((100, 100), 0.8)
    cold = concrete(logits, 1e-3, torch.Generator().manual_seed(0))
    assert ((cold < 1e-3) | (cold > 1 - 1e-3)).float().mean() > 0.99
    for temperature in (1e-3, 0.5):
        draw = concrete(logits, temperature, torch.Generator().manual_seed(1))
        assert float((draw > 0.5).float().mean()) == pytest.approx(float(torch.tensor(0.8).sigmoid()), abs=0.015)


def masked(logits, tasks, tmp_path, **options):
    path = tmp_path / f"masks-{len(list(tmp_path.iterdir()))}.safetensors"
    stream_tensors(path, logits.items())
    vectors = Vectors(AdapterChanges(NamedDeltas({}), ""), {name: AdapterChanges(task, "") for name, task in tasks.items()})
    context = RealignContext()
    change = Somf(masks=path, **options).prepare(vectors, context)
    return {at.name: change(at) for at in vectors.items()}, context.results


def test_a_constant_mask_is_the_fine_tuned_model_and_without_rescaling_an_empty_one_the_start(tmp_path):
    task = tensors(2, {"w": (4, 5)})
    for logit in (0.0, -30.0):
        made, _ = masked({"w": torch.full((4, 5), logit)}, {"t": named(task)}, tmp_path)
        assert_close(made["w"].delta(), task["w"])
    made, _ = masked({"w": torch.full((4, 5), -30.0)}, {"t": named(task)}, tmp_path, rescale="none")
    assert float(made["w"].delta().abs().max()) < 1e-9


def test_a_binary_mask_that_empties_a_tensor_gives_zero_and_says_so(tmp_path, caplog):
    task = tensors(2, {"w": (4, 5), "v": (3, 3)})
    made, found = masked(
        {"w": torch.full((4, 5), -1.0), "v": torch.tensor([[1.0, -1.0, 1.0]] * 3)}, {"t": named(task)}, tmp_path, export="binary"
    )
    assert float(made["w"].delta().abs().max()) == 0.0
    assert found["emptied"] == ["w"]
    assert "the mask of w is empty" in caplog.text
    assert_close(made["v"].delta(), task["v"] * torch.tensor([1.0, 0.0, 1.0]) * 1.5)


def test_strength_goes_from_the_fine_tuned_model_to_the_mask(tmp_path):
    task, logits = tensors(2, {"w": (4, 5)}), {"w": tensors(3, {"w": (4, 5)})["w"]}
    ends = [masked(logits, {"t": named(task)}, tmp_path, strength=s)[0]["w"].delta() for s in (0.0, 0.5, 1.0)]
    assert torch.equal(ends[0], task["w"])
    assert_close(ends[1], (ends[0] + ends[2]) / 2)
    mask = logits["w"].sigmoid()
    assert_close(ends[2], task["w"] * mask / mask.mean())


def test_several_models_share_the_mask_and_need_a_fusion(tmp_path):
    one, two = tensors(2, {"w": (4, 5)}), tensors(3, {"w": (4, 5)})
    logits = {"w": tensors(4, {"w": (4, 5)})["w"]}
    mask = logits["w"].sigmoid() / logits["w"].sigmoid().mean()
    both = {"one": named(one), "two": named(two)}
    made, _ = masked(logits, both, tmp_path, fuse="task-arithmetic")
    assert_close(made["w"].delta(), 0.3 * mask * (one["w"] + two["w"]))
    turned, _ = masked(logits, dict(reversed(both.items())), tmp_path, fuse="task-arithmetic")
    assert_close(turned["w"].delta(), made["w"].delta())
    assert_close(masked(logits, both, tmp_path, fuse="mean")[0]["w"].delta(), 0.5 * mask * (one["w"] + two["w"]))
    with pytest.raises(UserError, match="Somf must know how 2 fine-tuned models become one, got fuse 'none'"):
        masked(logits, both, tmp_path)


def pair(seed, rank=2, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, 5, generator=g), torch.randn(4, rank, generator=g), scale)


def test_factors_that_go_on_from_the_safety_adapter_are_masked_as_differences(tmp_path):
    safe, tuned = pair(0), pair(1)
    path = tmp_path / "masks.safetensors"
    down, up = tensors(5, {"d": (2, 5)})["d"], tensors(6, {"u": (4, 2)})["u"]
    stream_tensors(path, {"w.down": down, "w.up": up}.items())
    vectors = Vectors(
        AdapterChanges(NamedDeltas({"w": safe}), ""), {"t": AdapterChanges(NamedDeltas({"w": tuned}), "")}, continued=True
    )
    change = Somf(masks=path, rescale="none").prepare(vectors, RealignContext())
    made = change(vectors.read("w"))
    new_down = safe.down + down.sigmoid() * (tuned.down - safe.down)
    new_up = safe.up + up.sigmoid() * (tuned.up - safe.up)
    assert isinstance(made, LoraFactors)
    assert_close(made.delta() + safe.delta(), new_up @ new_down)


@pytest.mark.parametrize(
    ("tuned", "why"), [(pair(1, rank=3), "different ranks or scales of w"), (pair(1, scale=2.0), "different ranks or scales of w")]
)
def test_factors_of_other_rank_or_scale_are_refused_and_their_product_taken(tuned, why):
    vectors = Vectors(
        AdapterChanges(NamedDeltas({"w": pair(0)}), ""), {"t": AdapterChanges(NamedDeltas({"w": tuned}), "")}, continued=True
    )
    with pytest.raises(UserError, match=f"somf can mask factors only of adapters that go together, got {why}. Set --space product"):
        masked_space("factors", vectors)
    assert masked_space("auto", vectors).name == "product"


def test_factors_far_from_the_safety_adapter_are_warned_about(caplog):
    close = LoraFactors(pair(0).down + 0.1, pair(0).up + 0.1, 1.0)
    for tuned, warned in ((close, False), (pair(7), True)):
        caplog.clear()
        vectors = Vectors(
            AdapterChanges(NamedDeltas({"w": pair(0)}), ""), {"t": AdapterChanges(NamedDeltas({"w": tuned}), "")}, continued=True
        )
        assert masked_space("auto", vectors).name == "factors"
        assert ("were they trained on from it" in caplog.text) == warned


def test_a_stopped_learning_goes_on_to_the_same_masks(world, tmp_path):
    from valign.merging.realign.somf import MASKS
    from valign.models.files.tensor_stream import TensorIndex

    safe, change, inputs, labels = world
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"steps": 6, "checkpoint_every": 2}
    dict(somf({"t": named({"weight": change})}, Linear2(safe, inputs, labels), whole, **options))

    class Stops(Linear2):
        def score(self, places, weights, draw):
            if draw == 5:
                raise KeyboardInterrupt
            return super().score(places, weights, draw)

    with pytest.raises(KeyboardInterrupt):
        dict(somf({"t": named({"weight": change})}, Stops(safe, inputs, labels), cut, **options))
    dict(somf({"t": named({"weight": change})}, Linear2(safe, inputs, labels), cut, **options))
    assert torch.equal(TensorIndex(whole / MASKS).read("weight"), TensorIndex(cut / MASKS).read("weight"))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_coarse_masks_have_fewer_values(granularity, world, tmp_path):
    from valign.merging.realign.somf import MASKS
    from valign.models.files.tensor_stream import TensorIndex

    safe, change, inputs, labels = world
    dict(somf({"t": named({"weight": change})}, Linear2(safe, inputs, labels), tmp_path, steps=2, granularity=granularity))
    assert TensorIndex(tmp_path / MASKS).read("weight").shape == {"row": (2, 1), "tensor": (1, 1)}[granularity]


def test_bad_input(world, tmp_path):
    safe, change, inputs, labels = world
    with pytest.raises(ValueError, match=r"Somf\.temperature must be in \(0, inf\)"):
        Somf(temperature=0.0)
    with pytest.raises(UserError, match="at least 2 safety preferences, got 1"):
        somf({"t": named({"weight": change})}, Linear2(safe, inputs[:1], labels[:1]), tmp_path / "a")
    with pytest.raises(UserError, match="fine-tuned model that differs from its start"):
        somf({"t": named({"weight": 0 * change})}, Linear2(safe, inputs, labels), tmp_path / "b")
    with pytest.raises(UserError, match="must have the weights that were fine-tuned, got no other"):
        somf({"t": named({"other": change})}, Linear2(safe, inputs, labels), tmp_path / "c")
    with pytest.raises(UserError, match="must hold masks of what was fine-tuned, got others: stranger"):
        masked({"stranger": torch.zeros(2, 2)}, {"t": named({"w": change})}, tmp_path)
    with pytest.raises(UserError, match="must have safety preferences to learn from"):
        Somf().prepare(
            Vectors(AdapterChanges(NamedDeltas({}), ""), {"t": AdapterChanges(named({"w": change}), "")}), RealignContext()
        )
