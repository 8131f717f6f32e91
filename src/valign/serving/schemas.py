"""Requests and answers, in the shapes of OpenAI's API. Unknown fields are refused, so that none is silently ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from valign.serving.settings import MAX_IMAGES

OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
MAX_PROMPT = 32_000  # characters, OpenAI's limit; the policy's own is usually lower
Text = Annotated[str, Field(min_length=1)]


def _off(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_offered", "This server does not offer it")
    return value


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]  # Literal[False] would take a 0


class Request(BaseModel):
    """Strict: a number in quotes is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(Request):
    url: Text


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: ImageUrl


MessagePart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ModerationRequest(Request):
    """One text, several texts (a result each), or parts of one message (one result)."""

    input: Text | Annotated[list[Text], Field(min_length=1)] | Annotated[list[MessagePart], Field(min_length=1)]
    model: str | None = None  # accepted for OpenAI's sake: there is one guard
    safety_config: Text | None = None  # of our own: sentences that tighten the guard, or loosen it as far as the key's role may


class ImageRequest(Request):
    """What OpenAI's clients may send; ``safety_config``, ``seed``, ``steps``, ``guidance_scale`` are our own (``extra_body``)."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = "auto"
    quality: Literal["auto", "standard", "low", "medium", "high", "hd"] | None = "auto"  # low halves the steps, high doubles them
    style: Literal["vivid", "natural"] | None = None  # without effect
    background: Literal["auto", "opaque"] | None = "auto"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    moderation: Literal["auto", "low"] | None = "auto"  # without effect: the policy is the server's
    response_format: Literal["b64_json"] | None = None
    stream: Off | None = False
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = 0
    user: str | None = None
    safety_config: Text | None = None  # as in `ModerationRequest`
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModerationResult(Answer):
    """``flagged`` is any of ``categories``. Keys that the policy has no category for are false, 0 and without input types."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]


class ModerationAnswer(Answer):
    id: str
    model: str
    results: list[ModerationResult]
    guard: list[dict[str, Any]]  # one per result: action, stage, intent, the policy's own categories and scores


class GeneratedImage(Answer):
    b64_json: str
    revised_prompt: str  # the caption of the image; the prompt itself where it was let through


class ImageAnswer(Answer):
    created: int
    data: list[GeneratedImage]
    output_format: str
    guard: dict[str, Any]  # what the guard did, and which images were held back


class ModelEntry(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "valign"


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorBody(Answer):
    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorBody
