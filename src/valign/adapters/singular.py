"""Train singular values between frozen singular vectors: the layer that SVFit and CLIP-SVD share."""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from valign.adapters.tuner_layer import Buffers, Factors, TunerLayer

TIE = 1e-6  # gap of two singular values, relative to the largest, below which their vectors are not determined
SAME_SPECTRUM = 1e-3  # difference of two singular values, relative to the largest, beyond which they are of different weights


class SingularLayer(TunerLayer):
    """``delta = U diag(s - S) Vh`` with ``W = U diag(S) Vh``; only ``s`` [rank] is trained.

    The config says the rank (`rank_of`), whether what lies beyond it is dropped (``truncate``), whether the parameter is ``s`` or
    ``s - S`` (``offset``), and whether s is held at 0 or above (``clamp_nonnegative``). Saved are the parameter and S; the vectors
    are computed again from the base at load. Pairs ``u_i v_i^T`` have no sign, so that is safe, but not where singular values tie:
    there, and with ``save_basis``, the vectors are saved too.
    """

    adapter_layer_names = ("vtune_values",)
    other_param_names = (*TunerLayer.other_param_names, "vtune_start", "vtune_down", "vtune_up", "configs")
    reads_base = True

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        super().__init__(base_layer, module)
        self.vtune_values = nn.ParameterDict()  # s or s - S, [rank]
        self.vtune_start = Buffers()  # S, [rank], or all of it with truncate
        self.vtune_down, self.vtune_up = Buffers(), Buffers()  # Vh [len(S), fan_in], U [fan_out, len(S)]
        self.configs: dict[str, Any] = {}

    def start(self, adapter: str, config: Any) -> None:
        self.configs[adapter] = config
        self._place(adapter, rank=None)

    def _place(self, adapter: str, rank: int | None) -> None:
        config = self.configs[adapter]
        up, values, down = torch.linalg.svd(self.matrix(), full_matrices=False)
        rank = config.rank_of(values, (self.fan_out, self.fan_in), self.module) if rank is None else rank
        gaps = values[: rank + 1].diff().abs()
        tied = bool(len(gaps) and gaps.min() <= TIE * values[0])
        if tied and not config.save_basis:
            warnings.warn(
                f"{self.module} has singular values that tie, so its vectors are saved with the adapter, as with save_basis=True.",
                stacklevel=2,
            )
        keep = len(values) if config.truncate else rank
        saved = config.save_basis or tied
        first = torch.zeros_like(values[:rank]) if config.offset else values[:rank].clone()
        self.vtune_values[adapter] = nn.Parameter(first)
        self.vtune_start.put(adapter, values[:keep].clone(), saved=True)
        self.vtune_down.put(adapter, down[:keep].contiguous(), saved=saved)
        self.vtune_up.put(adapter, up[:, :keep].contiguous(), saved=saved)

    def singular_values(self, adapter: str) -> Float[Tensor, " rank"]:
        """``s`` as it is now, on the graph."""
        config, values = self.configs[adapter], self.vtune_values[adapter]
        if config.offset:
            values = self.vtune_start[adapter][: len(values)] + values
        return values.clamp(min=0) if config.clamp_nonnegative else values

    def factors(self, adapter: str) -> Factors:
        start, values = self.vtune_start[adapter], self.singular_values(adapter)
        gain = F.pad(values, (0, len(start) - len(values))) - start
        return Factors(self.vtune_down[adapter], self.vtune_up[adapter] * gain)

    def before_load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        super().before_load(adapter, saved)
        if "vtune_start" not in saved or "vtune_values" not in saved:
            return  # peft says which keys are missing
        start, rank = saved["vtune_start"], len(saved["vtune_values"])
        most = min(self.fan_out, self.fan_in)
        wanted = {"vtune_down": (len(start), self.fan_in), "vtune_up": (self.fan_out, len(start))}
        shapes = {name: tuple(saved[name].shape) for name in wanted if name in saved}
        if len(start) > most or any(shapes[name] != wanted[name] for name in shapes):
            raise ValueError(
                f"{self.module} must have the shape that the adapter was trained on, got ({self.fan_out}, {self.fan_in}) for "
                f"{len(start)} singular values and vectors of shape {sorted(shapes.values())}. Load the base model it names."
            )
        if start.shape != self.vtune_start[adapter].shape or rank != len(self.vtune_values[adapter]):
            self._place(adapter, rank)  # an energy lies so close to a step that another machine counts one value more
            self._move_adapter_to_device_of_base_layer(adapter)
        here = self.vtune_start[adapter].to(start)
        if (here - start).abs().max() > SAME_SPECTRUM * here[0]:
            raise ValueError(
                f"{self.module} must have the singular values that the adapter was trained on, got {here[0].item():.4g} as the "
                f"largest where {start[0].item():.4g} was. Load the base model it names."
            )
        for name in shapes:
            buffers: Buffers = getattr(self, name)
            buffers.put(adapter, buffers[adapter], saved=True)  # now peft copies them in
