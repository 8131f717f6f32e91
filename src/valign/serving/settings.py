"""How the service goes about its work; every number that an operator may want to change."""

from dataclasses import dataclass
from typing import Literal

from valign.checks import UserError, check_options, check_range, option

MAX_IMAGES = 10  # of one request, as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checked when made."""

    names: tuple[str, ...] = option(("valign",), help="name that the model answers to; the first is its own", flags=("--name",))
    steps: int = option(50, help="denoising steps where a request names none", low=1)
    max_steps: int = option(100, help="steps that a request may ask for", low=1)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale", low=0)
    batch_size: int = option(8, help="images in one model call", low=1)
    batch_wait: float = option(0.02, help="seconds that a model call waits for further images", low=0, rare=True)
    max_images: int = option(
        64,
        help="images waiting or being generated; beyond that a request gets 503",
        low=MAX_IMAGES,
        hint="One request may ask for so many.",
        flags=("--queue",),
    )
    max_checks: int = option(1024, help="prompts being checked; beyond that a request gets 503", low=1, rare=True)
    check_batch: int = option(64, help="prompts in one pass of the guard", low=1, rare=True)
    check_workers: int = option(1, help="threads that check; more only where stages wait for a chat endpoint", low=1, rare=True)
    max_inputs: int = option(64, help="texts of one moderation request", low=1, rare=True)
    max_body: int = option(4 * 2**20, help="bytes of a request", low=1, rare=True)
    max_text: int = option(64_000, help="characters of all texts of one moderation request", low=1, rare=True)
    max_pixels: int = option(
        4096 * 4096, help="pixels of all images of one moderation request, every frame counted", low=1, rare=True
    )
    check_timeout: float = option(
        60.0, help="seconds that one call of the guard or the image check may take; then it is given up", above=0, rare=True
    )
    stall: float = option(
        900.0, help="seconds after which a call of the model counts as hung, and another thread goes on", above=0, rare=True
    )
    timeout: float = option(300.0, help="seconds until a request is aborted", above=0)
    body_timeout: float = option(30.0, help="seconds in which a request's body must have come", above=0, rare=True)
    canary_every: float = option(
        3600.0, help="seconds between two looks at the canaries; after a wrong answer 60 at most", above=0, rare=True
    )
    per_minute: float = option(
        0.0,
        help="requests per minute and key; each image and each text counts as one; 0 is without limit",
        low=0,
        flags=("--rate",),
    )
    prompts: Literal["hashed", "full"] = option("hashed", help="what the audit log keeps of a prompt", flags=("--audit-prompts",))
    compare: bool = option(
        False, help="the page also generates prompts as typed, and shows what the image check passes", flags=("--compare",)
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.names or not all(self.names):
            raise UserError("Settings.names must name the model, got nothing.")
        check_range("Settings.steps", float(self.steps), low=1, high=self.max_steps)
        check_range("Settings.max_checks", float(self.max_checks), low=self.max_inputs, hint="One request may hold so many.")
