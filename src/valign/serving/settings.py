"""How the service goes about its work; every number that an operator may want to change."""

from dataclasses import dataclass
from typing import Literal

from valign.checks import UserError, check_choice, check_range

MAX_IMAGES = 10  # of one request, as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checked when made."""

    names: tuple[str, ...] = ("valign",)  # that the model answers to; the first is its own
    steps: int = 50  # denoising steps where the request names none
    max_steps: int = 100
    guidance_scale: float = 7.5
    batch_size: int = 8  # images in one model call
    batch_wait: float = 0.02  # seconds that a model call waits for company
    max_images: int = 64  # waiting or being drawn; more are told to come again
    max_checks: int = 1024  # prompts being checked; more are told to come again
    check_batch: int = 64  # prompts in one pass of the guard
    check_workers: int = 1  # threads that check; more only where stages wait for a chat endpoint
    max_inputs: int = 64  # texts of one moderation request
    max_body: int = 4 * 2**20  # bytes of a request
    max_pixels: int = 4096 * 4096  # of an image that is sent for moderation
    timeout: float = 300.0  # seconds until a request is given up
    body_timeout: float = 30.0  # seconds in which a request's body must have come
    per_minute: float = 0.0  # requests per key, an image counts as one; 0 is without limit
    prompts: Literal["hashed", "full"] = "hashed"  # what the audit log keeps of a prompt
    compare: bool = False  # the playground also draws prompts as they were typed, and shows what the image check passes

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise UserError("Settings.names must name the model, got nothing.")
        check_choice("Settings.prompts", self.prompts, ("hashed", "full"))
        check_range("Settings.max_steps", float(self.max_steps), low=1)
        check_range("Settings.steps", float(self.steps), low=1, high=self.max_steps)
        check_range("Settings.guidance_scale", self.guidance_scale, low=0)
        for name in ("batch_size", "max_checks", "check_batch", "check_workers", "max_inputs", "max_body", "max_pixels"):
            check_range(f"Settings.{name}", float(getattr(self, name)), low=1)
        check_range("Settings.max_images", float(self.max_images), low=MAX_IMAGES, hint="One request may ask for so many.")
        check_range("Settings.max_checks", float(self.max_checks), low=self.max_inputs, hint="One request may hold so many.")
        for name in ("timeout", "body_timeout"):
            check_range(f"Settings.{name}", getattr(self, name), above=0)
        for name in ("batch_wait", "per_minute"):
            check_range(f"Settings.{name}", getattr(self, name), low=0)
