"""``POST /v1/moderations``: texts, or one message of texts and images, judged by the guard and its detector."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from valign.guard.records import GuardDecision
from valign.serving import errors
from valign.serving.categories import PartFindings, image_findings, merge, text_findings
from valign.serving.images import decode, unpack
from valign.serving.schemas import ImagePart, ModerationAnswer, ModerationRequest, TextPart
from valign.serving.service import Caller, Service
from valign.serving.settings import Settings


async def moderate(service: Service, caller: Caller, body: ModerationRequest) -> ModerationAnswer:
    """A result per text of a list, one result for a message of parts. Raises: ApiError; UserError for what is not a prompt."""
    policy, limits = service.rules.guard.policy, service.settings
    parts = [body.input] if isinstance(body.input, str) else body.input
    if len(parts) > limits.max_inputs:
        raise errors.invalid(f"input must have at most {limits.max_inputs} parts.", param="input")
    service.limit.take(caller.name, len(parts), counted=1)
    read, texts = await service.parse(_read, parts, limits)
    decisions = iter(await service.moderate(caller, texts, config=body.safety_config) if texts else [])
    found = [
        await _of_image(service, caller, part) if isinstance(part, bytes) else _of_text(policy, next(decisions)) for part in read
    ]
    together = not isinstance(parts[0], str)
    groups = [found] if together else [[one] for one in found]
    return ModerationAnswer(
        id=caller.request.replace("req_", "modr-"),
        model=f"valign-guard/{policy.id}",
        results=[merge([finding for finding, _ in group]) for group in groups],
        guard=[{"parts": [own for _, own in group]} for group in groups],
    )


def _read(parts: Sequence[str | TextPart | ImagePart], limits: Settings) -> tuple[list[str | bytes], list[str]]:
    """Texts and images' bytes in order, and the texts alone. Raises: ApiError 400 beyond the limits of a request."""
    files = iter(
        unpack([part.image_url.url for part in parts if isinstance(part, ImagePart)], max_pixels=limits.max_pixels, param="input")
    )
    read = [next(files) if isinstance(part, ImagePart) else part if isinstance(part, str) else part.text for part in parts]
    texts = [part for part in read if isinstance(part, str)]
    if sum(map(len, texts)) > limits.max_text:
        raise errors.invalid(f"input must have at most {limits.max_text} characters in all.", param="input")
    return read, texts


def _of_text(policy: Any, decision: GuardDecision) -> tuple[PartFindings, dict[str, Any]]:
    if decision.stop == "script":
        raise errors.invalid("input has a text in a script that this guard cannot read.", param="input", code="unsupported_script")
    if decision.stop == "language" and not decision.categories:  # held back, not found harmful
        raise errors.invalid(
            "input has a text in a language that this guard does not judge.", param="input", code="unsupported_language"
        )
    own = {
        "type": "text",
        "action": decision.action,
        "flagged": decision.flagged,
        "stage": decision.stop or None,
        "intent": decision.intent,
        "categories": decision.categories,
        "scores": decision.scores,
        "policy": decision.policy,
        "config": decision.config or None,
    }
    return text_findings(policy, decision), own


async def _of_image(service: Service, caller: Caller, data: bytes) -> tuple[PartFindings, dict[str, Any]]:
    read = partial(decode, data, max_pixels=service.settings.max_pixels, param="input")
    scores, threshold, detector = await service.moderate_image(caller, read)
    flagged = not max(scores.values()) < threshold
    own = {"type": "image", "action": "block" if flagged else "allow", "flagged": flagged, "scores": scores, "threshold": threshold}
    return image_findings(scores, threshold, detector), own | {"detector": detector}
