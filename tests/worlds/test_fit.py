import json

import pytest
import torch
from torch import nn

from valign.worlds.shapes.build.fit import Budget, fit


def _loss(net):
    def loss(step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        error = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": error, "again": error * 2}

    return loss


def _net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_an_interrupted_fit_ends_with_the_same_weights(tmp_path):
    budget = Budget(steps=40, batch=8, lr=1e-2, warmup=5, ema=0.9, checkpoint_every=10)
    straight, broken = _net(), _net()
    fit(straight, _loss(straight), budget, tmp_path / "a", "net")

    def failing(step):
        if step == 25:
            raise KeyboardInterrupt
        return _loss(broken)(step)

    with pytest.raises(KeyboardInterrupt):
        fit(broken, failing, budget, tmp_path / "b", "net")
    resumed = _net()
    fit(resumed, _loss(resumed), budget, tmp_path / "b", "net")
    assert torch.equal(straight.weight, resumed.weight)


def test_it_learns_and_logs(tmp_path):
    net = _net()
    fit(net, _loss(net), Budget(steps=300, batch=8, lr=5e-2, warmup=10), tmp_path, "net")
    lines = [json.loads(line) for line in (tmp_path / "net.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 300
    assert lines[-1]["loss"] < 1e-2 < lines[0]["loss"]
    assert lines[0]["again"] == pytest.approx(2 * lines[0]["loss"], rel=1e-3)


def test_rate_warms_up_and_decays():
    shares = Budget(steps=100, batch=1, lr=1.0, warmup=10).shares()
    assert shares.at(0) == pytest.approx(0.1)
    assert shares.at(10) == pytest.approx(1.0)
    assert shares.at(100) == pytest.approx(0.02)
