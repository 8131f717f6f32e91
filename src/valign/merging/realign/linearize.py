"""Train modules as their first-order Taylor expansions, so that a safety vector made by training stays linear (EnchTable, 3.1)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from valign.checks import UserError


@contextmanager
def linearized(network: nn.Module, endings: Sequence[str]) -> Iterator[list[str]]:
    """Inside, each chosen module answers ``f(x; w0) + J f(x; w0) (w - w0)`` with ``w0`` the weights that it has on entry.

    Train the network's own parameters inside; afterwards it is the usual network with the trained weights. One linear layer is
    its own expansion, so only modules with something between their weights, such as a whole MLP, are changed by this.

    Args:
        endings: Of the modules' names, e.g. ``("mlp",)``; a module within a chosen one is part of it.
    Yields: the names of the chosen modules.
    Raises: UserError if no module has such a name.
    """
    named = {name: module for name, module in network.named_modules() if name.rpartition(".")[2] in endings}
    chosen = {name: module for name, module in named.items() if not any(name.startswith(f"{other}.") for other in named)}
    if not chosen:
        raise UserError(
            f"The network must have modules named {', '.join(endings)}, got none. Name the last part of a module's name."
        )
    try:
        for module in chosen.values():
            module.forward = _expansion(module)
        yield list(chosen)
    finally:
        for module in chosen.values():
            vars(module).pop("forward", None)


def _expansion(module: nn.Module) -> Any:
    frozen = deepcopy(module).requires_grad_(False)
    start = dict(frozen.named_parameters())

    def forward(*inputs: Any, **options: Any) -> Tensor:
        moved = {name: parameter - start[name] for name, parameter in module.named_parameters()}

        def answer(weights: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(frozen, weights, inputs, options)
            return found

        found = jvp(answer, (start,), (moved,))  # value and slope
        return torch.add(found[0], found[1])

    return forward
