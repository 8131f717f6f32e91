"""A linear probe on a diffusion model's own text encoders: the category of harm that a prompt asks for, as the model reads it.

``p = softmax(W h + b)`` with ``h`` the prompt's `prompt_states`; row 0 is "harmless", then a row per category. What the model
renders it has read from these encoders, so what it understands by a prompt, in any spelling, is there for the probe to find.
A probe belongs to the text encoders that it was fitted on; models that share them share the probe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from valign.checks import UserError, check_range
from valign.files import atomic_path, hash_value, read_json, write_json
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.prompt_states import prompt_states, state_width, text_fingerprint
from valign.models.files.tensor_fingerprint import fingerprint_tensors

METHOD = Method(
    slug="text-probe",
    title="Linear probe on the model's own text encoder: LiVO's retriever, a stage of the guard",
    paper="arXiv 1610.01644",
    room="models",
    entry="valign.models.heads.text_probe:TextProbe",
    fidelity="variant",
    note="logistic regression on the states of the model's own text encoders, for prompts; the paper probes layers of image models",
)

WEIGHTS, CARD = "text_probe.safetensors", "text_probe.json"
FORMAT = 1
REFIT = "Fit it again with `valign train retriever`."


@dataclass(frozen=True)
class TextProbe:
    """A fitted probe on the text encoders of ``model``.

    Raises: UserError if the tensors do not fit the categories and the encoders, or a number is NaN or infinite.
    """

    model: DiffusionModel = field(repr=False)
    categories: tuple[str, ...]  # policy ids, one or more
    weight: Float[Tensor, "class dim"]  # float32; row 0 is "harmless", then the categories
    bias: Float[Tensor, " class"]
    threshold: float = 0.5  # probability of any harm from which a prompt is unsafe, in (0, 1]
    notes: Mapping[str, Any] = field(default_factory=dict)  # data, settings, measured figures: what the card says

    def __post_init__(self) -> None:
        check_range("TextProbe.threshold", self.threshold, above=0.0, high=1.0)
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise UserError(f"TextProbe.categories must be one or more distinct ids, got {self.categories}. {REFIT}")
        shape, rows = tuple(self.weight.shape), 1 + len(self.categories)
        wanted = (rows, state_width(self.model))
        if shape != wanted or tuple(self.bias.shape) != (rows,):
            raise UserError(
                f"TextProbe.weight must be {wanted} for {len(self.categories)} categories on the text encoders of "
                f"{self.model.folder}, got {shape} with a bias of {tuple(self.bias.shape)}. {REFIT}"
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise UserError(f"TextProbe.weight and bias must be finite, got NaN or infinity. {REFIT}")

    def probabilities(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt class"]:
        """Of "harmless" and of each category, float64; a row sums to 1.

        Raises: UserError if a text encoder answers NaN or infinity: no threshold would hold that back.
        """
        states = prompt_states(self.model, prompts)
        if not states.isfinite().all():
            raise UserError(
                f"The text encoders of {self.model.folder} must answer finite numbers, got NaN or infinity. Load them in float32."
            )
        return probe_probabilities(states, self.weight, self.bias).numpy()

    def fingerprint(self) -> str:
        """SHA-256 of the text encoders, the categories, the numbers and the threshold, hex."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        numbers = fingerprint_tensors({"weight": self.weight, "bias": self.bias})
        return hash_value([text_fingerprint(self.model), self.categories, numbers, self.threshold])


def probe_probabilities(
    states: Float[Tensor, "prompt dim"], weight: Float[Tensor, "class dim"], bias: Float[Tensor, " class"]
) -> Float[Tensor, "prompt class"]:
    """``softmax(states W' + b)`` over the classes, in float64."""
    return (states.double() @ weight.double().T + bias.double()).softmax(dim=1)


def save_probe(folder: Path, probe: TextProbe) -> None:
    """Write ``text_probe.safetensors`` and the card ``text_probe.json``: encoders, categories, threshold, notes."""
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({"weight": probe.weight.contiguous(), "bias": probe.bias.contiguous()}, temporary)
    card = {
        "format": FORMAT,
        "family": probe.model.family,
        "text_encoders": text_fingerprint(probe.model),
        "width": state_width(probe.model),
        "categories": list(probe.categories),
        "threshold": probe.threshold,
    }
    write_json(folder / CARD, {**card, **probe.notes})


def load_probe(path: str | Path, model: DiffusionModel) -> TextProbe:
    """Read a probe from its folder or its weight file, for a model with the text encoders that it was fitted on.

    Raises: UserError if it is missing, damaged, or of other text encoders.
    """
    folder = Path(path).parent if Path(path).suffix == ".safetensors" else Path(path)
    card = read_json(folder / CARD)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise UserError(f"{folder / CARD} must be the card of a text probe of format {FORMAT}. {REFIT}")
    found = text_fingerprint(model)
    if card["text_encoders"] != found:
        raise UserError(
            f"{folder} was fitted on text encoders {card['text_encoders'][:12]} ({card['family']}), {model.folder} has "
            f"{found[:12]} ({model.family}). Use a model with those encoders, or fit a probe for this one with "
            "`valign train retriever`."
        )
    try:
        tensors = load_file(folder / WEIGHTS)
        notes = {name: value for name, value in card.items() if name not in _OWN}
        return TextProbe(model, tuple(card["categories"]), tensors["weight"], tensors["bias"], card["threshold"], notes)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder / WEIGHTS} could not be read: {error}. Copy both files again, or fit it again.") from error


_OWN = ("format", "family", "text_encoders", "width", "categories", "threshold")  # the card's keys that are not notes
