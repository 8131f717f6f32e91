"""Collect the votes of Co-Merge: the base model denoises unsafe prompts, and activation hooks measure every expert.

The base model runs without adapters. At a few denoising steps, the input of each adapted layer goes through the change of every
expert; only the mean absolute activations are kept, per prompt, until that prompt has voted.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from valign.checks import UserError, check_choice, check_range
from valign.files import hash_value
from valign.merging.deltas import Delta
from valign.merging.denoising import by_hash, calibration_states, changed_output, on_device
from valign.merging.experts import Expert, compatible
from valign.merging.votes import UNITS, VOTES, Ballot, Vote, Votes, activations, tally
from valign.models.diffusion.base import DiffusionModel
from valign.models.files.adapter_files import LoraFactors
from valign.models.files.layouts import split_name
from valign.progress import track

Inputs = Literal["base", "per_expert"]
FEW = 8  # prompts of a category below which its votes are noise
log = logging.getLogger(__name__)


def collect_votes(
    model: DiffusionModel,
    experts: Sequence[Expert],
    prompts: Mapping[str, Sequence[str]],
    *,
    per_category: int = 64,
    states: int = 4,
    steps: int = 50,
    vote: Vote = "prompt",
    top_k: int | None = None,
    inputs: Inputs = "base",
    batch_size: int = 8,
    seed: int = 0,
    allow_base_mismatch: bool = False,
) -> Votes:
    """Count on ``prompts`` which expert is the most active at each neuron.

    Args:
        model: The base model, all adapters off.
        prompts: Unsafe prompts by category. Every category casts the same number of votes, whatever its size; see `balanced`.
        per_category: Votes per category at most.
        states: Denoising states per prompt, evenly spaced over the trajectory.
        steps: Of the trajectory (deterministic, no guidance); it ends at the last state.
        vote, top_k: See `tally`.
        inputs: ``"base"``: every expert is measured on the layer inputs of the base model, see `voters`. ``"per_expert"``: one
            trajectory per expert, each measured on the layer inputs with that expert active; N times the cost.
        seed: A prompt's noise depends on this and its text alone, so the order of the prompts does not matter.
    Raises: UserError for an adapter that is on, experts of another base, no prompts, or activations that are NaN or infinite.
    """
    check_range("collect_votes.per_category", per_category, low=1)
    check_range("collect_votes.steps", steps, low=1)
    check_range("collect_votes.states", states, low=1, high=steps, hint="There is one state per step at most.")
    check_range("collect_votes.batch_size", batch_size, low=1)
    check_choice("collect_votes.vote", vote, VOTES)
    check_choice("collect_votes.inputs", inputs, ("base", "per_expert"))
    modules = compatible("collect_votes", experts, allow_base_mismatch=allow_base_mismatch)
    check_model("collect_votes", model, experts, modules, allow_base_mismatch)
    experts = voters(experts, inputs)
    chosen = balanced(prompts, per_category, seed=seed)
    texts = sorted(text for texts in chosen.values() for text in texts)
    deltas = {module: [on_device(expert.factors(module), model.device) for expert in experts] for module in modules}
    ballots: dict[str, dict[str, Ballot]] = {unit: {} for unit in UNITS}
    for start in track(range(0, len(texts), batch_size), "calibrating"):
        batch = texts[start : start + batch_size]
        activity = _activity(model, deltas, batch, states=states, steps=steps, seed=seed, per_expert=inputs == "per_expert")
        for unit, by_module in activity.items():
            for module, seen in by_module.items():
                if not seen.isfinite().all():
                    raise UserError(
                        f"collect_votes: the activations of {module} must be finite, got NaN or infinity in the batch of prompt "
                        f"{start}. Load the model in float32."
                    )
                ballot = tally(seen, vote=vote, top_k=top_k)
                ballots[unit][module] = ballots[unit][module] + ballot if module in ballots[unit] else ballot
    record = {
        "base_fingerprint": model.fingerprint(),
        "fingerprints": [expert.file.fingerprint() for expert in experts],
        "weights": [expert.weight for expert in experts],
        "prompts": {category: len(texts) for category, texts in chosen.items()},
        "prompts_sha256": hash_value(texts),
        "options": {"states": states, "steps": steps, "inputs": inputs, "top_k": top_k, "seed": seed, "batch_size": batch_size},
    }
    return Votes(
        tuple(expert.name for expert in experts),
        len(texts),
        {unit: found for unit, found in ballots.items() if found},
        vote,
        record,
    )


def voters(experts: Sequence[Expert], inputs: Inputs) -> list[Expert]:
    """The experts at the weights at which they vote: a weight that all have in common scales all activations on the base model's
    inputs alike, so it cancels, and all vote at 1. ``"per_expert"`` inputs depend on it.
    """
    common = inputs == "base" and len({expert.weight for expert in experts}) == 1
    return [replace(expert, weight=1.0) if common else expert for expert in experts]


def balanced(prompts: Mapping[str, Sequence[str]], per_category: int, *, seed: int = 0) -> dict[str, list[str]]:
    """The same number of prompts for every category, none used twice; chosen by hash, so the input's order does not matter.

    The categories take turns, small ones first, until one has no prompt left that is not taken, or all have ``per_category``.
    Raises: UserError if that leaves a category without any.
    """
    pools = {category: by_hash(texts, seed) for category, texts in prompts.items()}
    if not pools:
        raise UserError("collect_votes.prompts must hold at least one category, got 0. Give unsafe prompts by category.")
    order = sorted(pools, key=lambda category: (len(pools[category]), category))
    free = {category: iter(pools[category]) for category in order}
    chosen: dict[str, list[str]] = {category: [] for category in sorted(order)}
    used: set[str] = set()
    for turn in range(per_category):
        taken = {}
        for category in order:
            taken[category] = next((text for text in free[category] if text not in used), None)
            if taken[category] is None and turn == 0:
                raise UserError(
                    f"collect_votes.prompts must hold a prompt of its own for every category, got none for {category}. Add some."
                )
            used.add(taken[category] or "")
        if None in taken.values():
            break
        for category, text in taken.items():
            chosen[category].append(text or "")
    number = len(chosen[order[0]])
    if number < FEW:
        log.warning("Only %d prompts per category vote; below %d the winners are mostly chance. Add prompts.", number, FEW)
    return chosen


@torch.inference_mode()
def _activity(
    model: DiffusionModel,
    deltas: Mapping[str, list[Delta]],
    prompts: Sequence[str],
    *,
    states: int,
    steps: int,
    seed: int,
    per_expert: bool,
) -> dict[str, dict[str, Tensor]]:
    """Mean activation over tokens and states, for one batch: unit -> module -> ``[prompt, expert, unit]``."""
    experts = range(len(next(iter(deltas.values()))))
    hooks = {module: _ActivationHook(parts, add_active=per_expert) for module, parts in deltas.items()}
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(model.denoiser.get_submodule(module).register_forward_hook(hook).remove)
        for active in [[n] for n in experts] if per_expert else [list(experts)]:
            for wanted in calibration_states(model, prompts, states=states, steps=steps, seed=seed):
                for hook in hooks.values():
                    hook.active, hook.recording = active, wanted
    activity: dict[str, dict[str, Tensor]] = {unit: {} for unit in UNITS}
    for module, hook in hooks.items():
        activity["output"][module] = torch.stack([hook.outputs[n] for n in experts], 1).cpu() / states
        factors = [part for part in hook.parts if isinstance(part, LoraFactors)]
        if len(factors) == len(hook.parts) and len({part.rank for part in factors}) == 1:  # unequal ranks cannot compete
            down = torch.stack([hook.hidden[n] for n in experts], 1).cpu() / states
            activity["down"][module] = down
            activity["rank_unit"][module] = down * torch.stack([part.up.norm(dim=0) for part in factors]).cpu()
    return activity


class _ActivationHook:
    """A forward hook on one linear layer that sums the active experts' activations on the layer's input while it is recording.

    Args:
        parts: The experts' changes of the layer.
        add_active: Also add the one active expert's own output to the layer's.
    """

    def __init__(self, parts: Sequence[Delta], *, add_active: bool) -> None:
        self.parts = parts
        self.add_active = add_active
        self.active: Sequence[int] = ()
        self.recording = False
        self.hidden: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        for n in self.active if self.recording else ():
            hidden, outputs = activations(x.reshape(len(x), -1, x.shape[-1]), self.parts[n])
            self.hidden[n] = self.hidden.get(n, 0) + hidden
            self.outputs[n] = self.outputs.get(n, 0) + outputs
        if not self.add_active:
            return None
        (part,) = (self.parts[n] for n in self.active)
        return changed_output(output, x, part)


def check_model(
    who: str, model: DiffusionModel, experts: Sequence[Expert], modules: Sequence[str], allow_base_mismatch: bool
) -> None:
    layers = dict(model.denoiser.named_modules())
    outside = [module for module in modules if split_name(module)[0] or getattr(experts[0].file.entries[module], "kernel", None)]
    if outside:
        raise UserError(
            f"{who} looks at the inputs and outputs of the U-Net's linear layers, got experts that also adapt {outside[0]} and "
            f"{len(outside) - 1} more modules of text encoders or convolutions. Merge them by sum, ties or dare-ties."
        )
    missing = [module for module in modules if module not in layers]
    if missing:
        raise UserError(
            f"{who}.experts must fit {model.folder}, got {missing[0]} and {len(missing) - 1} more modules that it does not "
            "have. Name the model that they were trained on."
        )
    if any(isinstance(layer, BaseTunerLayer) and (layer.merged or not layer.disable_adapters) for layer in layers.values()):
        raise UserError(f"{who}.model must have its adapters off, got some that are on. Use `with adapter_off(model):`.")
    for expert in experts:
        base = expert.file.metadata.get("base_fingerprint")
        if base and base != model.fingerprint() and not allow_base_mismatch:
            raise UserError(
                f"{who}.model must be the base of {expert.name} ({base[:12]}), got {model.folder} "
                f"({model.fingerprint()[:12]}). Name that model, or go on anyway (--anyway)."
            )
