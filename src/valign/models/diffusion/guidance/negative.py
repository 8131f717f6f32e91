"""Negative prompt: the unconditional branch answers an unwanted text, so that guidance leads away from it. Costs nothing."""

from dataclasses import dataclass

from valign.interfaces import GuidanceState
from valign.methods import Method
from valign.models.diffusion.guidance.base import classifier_free

METHOD = Method(
    slug="negative-prompt",
    title="Negative prompt",
    paper="-",
    room="models",
    entry="valign.models.diffusion.guidance.negative:NegativePrompt",
    fidelity="exact",
    note="the pipeline's own guidance with another text in the unconditional branch",
)


@dataclass(frozen=True)
class NegativePrompt:
    """``eps(negative) + scale (eps(prompt) - eps(negative))``. The empty text is plain classifier-free guidance, bit for bit."""

    negative: str
    texts: tuple[str, ...] = ()

    def start(self) -> GuidanceState:
        return classifier_free
