"""CLIP-SVD: train all singular values of attention and MLP weights, for few examples (Koleilat et al., arXiv 2509.03740)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft, layer_linears
from valign.adapters.singular import SingularLayer
from valign.adapters.tuner import TunerConfig, TunerModel, TunerType
from valign.adapters.tuner_layer import tuner_layers
from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="clip-svd",
    title="CLIP-SVD: trains all singular values, for few examples",
    paper="arXiv 2509.03740",
    room="adapters",
    entry="valign.adapters.clip_svd:ClipSvdConfig",
    fidelity="exact",
    note="the released form; all singular values are kept by default, where the released code rounds their number down "
    "to a multiple of 4",
)

CLIP_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of both encoders: 92,160 numbers for ViT-B/16


@dataclass
class ClipSvdConfig(TunerConfig):
    """``W' = U_r diag(s) Vh_r`` with ``W = U diag(S) Vh``, s trained from ``S_r``; what lies beyond r is dropped, as in the paper.

    With the defaults r is the full rank, nothing is dropped and step 0 keeps the function; with a ratio below 1 it does not.
    CLIP's default targets are the six linears of every block (the paper's); ``layers_to_transform`` picks blocks.

    Raises: ValueError for a ratio outside (0, 1], ``round_to`` below 1 or an unknown ``decay_towards``.
    """

    kind: ClassVar[TunerType] = TunerType("VALIGN_CLIP_SVD")
    truncate: ClassVar[bool] = True
    clamp_nonnegative: ClassVar[bool] = False

    ratio: float = 1.0  # share of the spectrum that is kept, (0, 1]
    round_to: int = 1  # keep a multiple of this many values; 4 as in the released code, which so cuts 10 to 8 at ratio 1
    decay_towards: Literal["zero", "init"] = "zero"  # where weight decay pulls s: 0 as in the paper, or the start S
    save_basis: bool = False  # save U and Vh too, so that load needs no agreement of SVDs
    convs: bool = False  # allow convolutions, as matrices [out, in * kernel]

    @classmethod
    def model_class(cls) -> type[TunerModel]:
        return ClipSvdModel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ClipSvdConfig.ratio", self.ratio, above=0.0, high=1.0)
        check_range("ClipSvdConfig.round_to", self.round_to, low=1)
        check_choice("ClipSvdConfig.decay_towards", self.decay_towards, ("zero", "init"))

    @property
    def offset(self) -> bool:
        """The parameter is ``s - S``, so decay to 0 is decay of s to its start."""
        return self.decay_towards == "init"

    def rank_of(self, values: Float[Tensor, " k"], shape: tuple[int, int], module: str) -> int:
        """``floor(floor(k * ratio) / round_to) * round_to``, at least 1."""
        return max(int(len(values) * self.ratio) // self.round_to * self.round_to, 1)


class ClipSvdModel(TunerModel):
    """peft's tuner for `ClipSvdConfig`."""

    tuner_layer_cls = SingularLayer
    target_module_mapping: dict[str, Any] = {  # noqa: RUF012
        **TunerModel.target_module_mapping,
        **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model"), CLIP_LINEARS),
    }


@torch.no_grad()
def singular_changes(model: nn.Module, adapter: str = "default") -> dict[str, Float[Tensor, " rank"]]:
    """``(s - S) / S`` for each adapted module: how much more or less each direction is used than in the base.

    For singular values that are 0 in the base the entry is infinite, or NaN if it is 0 still. Values are not grouped by head:
    those of a square weight belong to no head.
    """
    changes = {}
    for name, layer in tuner_layers(model):
        if isinstance(layer, SingularLayer) and adapter in layer.scaling:
            values = layer.singular_values(adapter)
            start = layer.vtune_start[adapter][: len(values)]
            changes[name] = (values - start) / start
    return changes


def head_changes(
    delta: Float[Tensor, "fan_out fan_in"], heads: int, *, side: Literal["rows", "columns"]
) -> Float[Tensor, " heads"]:
    """Frobenius norm of each attention head's block of a change of weight (a layer's ``get_delta_weight``).

    A head has rows of query, key and value, and columns of the output projection; singular values it has none.

    Raises: ValueError if the heads do not divide that side.
    """
    check_choice("head_changes.side", side, ("rows", "columns"))
    check_range("head_changes.heads", heads, low=1)
    blocks = delta if side == "rows" else delta.T
    if len(blocks) % heads:
        raise ValueError(f"head_changes.heads must divide the {len(blocks)} {side}, got {heads}. Take it from the model's config.")
    return blocks.unflatten(0, (heads, -1)).flatten(1).norm(dim=1)


@dataclass(frozen=True, kw_only=True)
class ClipSvdOptions(AdapterOptions):
    """`ClipSvdConfig` as an adapter."""

    ratio: float = 1.0  # share of each spectrum that is kept, (0, 1]
    everywhere: bool = True  # on all linear modules of the layers, as in the paper; False: on the targets
    learning_rate: float = 6e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        targets = layer_linears(context.network) if self.everywhere else context.targets
        return AdapterHandle(attach_peft(context, ClipSvdConfig(target_modules=list(targets), ratio=self.ratio)))
