"""Unified Concept Editing: move a concept's keys and values in cross-attention onto another's (UCE, arXiv 2308.14761).

A closed form, no training and no images. The edit has the rank of the number of edited token states, so it is delivered as
exactly that LoRA: it can be switched, stacked and merged like any other, and the model's weights are not touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_options, option
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_names
from valign.models.diffusion.text_states import TEXT_READERS, text_readers, token_states
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="uce",
    title="Unified Concept Editing, as the exact LoRA that it is",
    paper="arXiv 2308.14761",
    room="editing",
    entry="valign.editing.uce:edit_concepts",
    fidelity="exact",
    note="the paper's minimizer in float64, delivered as the LoRA that it equals",
)

# The authors' wordings of a concept; {} stands for it.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "none": ("{}",),
    "object": ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "art": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
}


@dataclass(frozen=True, kw_only=True)
class ConceptEdit:
    """What to edit: ``concepts[i]`` is to be generated as ``guides[i]``, and ``preserve`` as before."""

    concepts: tuple[str, ...] = option((), help="remove this instead of the policy's concepts", flags=("--concept",))
    guides: tuple[str, ...] = option(  # "" is the absence of content, the state of the begin-of-text token
        ("",),
        help="what to generate instead, one for all or one per --concept; 'safe' takes the policy's counterparts",
        flags=("--guide",),
    )
    preserve: tuple[str, ...] = option((), help="text whose keys and values shall stay")
    lam: float = option(0.5, help="weight of the old weights; above 0, which keeps the system solvable", above=0)
    erase_scale: float = option(1.0, help="strength of the edit: as it grows, W' e goes to W g", above=0)
    preserve_scale: float = option(1.0, help="strength of --preserve: as it grows, W' p goes to W p", low=0, needs={"preserve": ()})
    tokens: Literal["last", "all"] = option("last", help="the concept's last token, or all of the padded text")
    template: str = option("none", help="further wordings of each concept", choices=tuple(TEMPLATES))

    def __post_init__(self) -> None:
        check_options(self)
        concepts = [concept.strip() for concept in self.concepts]
        if not concepts or not all(concepts):
            raise UserError(f"ConceptEdit.concepts must be texts, got {list(self.concepts)}. Name at least one concept to edit.")
        if len(self.guides) not in (1, len(concepts)):
            raise UserError(
                f"ConceptEdit.guides must be one text, or one per concept ({len(concepts)}), got {len(self.guides)}. Add some."
            )
        both = sorted(set(concepts) & {text.strip() for text in self.preserve})
        if both:
            raise UserError(f"ConceptEdit.preserve must not hold what is edited, got {', '.join(both)} in both. Drop one.")

    def pairs(self) -> list[tuple[str, str]]:
        """``(edited text, guide text)``, every wording of every concept; an empty guide stays empty in every wording."""
        guides = self.guides * len(self.concepts) if len(self.guides) == 1 else self.guides
        forms = TEMPLATES[self.template]
        return [
            (form.format(concept), form.format(guide) if guide.strip() else "")
            for concept, guide in zip(self.concepts, guides, strict=True)
            for form in forms
        ]


def edit_concepts(model: DiffusionModel, edit: ConceptEdit) -> dict[str, LoraFactors]:
    """The edit as LoRA factors of every key and value projection of cross-attention, float32, scale 1.

    SDXL's projections read both text encoders side by side, and so does the edit.
    Raises: UserError if adapters are on the model, or a weight is not a plain matrix of finite numbers.
    """
    if adapter_names(model):
        raise UserError("edit_concepts needs a bare model, got one with an adapter loaded. Call unload_adapters first.")
    layers = text_readers(model)
    if not layers:
        raise UserError(f"edit_concepts needs cross-attention called {' and '.join(TEXT_READERS)}, got none. Choose another model.")
    for name, module in layers.items():
        if not module.weight.is_floating_point() or not module.weight.isfinite().all():
            raise UserError(f"edit_concepts needs finite, unquantized weights, got others in {name}. Load the model in full.")
    pairs = edit.pairs()
    edited, guide = (token_states(model, texts, edit.tokens) for texts in zip(*pairs, strict=True))
    kept = token_states(model, edit.preserve, edit.tokens) if edit.preserve else edited[:0]
    scales = {"lam": edit.lam, "erase_scale": edit.erase_scale, "preserve_scale": edit.preserve_scale}
    return {name: closed_form(module.weight, edited, guide, kept, **scales) for name, module in layers.items()}


def closed_form(
    weight: Float[Tensor, "fan_out dim"],
    edited: Float[Tensor, "edit dim"],
    guide: Float[Tensor, "edit dim"],
    preserved: Float[Tensor, "keep dim"],
    *,
    lam: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> LoraFactors:
    """``W' - W`` of the paper's minimizer, as ``up @ down`` of rank ``edit``; solved in float64, answered in float32.

    With rows e of ``edited``, g of ``guide``, p of ``preserved``, and ``M = lam I + a sum e e^T + b sum p p^T``::

        W' = (lam W + a sum (W g) e^T + b sum (W p) p^T) M^-1 = W + a (W G^T - W E^T) (E M^-1)

    Preserved states enter through M alone. No preserved state: whatever is orthogonal to all e is mapped as before.
    """
    w, e, g, p = (tensor.detach().cpu().double() for tensor in (weight, edited, guide, preserved))
    system = lam * torch.eye(w.shape[1], dtype=torch.float64) + erase_scale * e.T @ e + preserve_scale * p.T @ p
    down = torch.linalg.solve(system, e.T).T
    up = erase_scale * w @ (g - e).T
    return LoraFactors(down.float(), up.float(), 1.0)
