"""A web page on the same server: what every stage found in a prompt, what other thresholds would change, and the images.

Everything goes through `Service`, under the same limits and into the same log. Sliders change the findings that are shown, not the
images.
"""

import os
import secrets
from collections.abc import Collection, Sequence
from functools import partial
from itertools import count
from typing import Any

from fastapi import FastAPI

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.guard.records import GuardResult
from valign.serving import playground_html as html
from valign.serving.errors import ApiError, wrong_key
from valign.serving.gate import PAGE
from valign.serving.image_queue import GenerationRequest, ServedImage
from valign.serving.service import Caller, Service
from valign.serving.what_if import retuned, thresholds_of

INTRO = (
    "# Playground\nWhat the guard finds in a prompt, and the image. Move a slider to see what another threshold would find: "
    "images always follow the server's own rules."
)
STEP = 0.005  # of a slider
SLIDERS = {
    "learned": "learned stage fires from (probability)",
    "semantic": "semantic stage fires from (cosine)",
    "keep_words": "a rewrite keeps words (Jaccard)",
    "keep_meaning": "a rewrite keeps meaning (cosine)",
}


class Playground:
    """The functions behind the page. Each returns HTML."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._series, self._number = secrets.token_hex(8), count()

    def caller(self, user: str | None) -> Caller:
        """The caller, from the login; counted against the same rate as the key's other requests.

        Raises: ApiError 401 if there is no such key any more, 429.
        """
        owners = self._service.rules.keys.names.values()
        if owners and user not in owners:
            raise wrong_key()
        caller = Caller(user or "playground", f"page_{self._series}{next(self._number):x}")
        self._service.limit.take(caller.name)
        return caller

    async def levels(self) -> dict[str, float]:
        """The server's own value of every slider of `SLIDERS` that applies under its policy. Raises: ApiError."""
        guard = self._service.rules.guard
        found = await self._service.run(thresholds_of, guard)
        found |= {"keep_words": guard.acceptor.keep_words, "keep_meaning": guard.acceptor.keep_meaning}
        return {name: round(value, 3) for name, value in found.items() if name in SLIDERS}

    async def examine(self, user: str | None, prompt: str, values: Sequence[float]) -> tuple[str, str]:
        """Verdict and stages, under the values of `SLIDERS`; the server's own decision is what is logged."""
        try:
            caller = self.caller(user)
            return await self._service.sessions.run(caller.name, self._examine(caller, prompt, values))
        except (ApiError, UserError) as error:
            return html.mistake(str(error)), ""

    async def _examine(self, caller: Caller, prompt: str, values: Sequence[float]) -> tuple[str, str]:
        own, guard = await self.levels(), self._service.rules.guard
        moved = {name: value for name, value in zip(SLIDERS, values) if name in own and abs(value - own[name]) >= STEP / 2}
        decision = (await self._service.moderate(caller, [prompt]))[0]
        work = partial(_under, guard, moved, prompt) if moved else partial(guard.finish, decision, prompt)
        result = await self._service.run(work)
        return html.verdict(result, prompt), html.stages(result.decision.trace)

    async def generate(self, user: str | None, prompt: str, seed: int, steps: int) -> str:
        """The guarded image, and beside it the one of the prompt as typed, where the site allows that."""
        limits = self._service.settings
        try:
            steps = min(max(int(steps), 1), limits.max_steps)
            request = GenerationRequest(
                prompt=prompt, count=1, seed=int(seed) % 2**32, steps=steps, guidance_scale=limits.guidance_scale
            )
            caller = self.caller(user)
            return await self._service.sessions.run(caller.name, self._generate(caller, request))
        except (ApiError, UserError) as error:
            return html.mistake(str(error))

    async def _generate(self, caller: Caller, request: GenerationRequest) -> str:
        parts = []
        if self._service.settings.compare:
            parts.append(_figure("as typed", await self._service.compare(caller, request)))
        result, images = await self._service.generate(caller, request)
        return html.images([*parts, _figure(f"from: {result.prompt}", images[0])])


def mount(app: FastAPI, service: Service, *, login: bool) -> FastAPI:
    """Put the page under `valign.serving.gate.PAGE`.

    Args: login: Ask for a key's name and the key itself. Without keys the page is as open as the rest.
    Raises: UserError if gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("The playground needs gradio. Run: pip install 'valign[ui]'") from None

    def known(name: str, key: str) -> bool:
        return service.ready and service.rules.keys.name_of(key) == name

    page = _page(gradio, Playground(service), service)
    mounted = gradio.mount_gradio_app(
        app,
        page,
        PAGE,
        auth=known if login else None,
        auth_message="Sign in with the name of your API key, and the key as the password.",
        footer_links=[],
        max_file_size=1,  # bytes: nothing is uploaded here
        css=html.CSS,
        theme=gradio.themes.Base(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    pages = next(route.app for route in mounted.routes if getattr(route, "path", "") == PAGE)

    def log_out(names: Collection[str]) -> None:
        for token in [token for token, user in pages.tokens.items() if user in names]:
            del pages.tokens[token]

    service.sessions.on_end.append(log_out)
    return mounted


def _page(gr: Any, play: Playground, service: Service) -> Any:
    with gr.Blocks(title="valign playground", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=4000, elem_id="prompt")
        with gr.Row():
            examine = gr.Button("Examine", elem_id="examine")
            generate = gr.Button("Examine and generate", variant="primary", elem_id="generate")
        verdict, images, stages = gr.HTML(elem_id="verdict"), gr.HTML(elem_id="images"), gr.HTML(elem_id="stages")
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
            steps = gr.Slider(1, service.settings.max_steps, value=service.settings.steps, step=1, label="Steps")
        with gr.Accordion("What if the thresholds were others?", open=False, elem_id="thresholds"):
            sliders = [gr.Slider(0, 1, step=STEP, label=label, visible=False) for label in SLIDERS.values()]

        async def show() -> list[Any]:
            """Values of the sliders, asked for when the page is loaded: the service may not be ready earlier."""
            try:
                own = await play.levels()
            except ApiError:
                own = {}
            return [gr.update(value=own.get(name, 0), visible=name in own) for name in SLIDERS]

        async def look(request: gr.Request, text: str, *values: float) -> tuple[str, str]:
            return await play.examine(request.username, text, values)

        async def make(request: gr.Request, text: str, number: float | None, many: float) -> str:
            return await play.generate(request.username, text, int(number or 0), int(many))

        page.load(show, None, sliders)
        for event in (prompt.submit, examine.click, generate.click, *(slider.release for slider in sliders)):
            event(look, [prompt, *sliders], [verdict, stages])
        generate.click(make, [prompt, seed, steps], images)
    return page


def _under(guard: Guard, moved: dict[str, float], prompt: str) -> GuardResult:
    """What the guard would say with some levels moved."""
    other = retuned(guard, moved)
    return other.finish(other.check(prompt, explain=True), prompt)


def _figure(title: str, image: ServedImage) -> tuple[str, str | None, str]:
    verdict = image.found.attempts[-1].verdict
    seen = "not checked"
    if verdict is not None and verdict.score is not None:
        seen = f"image check {verdict.score:.3f} of {verdict.threshold:.3f} {verdict.category}".strip()
    if image.encoded is None:
        return title, None, f"held back: {seen}"
    return title, f"data:image/png;base64,{image.encoded.base64}", f"seed {image.found.attempts[-1].seed}, {seen}"
