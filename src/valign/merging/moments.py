"""Second moments of what the adapted layers read, of prompts: from the text encoder alone, or while the denoiser runs.

Only matrices of the layers' input size are kept, never activations.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.checks import UserError, check_range
from valign.merging.deltas import Delta
from valign.merging.denoising import calibration_states, changed_output
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.text_states import TEXT_READERS, padded_states, token_mask
from valign.progress import track

Moments = Mapping[str, Tensor]  # module -> [fan_in, fan_in]; layers that read the same hold the same tensor


@torch.inference_mode()
def text_moments(
    model: DiffusionModel, prompts: Sequence[str], *, padding: bool = True, batch_size: int = 32
) -> Float[Tensor, "dim dim"]:
    """``sum of e e^T / prompts`` over all token states e of the prompts, as cross-attention reads them; float64, on the CPU.

    Args: padding: Also the states after the end of the text. A padded text has as many as it has tokens.
    Raises: UserError for no prompt, or states that are NaN or infinite.
    """
    if not prompts:
        raise UserError("text_moments.prompts must hold at least one prompt, got 0.")
    total: Tensor | None = None
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        states = padded_states(model, batch).cpu()
        seen = states.flatten(0, 1) if padding else states[token_mask(model, batch, states.shape[1])]
        part = seen.double().T @ seen.double()
        total = part if total is None else total + part
    if total is None or not total.isfinite().all():
        raise UserError("text_moments.model must encode prompts as finite numbers, got NaN or infinity. Load it in float32.")
    return total / len(prompts)


@torch.inference_mode()
def activation_moments(
    model: DiffusionModel,
    modules: Sequence[str],
    prompts: Sequence[str],
    *,
    active: Mapping[str, Delta] | None = None,
    states: int = 4,
    steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    label: str = "calibrating",
) -> dict[str, Float[Tensor, "fan_in fan_in"]]:
    """``sum of x x^T / (prompts states)`` over all inputs x of each layer while the prompts are sampled; float32, on the CPU.

    Args:
        active: Changes of weight that are added while the model runs, by module; on the model's device.
        states: Denoising states per prompt, evenly spaced over a trajectory of ``steps`` (deterministic, no guidance).
    Returns: By module, in the order in which they run. Layers that are given the very same tensor (queries, keys and values of
        self-attention) share one matrix.
    Raises: UserError for a layer that is not linear, that was never run, or whose inputs are NaN or infinite.
    """
    check_range("activation_moments.steps", steps, low=1)
    check_range("activation_moments.states", states, low=1, high=steps, hint="There is one state per step at most.")
    if not prompts:
        raise UserError("activation_moments.prompts must hold at least one prompt, got 0.")
    layers = {module: model.denoiser.get_submodule(module) for module in modules}
    other = [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if other:
        raise UserError(f"Second moments need linear layers, got {', '.join(other[:3])}. Train experts on linear layers only.")
    collector = _Collector(active or {})
    with ExitStack() as stack:
        for module in sorted({*modules, *collector.active}):
            hook = collector.hook(module, read=module in layers)
            stack.callback(model.denoiser.get_submodule(module).register_forward_hook(hook).remove)
        for start in track(range(0, len(prompts), batch_size), label):
            batch = prompts[start : start + batch_size]
            for collector.recording in calibration_states(model, batch, states=states, steps=steps, seed=seed):
                pass
    unseen = [module for module in modules if module not in collector.owners]
    if unseen:
        raise UserError(f"{model.folder} never ran {unseen[0]} and {len(unseen) - 1} more modules. Leave them out of the experts.")
    shared = {name: (total / (len(prompts) * states)).cpu() for name, total in collector.totals.items()}
    bad = sorted(name for name, total in shared.items() if not total.isfinite().all())
    if bad:
        raise UserError(f"The inputs of {bad[0]} must be finite, got NaN or infinity. Load the model in float32.")
    return {module: shared[owner] for module, owner in collector.owners.items()}


class _Collector:
    """Forward hooks that sum ``x x^T`` of each layer's input while ``recording``, and add active changes to outputs."""

    def __init__(self, active: Mapping[str, Delta]) -> None:
        self.active = active
        self.recording = False
        self.totals: dict[str, Tensor] = {}
        self.owners: dict[str, str] = {}  # module -> the module under whose name its sum is kept
        self.last: tuple[Tensor | None, str] = (None, "")

    def hook(self, module: str, *, read: bool):  # type: ignore[no-untyped-def]
        def run(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if read and self.recording:
                self._add(module, args[0])
            part = self.active.get(module)
            return None if part is None else changed_output(output, args[0], part)

        return run

    def _add(self, module: str, x: Tensor) -> None:
        if x is self.last[0]:
            self.owners[module] = self.last[1]
            return
        flat = x.reshape(-1, x.shape[-1]).float()
        self.totals[module] = self.totals.get(module, 0) + flat.T @ flat
        self.owners[module], self.last = module, (x, module)


def moment_bytes(widths: Mapping[str, int], *, groups: int) -> int:
    """Bytes of the second moments of layers with these input sizes, for so many groups of prompts.

    All that read the text share one float64 matrix; queries, keys and values of one self-attention share one of float32.
    """
    text = {width for module, width in widths.items() if module.endswith(TEXT_READERS)}
    inputs = {
        re.sub(r"attn1\.to_[qkv]$", "attn1.", module): width
        for module, width in widths.items()
        if not module.endswith(TEXT_READERS)
    }
    return groups * (8 * sum(width**2 for width in text) + 4 * sum(width**2 for width in inputs.values()))


def block_of(module: str) -> str:
    """The block that a layer belongs to: its name up to the last number with at least two parts behind it.

    ``down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0`` is in ``down_blocks.0.attentions.1.transformer_blocks.0``.
    """
    match = re.match(r"(.*\.\d+)\.[^.]+\..+", module)
    return match[1] if match else module.rsplit(".", 1)[0]
