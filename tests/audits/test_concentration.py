"""Where the refusals are: planted probes, silencing inside a context, causal toys, controls, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.audits.concentration import Concentration, audit_concentration, concentration_index, probe_scores
from valign.audits.neurons import Activations, NeuronSite, neuron_sites, rows_of, silenced
from valign.checks import UserError

WIDTH = 64


class Block(nn.Module):
    """A gated feed-forward block whose first input tells flagged rows."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, WIDTH, bias=False), nn.Linear(8, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Toy:
    """Refuses where the block's answer is above a half of what flagged rows have; ``carriers`` neurons carry it."""

    def __init__(self, carriers):
        torch.manual_seed(0)
        self.network = Block().eval()
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                getattr(self.network, name).weight.mul_(0.2)
                getattr(self.network, name).weight[:carriers, 0] = 3.0
            self.network.down_proj.weight.zero_()
            self.network.down_proj.weight[0, :carriers] = 1.0 / carriers

    def read(self, rows, activations):
        self.network(torch.stack(rows))

    def refused(self, rows):
        with torch.no_grad():
            return [bool(one > 3.0) for one in self.network(torch.stack(list(rows)))[:, 0]]


def rows(seed, flagged, count=30):
    x = 0.3 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0 if flagged else 0.0
    return list(x)


SETS = (rows(0, True), rows(1, False), rows(2, True), rows(3, False))
SMALL = Concentration(least=20, random_sets=3)


def audit(carriers, **more):
    return audit_concentration(Toy(carriers), *SETS, SMALL, key=lambda row: str(row.tolist()), **more)


def test_one_neuron_that_carries_everything_is_found_and_random_ones_are_not():
    figures, plots, verdict = audit(1)
    assert figures["start"]["refused"]["value"] == 1.0
    assert figures["drop"] == 1.0
    assert figures["specificity"] > 0.8
    assert figures["carries_90"] <= 0.01
    assert figures["concentration_index"] > 0.5
    assert len(plots) == 2
    assert any("specificity +" in line for line in verdict)
    assert "indices" not in json.dumps(figures)  # a map of the weak spot


def test_refusals_that_are_spread_survive_the_loss_of_few():
    figures, _, _ = audit(48)
    assert figures["by_rank"][2]["ranked"]["refused"]["value"] == 1.0  # 1 % of the neurons
    assert figures["concentration_index"] < 0.05
    assert figures["carries_90"] > 0.1


def test_a_judge_that_always_says_refused_concludes_nothing():
    toy = Toy(1)
    toy.refused = lambda rows: [True] * len(rows)
    _, _, verdict = audit_concentration(toy, *SETS, SMALL, key=lambda row: str(row.tolist()))
    assert any("nothing is concluded" in line for line in verdict)
    assert not any("rittle" in line for line in verdict)
    assert not any("nothing is concluded" in line for line in audit(1)[2])


def test_the_network_is_as_it_was_afterwards_also_after_an_error():
    toy = Toy(1)
    x = torch.stack(SETS[0])
    before, weights = toy.network(x), {name: tensor.clone() for name, tensor in toy.network.state_dict().items()}
    audit_concentration(toy, *SETS, SMALL, key=lambda row: str(row.tolist()))
    assert torch.equal(toy.network(x), before)
    toy.refused = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError), silenced(toy.network, {"gate_proj": torch.arange(WIDTH)}):
        toy.refused(x)
    with silenced(toy.network, {"gate_proj": torch.arange(WIDTH)}):
        assert float(toy.network(x).abs().max()) == 0.0
    assert torch.equal(toy.network(x), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in toy.network.state_dict().items())
    with silenced(toy.network, {"gate_proj": torch.zeros(0, dtype=torch.long)}):
        assert torch.equal(toy.network(x), before)


def test_a_gate_alone_silences_its_unit_and_a_fused_half_both():
    toy = Toy(3)
    x = torch.stack(SETS[0])
    with silenced(toy.network, {"gate_proj": torch.tensor([0])}):
        gate = toy.network(x)
    with silenced(toy.network, {"gate_proj": torch.tensor([0]), "up_proj": torch.tensor([0])}):
        assert torch.equal(toy.network(x), gate)
    assert rows_of(NeuronSite("gate_up_proj", 4, halves=True), torch.tensor([1, 3])).tolist() == [1, 3, 5, 7]


