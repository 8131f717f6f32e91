"""Networks of a few hundred numbers for the adapters' tests."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Attention(nn.Module):
    """One head; ``to_q`` and ``to_v`` are what the methods look for, ``to_k`` is another target."""

    def __init__(self, width=12, seed=0, dtype=torch.float32, tie=False):
        super().__init__()
        for name, out in (("to_q", width), ("to_k", width), ("to_v", width - 4)):
            setattr(self, name, nn.Linear(width, out))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
        self.to(dtype)
        if tie:
            self.to_k.weight = self.to_q.weight

    def forward(self, x):
        scores = self.to_q(x) @ self.to_k(x).transpose(-1, -2)
        return (scores / x.shape[-1] ** 0.5).softmax(-1) @ self.to_v(x)


def with_lora(model=None, *, rank=3, alpha=6, targets=("to_q", "to_k", "to_v"), seed=1, **options):
    """The network under a peft LoRA; ``A`` is the same at every call."""
    torch.manual_seed(seed)  # peft draws A from the global generator
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model if model is not None else Attention(), config)


def inputs(width=12, seed=2, batch=2, dtype=torch.float32):
    return torch.randn(batch, 5, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(model, *, steps=5, rate=1e-2, seed=3):
    """Some Adam steps towards a random target, so that every trained factor moves."""
    x = inputs(seed=seed)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(seed + 1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
