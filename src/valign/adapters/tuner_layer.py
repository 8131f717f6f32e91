"""The layer of all tuners: a change of weight ``scaling * up @ down``, with both factors made on the fly.

A method fills `TunerLayer.start` and `TunerLayer.factors`; forward, merging, conv and Conv1D layers are here, on peft's own
`BaseTunerLayer`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREFIX = "vtune_"  # of every adapter tensor's name; no base module's name may contain it
SAME_BASE = 0.01  # difference of probes; a base in bfloat16 moves them by 0.001, another base by about 1
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def module_seed(seed: int, *words: str) -> int:
    """A 63-bit seed of its own for each module (and factor), the same in every process and for every order of modules."""
    return int.from_bytes(hashlib.sha256(":".join((str(seed), *words)).encode()).digest()[:8]) >> 1


class Buffers(BufferDict):
    """peft's `BufferDict` with the choice, per adapter, whether the tensor is saved with the adapter."""

    def put(self, adapter: str, tensor: Tensor, *, saved: bool) -> None:
        self.register_buffer(adapter, tensor, persistent=saved)

    def __setitem__(self, adapter: str, tensor: Tensor) -> None:
        """Replace a tensor; whether it is saved stays as it was put."""
        self.register_buffer(adapter, tensor, persistent=adapter not in self._non_persistent_buffers_set)


