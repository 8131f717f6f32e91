"""What a computation needs, without doing it: peak bytes and floating-point operations, on tensors that have shapes but no values.

The very code that would run is run, on fake tensors, while every storage that comes and goes is counted. Not counted: the working
memory of single kernels, what an allocator wastes, and the libraries themselves.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

PLAIN = 0.2  # time to read a linear layer's weight over that for a convolution's, as measured on a CPU


@dataclass(frozen=True)
class Footprint:
    """Of one computation."""

    peak: int  # bytes of all tensors that lived at once
    flops: float  # a multiplication and an addition are two


@dataclass(frozen=True)
class Unit:
    """What one row of a computation needs; ``rows`` of them need `peak` bytes, since activations grow with the rows."""

    weights: int  # bytes of the networks that work
    activations: int  # bytes per row, at the peak
    flops: float  # per row
    reads: float = 0.0  # bytes of weights that are read, see `weights_read`, however many rows

    def peak(self, rows: int) -> int:
        """Bytes."""
        return self.weights + rows * self.activations


class _Storages(TorchDispatchMode):
    """Adds up the bytes of every storage that an operation makes, until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class Meter:
    """Measures parts of one `simulation`."""

    def __init__(self, storages: _Storages) -> None:
        self._storages = storages

    @property
    def now(self) -> int:
        """Bytes that live."""
        return self._storages.now

    def measure(self, work: Callable[[], Any]) -> Footprint:
        """The footprint of ``work``, with everything that lives beside it."""
        self._storages.peak = self._storages.now
        counter: Any = FlopCounterMode(display=False)
        with counter:
            work()
        return Footprint(self._storages.peak, float(counter.get_total_flops()))


@contextmanager
def simulation() -> Iterator[Meter]:
    """Inside, tensors have shapes and no values, and all of their bytes are counted; see `materialize` for networks."""
    storages = _Storages()
    with FakeTensorMode(allow_non_fake_inputs=True), storages:
        yield Meter(storages)


def weights_read(networks: Iterable[nn.Module], passes: float = 1.0) -> float:
    """Bytes of the weights that so many passes read, in bytes of a convolution's: those of other layers are read faster."""
    known = [parameter for network in networks for parameter in network.parameters()]
    return passes * sum(p.numel() * p.itemsize * (1 if p.ndim == 4 else PLAIN) for p in known)


def materialize(network: nn.Module) -> nn.Module:
    """Give a network of the meta device tensors that are counted, inside a `simulation`; return it."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    return network


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint` without random numbers of its own, which a simulation does not have."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