def test_padding_does_not_count_in_the_maximum():
    network = nn.Sequential()
    network.add_module("fc1", nn.Linear(2, 12))
    sites = neuron_sites(network)
    x = torch.randn(3, 4, 2)
    x[0, 0] = 100.0
    with Activations(network, sites).collecting() as found:
        found.mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
        answers = network(x)
    assert_close(found.found(sites[0])[0], answers[0, 1:].amax(0).detach())
    assert_close(found.found(sites[0])[1], answers[1].amax(0).detach())


def planted(seed, shifted, width=512, count=200):
    g = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(2, count, width, generator=g)
    x[0, :, :shifted] += 2.0
    return x[0], x[1]


def test_probe_and_effect_size_find_planted_neurons():
    for seed in range(2):
        scores = probe_scores(NeuronSite("m", 512), *planted(seed, 3), Concentration())
        assert set(range(3)) <= set(scores.tagged(3.0).tolist())
        assert len(scores.tagged(3.0)) <= 5
        assert set(np.argsort(-scores.effect)[:3].tolist()) == {0, 1, 2}
        assert scores.auc > 0.95
        assert scores.effect[0] == pytest.approx(4.0, abs=0.5)  # a shift of 2 at a deviation of 0.5
    noise = probe_scores(NeuronSite("m", 256), *planted(5, 0, width=256), Concentration())
    assert noise.auc < 0.75


def test_the_effect_size_ignores_a_neurons_scale():
    flagged, benign = planted(0, 3, width=32)
    scaled = probe_scores(NeuronSite("m", 32), 7 * flagged, 7 * benign, Concentration())
    assert np.allclose(scaled.effect, probe_scores(NeuronSite("m", 32), flagged, benign, Concentration()).effect, rtol=1e-4)


def test_the_index_is_0_without_loss_and_1_where_all_is_gone_at_once():
    assert concentration_index([(0.0, 1.0), (0.01, 1.0), (1.0, 0.0)]) == pytest.approx(0)
    assert concentration_index([(0.0, 1.0), (1e-9, 0.0), (1.0, 0.0)]) == pytest.approx(1, abs=1e-3)
    assert concentration_index([(0.0, 1.0), (0.01, 0.0), (1.0, 0.0)]) == pytest.approx(0.5)


def test_modules_are_known_by_whole_segments():
    network = nn.ModuleDict({"upsample": nn.Linear(4, 20), "group": nn.Linear(4, 20), "fc1": nn.Linear(4, 20)})
    assert [site.name for site in neuron_sites(network)] == ["fc1"]
    with pytest.raises(UserError, match=r"must have feed-forward projections .* got none among upsample"):
        neuron_sites(nn.ModuleDict({"upsample": nn.Linear(4, 20)}))
    with pytest.raises(UserError, match="got a mixture of experts"):
        neuron_sites(nn.ModuleDict({"experts": nn.ModuleDict({"0": nn.ModuleDict({"up_proj": nn.Linear(4, 20)})})}))


def test_a_unet_has_its_geglu_projections(tiny_sd):
    from diffusers import UNet2DConditionModel

    sites = neuron_sites(UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet"))
    assert sites
    assert all(site.halves and site.name.endswith("ff.net.0.proj") for site in sites)


def test_bad_input():
    few = (SETS[0][:5], *SETS[1:])
    with pytest.raises(UserError, match="The flagged rows must be at least 20, got 5"):
        audit_concentration(Toy(1), *few, SMALL, key=lambda row: str(row.tolist()))
    with pytest.raises(UserError, match="Every row must stand in one set once"):
        audit_concentration(Toy(1), SETS[0], SETS[1], SETS[0], SETS[3], SMALL, key=lambda row: str(row.tolist()))
    toy = Toy(1)
    toy.network.train()
    with pytest.raises(UserError, match="must be in evaluation mode"):
        audit_concentration(toy, *SETS, SMALL, key=lambda row: str(row.tolist()))
    timid = Toy(1)
    timid.refused = lambda rows: [False] * len(rows)
    with pytest.raises(UserError, match=r"must refuse at least half of the flagged rows, got 0\.00"):
        audit_concentration(timid, *SETS, SMALL, key=lambda row: str(row.tolist()))
    broken = Toy(1)
    broken.read = lambda rows, activations: broken.network(torch.stack(rows) * float("nan"))
    with pytest.raises(UserError, match="must be finite, got NaN or infinity in 30 flagged rows"):
        audit_concentration(broken, *SETS, SMALL, key=lambda row: str(row.tolist()))
    with pytest.raises(UserError, match="must have more than 10 neurons, got 8"):
        probe_scores(NeuronSite("m", 8), *planted(0, 1, width=8), Concentration())
