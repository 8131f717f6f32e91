"""What training has done to the weights: the rank of the change, and how much noise the answers bear."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

RANK_TOLERANCE = 1e-4  # of the largest singular value; float32 noise of an adapted layer stays below


def linear_named(network: nn.Module, name: str) -> nn.Module:
    """The layer called ``name`` in the bare network, adapted or not."""
    try:
        return network.get_submodule(f"base_model.model.{name}")
    except AttributeError:
        return network.get_submodule(name)


def base_linear(network: nn.Module, name: str) -> nn.Linear:
    """That layer below its adapter."""
    layer = linear_named(network, name)
    found = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    assert isinstance(found, nn.Linear)
    return found


def linears(network: nn.Module, endings: Sequence[str]) -> list[str]:
    """Names of the linear modules of a bare network with one of these endings, sorted."""
    return sorted(
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{ending}") for ending in endings)
    )


@torch.no_grad()
def effective_weight(layer: nn.Module, width: int, like: Tensor) -> Float[Tensor, "fan_out fan_in"]:
    """The matrix that a linear layer multiplies with, adapter included, whatever it is made of: its answers to unit vectors."""
    was = layer.training
    layer.eval()
    unit = torch.eye(width, device=like.device, dtype=like.dtype)
    answers = layer(unit) - layer(torch.zeros_like(unit[:1]))
    layer.train(was)
    return answers.T


def weights_of(network: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Effective weights of these layers, detached."""
    found = {}
    for name in names:
        weight = base_linear(network, name).weight
        found[name] = effective_weight(linear_named(network, name), weight.shape[1], weight).detach().clone()
    return found


def mean_rank(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Numerical rank of the change, mean over the layers that changed; 0 if none did."""
    ranks = []
    for name, weight in before.items():
        values = torch.linalg.svdvals((after[name] - weight).double())
        if values[0] > RANK_TOLERANCE**2 * weight.norm():
            ranks.append(int((values > RANK_TOLERANCE * values[0]).sum()))
    return sum(ranks) / len(ranks) if ranks else 0.0


@torch.no_grad()
def sharpness(
    network: nn.Module, before: Mapping[str, Tensor], loss: Callable[[], float], *, ratio: float, draws: int, seed: int
) -> float:
    """Mean rise of ``loss`` when noise is added to the weights: per row, Gaussian of ``ratio`` times the row's root mean square in
    ``before``, so that every method bears the same noise."""
    quiet, rises = loss(), []
    layers = {name: base_linear(network, name).weight for name in sorted(before)}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        kept = {name: weight.detach().clone() for name, weight in layers.items()}
        for name, weight in layers.items():
            size = ratio * before[name].square().mean(dim=1, keepdim=True).sqrt()
            weight += size * torch.randn(weight.shape, generator=generator).to(weight)
        rises.append(loss() - quiet)
        for name, weight in layers.items():
            weight.copy_(kept[name])
    return sum(rises) / len(rises)
