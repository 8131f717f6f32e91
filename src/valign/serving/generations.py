"""``POST /v1/images/generations``: images of a prompt or of its safe rewrite, those that passed every check."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from valign.guard.records import GuardResult
from valign.serving import errors
from valign.serving.image_queue import GenerationRequest, ServedImage
from valign.serving.schemas import GeneratedImage, ImageAnswer, ImageRequest
from valign.serving.service import Caller, Service

EFFORT = {"low": 0.5, "high": 2.0, "hd": 2.0}  # quality -> times the usual steps


async def generate(service: Service, caller: Caller, body: ImageRequest) -> ImageAnswer:
    """Raises: ApiError, also where everything was blocked; UserError for what is not a prompt."""
    request = request_of(service, body)
    result, images = await service.generate(caller, request)
    assert result.prompt is not None
    data = [
        GeneratedImage(b64_json=image.encoded.base64, revised_prompt=_caption(result.prompt, image))
        for image in images
        if image.encoded is not None
    ]
    account = _account(result, images, request)
    read = await service.parse(service.rules.guard.read, result.prompt)
    if read != result.prompt:
        account["read"] = read
    return ImageAnswer(created=int(time.time()), data=data, output_format=request.form, guard=account)


def request_of(service: Service, body: ImageRequest) -> GenerationRequest:
    """What the request asks for, with the service's defaults. Raises: ApiError for what this model cannot do."""
    limits, side = service.settings, service.image_size
    if body.model is not None and body.model not in limits.names:
        raise errors.unknown_model(limits.names)
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise errors.invalid(f"size must be auto or {side}x{side}: this model has no other.", param="size")
    if body.steps is not None and body.steps > limits.max_steps:
        raise errors.invalid(f"steps must be at most {limits.max_steps}.", param="steps")
    usual = max(1, min(limits.max_steps, round(limits.steps * EFFORT.get(body.quality or "auto", 1.0))))
    return GenerationRequest(
        prompt=body.prompt,
        count=body.n or 1,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        steps=body.steps or usual,
        guidance_scale=limits.guidance_scale if body.guidance_scale is None else body.guidance_scale,
        form=body.output_format or "png",
        quality=100 if body.output_compression is None else body.output_compression,
        config=body.safety_config,
    )


def _caption(prompt: str, image: ServedImage) -> str:
    """The caption that the image was generated from."""
    style = image.found.attempts[-1].style
    return f"{prompt}, {style}" if style else prompt


def _account(result: GuardResult, images: Sequence[ServedImage], request: GenerationRequest) -> dict[str, Any]:
    """What the guard did with prompt and images."""
    decision = result.decision
    held = [
        {"index": number, "categories": [verdict.category] if verdict is not None and verdict.category else []}
        for number, image in enumerate(images)
        if image.encoded is None
        for verdict in [image.found.attempts[-1].verdict]
    ]
    return {
        "action": result.action,
        "stage": decision.stop or None,
        "intent": decision.intent,
        "categories": decision.categories,
        "requested": request.count,
        "blocked": held,
        "seeds": [image.found.attempts[-1].seed for image in images if image.encoded is not None],
        "checked": all(image.found.checked for image in images),
        "policy": decision.policy,
        "config": decision.config or None,
    }