@dataclass(frozen=True)
class Factors:
    """A change of weight ``up @ down`` before scaling, on the graph of what is trained."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]

    def product(self) -> Float[Tensor, "fan_out fan_in"]:
        return self.up @ self.down


class TunerLayer(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, transformers' `Conv1D`, for some methods also `nn.Conv*d`) plus its changes, by adapter name.

    ``y = W x + b + sum over active adapters of scaling * up (down x)``; only `merge` writes to W. Convolutions are taken
    as the matrix ``[fan_out, fan_in * kernel]``. Adapter tensors are float32, also on half precision, and float64 on float64.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("scaling", "dropout", "vtune_probe")
    reads_base: ClassVar[bool] = False  # whether `start` depends on the weight, so that an adapter fits one base only

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module = module  # its name in the model: seeds and messages
        self.fan_out, self.fan_in = self.matrix_shape(base_layer)
        self.in_features, self.out_features = self.fan_in, self.fan_out  # some models ask their layers
        self.scaling: dict[str, float] = {}  # the user's factor on each change, as diffusers' set_adapters gives it
        self.dropout: dict[str, float] = {}
        self.vtune_probe = Buffers()
        self.merged_adapters: list[str] = []

    # What a method fills in.

    def start(self, adapter: str, config: Any) -> None:
        """Make this adapter's parameters and buffers."""
        raise NotImplementedError  # abstract

    def factors(self, adapter: str) -> Factors:
        """The change that ``adapter`` makes now."""
        raise NotImplementedError  # abstract

    def before_load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        """Look at ``saved`` (attribute -> tensor) before it is copied in; tensors replaced here are copied instead.

        Raises: ValueError if the adapter was trained on another weight.
        """
        if "vtune_probe" in saved and not (saved["vtune_probe"].cpu() - self.vtune_probe[adapter].cpu()).abs() <= SAME_BASE:
            raise ValueError(
                f"{self.module} must be the weight that the adapter was trained on, got another one (probe "
                f"{self.vtune_probe[adapter].item():.4f}, saved {saved['vtune_probe'].item():.4f}). Load the base model it names."
            )

    def matrix_change(self, adapter: str) -> Float[Tensor, "fan_out fan_in"]:
        """``up @ down``; a method with a faster way says so."""
        return self.factors(adapter).product()

    # Layers and their weights.

    @classmethod
    def check(cls, layer: nn.Module, module: str, config: Any) -> None:
        """Raise TypeError unless this tuner can sit on ``layer``."""
        kinds = "nn.Linear or transformers' Conv1D"
        if hasattr(config, "convs"):
            kinds += " (convolutions with convs=True)"
        conv = getattr(config, "convs", False) and isinstance(layer, _ConvNd) and not isinstance(layer, TRANSPOSED)
        linear = isinstance(layer, (nn.Linear, Conv1D)) and not isinstance(layer, NonDynamicallyQuantizableLinear)
        if not (linear or conv):
            raise TypeError(
                f"target_modules must name {kinds} for {cls.__name__}, got {module}, a {type(layer).__name__}. "
                "Name other modules; attention with fused projections (nn.MultiheadAttention) reads weights past any adapter."
            )
        if isinstance(layer, _ConvNd) and layer.groups > 1:
            raise TypeError(f"target_modules must name convolutions with 1 group, got {module} with {layer.groups}. Leave it out.")
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"{module}.weight must be float16, bfloat16, float32 or float64, got {weight.dtype}. "
                "Load the model without quantization."
            )

    @staticmethod
    def matrix_shape(layer: nn.Module) -> tuple[int, int]:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        fan_out, fan_in = weight.shape[0], weight[:1].numel()
        return (fan_in, fan_out) if isinstance(layer, Conv1D) else (fan_out, fan_in)

    def matrix(self) -> Float[Tensor, "fan_out fan_in"]:
        """The base weight, detached, float32 or float64.

        Raises: ValueError if it is on the meta device or holds NaN or infinity.
        """
        base = self.get_base_layer()
        weight: Tensor = base.weight.detach()  # type: ignore[union-attr,operator,assignment]
        if weight.is_meta:
            raise ValueError(f"{self.module}.weight must be loaded, got the meta device. Load the model before the adapter.")
        if not weight.isfinite().all():
            raise ValueError(f"{self.module}.weight must be finite, got NaN or infinity. Look at the base model.")
        return (weight.T if isinstance(base, Conv1D) else weight.flatten(1)).to(self.dtype)

    def probe(self) -> Float[Tensor, " 1"]:
        """``g^T W h / |W|_F`` with fixed standard normal g and h: a number that tells bases apart, and forgives half precision."""
        matrix = self.matrix()
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, generator=generator).to(matrix) for size in matrix.shape)
        return ((left @ matrix @ right) / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)).reshape(1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's tensors."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    # peft's contract.

    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter.

        Raises: ValueError if one is merged: the start would be taken from a changed weight.
        """
        if self.merged:
            raise ValueError(
                f"{self.module} must not be merged when an adapter is added, got {', '.join(self.merged_adapters)} merged. "
                "Call unmerge_adapter first."
            )
        self.scaling[adapter] = 1.0
        self.dropout[adapter] = float(getattr(config, "dropout", 0.0))
        if self.reads_base:
            self.vtune_probe.put(adapter, self.probe(), saved=True)
        self.start(adapter, config)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: peft would round the tensors to the base layer's half precision and back."""
        device = self.weight.device if device is None else device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            tensors = getattr(self, name)
            if isinstance(tensors, (nn.ParameterDict, BufferDict)) and adapter_name in tensors:
                tensor = tensors[adapter_name]
                if not tensor.is_meta and device.type != "meta":
                    tensor.data = tensor.data.to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                result = result + self.change(adapter, x)
        return result.to(dtype)

    def change(self, adapter: str, x: Tensor) -> Tensor:
        """What the adapter adds to the output for input ``x``, by whichever order of products costs less."""
        base, scaling = self.get_base_layer(), self.scaling[adapter]
        factors = self.factors(adapter)
        rank = len(factors.down)
        x = F.dropout(self._cast_input_dtype(x, factors.down.dtype), self.dropout[adapter], self.training)
        if isinstance(base, _ConvNd):
            kernels = factors.down.unflatten(1, base.weight.shape[1:])
            channel = -len(base.kernel_size) - 1
            hidden: Tensor = base._conv_forward(x, kernels, None)  # type: ignore[operator]
            return F.linear(hidden.movedim(channel, -1), factors.up).movedim(-1, channel) * scaling
        tokens = x.numel() // max(x.shape[-1], 1)
        if rank * (tokens * (self.fan_in + self.fan_out)) > self.fan_in * self.fan_out * (rank + tokens):
            return F.linear(x, factors.product()) * scaling
        return F.linear(F.linear(x, factors.down), factors.up) * scaling

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The scaled change of weight, in the shape of the base layer's weight."""
        base = self.get_base_layer()
        delta = self.matrix_change(adapter) * self.scaling[adapter]
        return delta.T if isinstance(base, Conv1D) else delta.view_as(self.weight)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes to the base weight. One that is merged already is left alone, with peft's warning.

        Raises: ValueError with ``safe_merge`` if the result is not finite; the weight is then as before.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.scaling:
                weight = self.weight
                merged = (weight.data + self.get_delta_weight(adapter)).to(weight.dtype)
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"{self.module} merged with {adapter} must be finite, got NaN or infinity. It seems broken.")
                weight.data.copy_(merged)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged changes off again, up to rounding."""
        while self.merged_adapters:
            weight = self.weight
            weight.data.copy_((weight.data - self.get_delta_weight(self.merged_adapters.pop())).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can take it: linear layers; peft's conversion knows no convolutions."""
        return not isinstance(self.get_base_layer(), _ConvNd)

    # What diffusers' set_adapters, fuse_lora and cross_attention_kwargs ask of a layer.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`, or every scale when none is given."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, TunerLayer]]:
    """Name and layer of everything in ``model`` that carries one of these tuners."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TunerLayer))


def target_names(model: nn.Module, kind: type[TunerLayer], config: Any) -> str:
    """What ``target_modules`` can name: the endings of the names of all layers that ``kind`` can sit on."""
    endings = set()
    for name, module in model.named_modules():
        words = name.split(".")
        if words[-1] in ("", "base_layer"):
            continue
        try:
            kind.check(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, name, config)
        except TypeError:
            continue
        endings.add(".".join(words[-2:] if words[-1].isdigit() else words[-1:]))
    return ", ".join(sorted(endings)) or "none of its layers"
