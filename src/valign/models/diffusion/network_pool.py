"""Where the networks of a pipeline are: on the device, in main memory until they are used, or not loaded until they are needed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from valign.checks import UserError

Mode = Literal["resident", "phased", "offload"]
Group = Literal["text", "vae", "denoiser"]


class NetworkPool:
    """Brings networks when they are asked for, and takes the others away.

    ``resident``: all are on the device, always. ``offload``: a network that is not used waits in main memory. ``phased``: it is not
    loaded, and its weights are read again when it is needed; what generates images asks for all of them `together`.

    Args:
        pipe: A diffusers pipeline; its networks stay the same objects, only their weights come and go.
        groups: Names of the networks that work together, by group.
        read: Loads a network by its name, frozen; needed by ``phased`` alone.
    """

    def __init__(
        self,
        pipe: Any,
        device: torch.device,
        groups: Mapping[Group, tuple[str, ...]],
        *,
        mode: Mode = "resident",
        read: Callable[[str], nn.Module] | None = None,
    ) -> None:
        if mode == "offload" and device.type == "cpu":
            raise UserError("memory.offload moves networks between a device and main memory, got device cpu. Leave it out.")
        self.pipe, self.device, self.groups, self.mode, self.read = pipe, device, groups, mode, read
        self.present: set[Group] = set(groups) if mode == "resident" else set()
        self.shared = 0  # callers that need all networks together

    def need(self, group: Group) -> None:
        """Have this group's networks on the device."""
        alone = self.mode == "offload" or not self.shared
        if group in self.present and (self.mode == "resident" or not alone or len(self.present) == 1):
            return
        if alone and self.mode != "resident":
            for other in sorted(self.present - {group}):
                self._leave(other)
        if group not in self.present:
            for name in self.groups[group]:
                self._bring(name)
            self.present.add(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a network that is needed does not make others leave, unless they are offloaded."""
        self.shared += 1
        try:
            yield
        finally:
            self.shared -= 1

    def to(self, device: torch.device) -> None:
        """Move what is there."""
        self.device = device
        for group in self.present:
            for name in self.groups[group]:
                getattr(self.pipe, name).to(device)

    def _bring(self, name: str) -> None:
        network = getattr(self.pipe, name)
        if self.mode == "offload":
            network.to(self.device)
            return
        assert self.read is not None  # `load_model` gives it
        for old, new in zip(network.modules(), self.read(name).to(self.device).modules(), strict=True):
            old._parameters.update(new._parameters)  # in place: others hold the module
            old._buffers.update(new._buffers)

    def _leave(self, group: Group) -> None:
        """Send a group away; one with an adapter stays, since its weights are not those of its file."""
        networks = [getattr(self.pipe, name) for name in self.groups[group]]
        if self.mode == "phased" and any(_changed(network) for network in networks):
            return
        for network in networks:
            network.to("meta" if self.mode == "phased" else "cpu")
        self.present.discard(group)


def _changed(network: nn.Module) -> bool:
    """Whether something was attached to it, or it is being trained."""
    return hasattr(network, "peft_config") or any(parameter.requires_grad for parameter in network.parameters())
