"""The neurons of a network's feed-forward blocks: where they are, what they answer, and how to silence some for a while."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from valign.checks import UserError

GATED = ("gate_proj", "up_proj")  # of one block: silent when both are 0, for the activation of 0 is 0
PLAIN = ("fc1", "wi", "c_fc", "lin1", "dense_h_to_4h")
GEGLU = re.compile(r"(^|\.)ff\.net\.0\.proj$")  # of diffusers' transformers: value and gate in one projection
FUSED = "gate_up_proj"
SILENT_AT_0 = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")


@dataclass(frozen=True)
class NeuronSite:
    """One module whose outputs are neurons. ``halves``: the second half of its outputs gates the first, unit by unit."""

    name: str
    width: int  # neurons
    halves: bool = False


def neuron_sites(network: nn.Module) -> list[NeuronSite]:
    """The feed-forward projections, in the network's order; modules are known by whole segments of their names.

    Raises: UserError if there are none, for mixtures of experts, or where a neuron at 0 is not silent.
    """
    found = []
    for name, module in network.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear):
            continue
        if re.search(r"(^|\.)experts\.\d+\.", name):
            raise UserError(
                f"An audit of neurons reads every token in every block, got a mixture of experts ({name}). Use a dense model."
            )
        if last in (*GATED, *PLAIN):
            found.append(NeuronSite(name, module.out_features))
        elif GEGLU.search(name) or last == FUSED:
            found.append(NeuronSite(name, module.out_features // 2, halves=True))
    if not found:
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        raise UserError(
            f"The network must have feed-forward projections ({', '.join((*GATED, *PLAIN))}), got none among "
            f"{', '.join(linear[:5])}, ..."
        )
    activation = getattr(getattr(network, "config", None), "hidden_act", None)
    if isinstance(activation, str) and activation not in SILENT_AT_0:
        raise UserError(
            f"A neuron at 0 must be silent, got the activation {activation}, which is not 0 there. Audit another model."
        )
    return found


@contextmanager
def silenced(network: nn.Module, neurons: Mapping[str, Int[Tensor, " neuron"]]) -> Iterator[None]:
    """Inside, these neurons of these modules answer 0. The hooks go away whatever happens, and no weight is touched."""
    modules = dict(network.named_modules())
    with ExitStack() as stack:
        for name, which in neurons.items():
            if len(which):
                handle = modules[name].register_forward_hook(_zeroing(which, modules[name].out_features))  # type: ignore[arg-type]
                stack.callback(handle.remove)
        yield


def _zeroing(which: Int[Tensor, " neuron"], width: int) -> Any:
    keep = torch.ones(width)
    keep[which] = 0.0

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * keep.to(output)

    return hook


def rows_of(site: NeuronSite, units: Int[Tensor, " unit"]) -> Int[Tensor, " neuron"]:
    """The module's outputs that belong to these units."""
    return torch.cat([units, units + site.width]) if site.halves else units


class Activations:
    """Collects ``max over tokens`` of each module's answers while a batch is read; ``mask`` says which tokens count."""

    def __init__(self, network: nn.Module, sites: Sequence[NeuronSite]) -> None:
        self.network, self.sites = network, sites
        self.mask: Tensor | None = None  # [row, token] of the batch that is read; None counts all
        self.rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    @contextmanager
    def collecting(self) -> Iterator["Activations"]:
        """Hooks that collect; removed whatever happens."""
        modules = dict(self.network.named_modules())
        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(modules[site.name].register_forward_hook(self._hook(site)).remove)
            yield self

    def _hook(self, site: NeuronSite) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            answers = output.detach().float()
            answers = answers.reshape(len(answers), -1, answers.shape[-1])[..., : site.width]
            mask = self.mask
            if mask is not None and mask.shape == answers.shape[:2]:
                answers = answers.masked_fill(~mask.bool()[..., None], float("-inf"))
            self.rows[site.name].append(answers.amax(1).cpu())

        return hook

    def found(self, site: NeuronSite) -> Float[Tensor, "row neuron"]:
        """All rows so far."""
        return torch.cat(self.rows[site.name])
