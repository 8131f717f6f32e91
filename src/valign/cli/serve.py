"""``valign serve`` and ``valign api-key``: the guard and a model behind HTTP, and the keys for it."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import err, example, out, resolve_chat, resolve_detector, resolve_model

if TYPE_CHECKING:
    from valign.serving.service import Rules

AUDIT_KEY, API_KEYS = "VALIGN_AUDIT_KEY", "VALIGN_API_KEYS"  # variables that hold secrets
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@example("valign serve --model shapes --guard shapes --detector oracle")
def command(
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes or a file")] = "default",
    detector: Annotated[
        str, Option(help="who looks at images: oracle, nudenet, safety-checker=FOLDER ..., joined by +; none must be said")
    ] = "",
    head: Annotated[Path | None, Option(help="a head made by `valign guard fit`; the shipped one")] = None,
    chat: Annotated[
        str | None, Option(metavar="URL|FOLDER", help="OpenAI-compatible endpoint, or a local chat model, that judges and rewrites")
    ] = None,
    chat_model: Annotated[str, Option(help="model that the endpoint serves")] = "default",
    key_env: Annotated[str | None, Option(help="environment variable with the endpoint's key")] = None,
    name: Annotated[list[str], Option(help="name that the model answers to; may be repeated; its own if left out")] = [],  # noqa: B006
    host: Annotated[str, Option(help="address to listen on; others than this machine need keys")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="port; 0 takes a free one")] = 8000,
    keys: Annotated[Path | None, Option(help=f"file of `valign api-key`; keys in {API_KEYS} count as well")] = None,
    open_to_all: Annotated[bool, Option("--open", help="listen to other machines without keys")] = False,
    rate: Annotated[float, Option(min=0, help="requests per minute and key, an image counts as one; 0 is without limit")] = 0,
    audit: Annotated[str, Option(help="audit log: a path, or postgresql://USER@HOST/DATABASE")] = "valign-audit.db",
    audit_prompts: Annotated[Literal["hashed", "full"], Option(help="what the audit log keeps of a prompt")] = "hashed",
    steps: Annotated[int, Option(min=1, help="denoising steps where a request names none")] = 50,
    max_steps: Annotated[int, Option(min=1, help="steps that a request may ask for")] = 100,
    guidance_scale: Annotated[float, Option(min=0, help="classifier-free guidance scale")] = 7.5,
    batch_size: Annotated[int, Option(min=1, help="images in one model call")] = 8,
    queue: Annotated[int, Option(min=10, help="images waiting or being drawn; more are told to come again")] = 64,
    timeout: Annotated[float, Option(help="seconds until a request is given up")] = 300,
    drain: Annotated[int, Option(min=0, help="seconds that a stop waits for requests under way")] = 60,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    playground: Annotated[bool, Option("--playground", help="a web page at /playground; needs the extra [ui]")] = False,
    compare: Annotated[
        bool, Option("--compare", help="the page also draws prompts as typed, and shows what the image check passes")
    ] = False,
    access_log: Annotated[bool, Option("--access-log", help="a line per request; never with prompts or keys")] = False,
) -> None:
    """Serve OpenAI's /v1/moderations and /v1/images/generations, guarded and logged. SIGHUP reads policy and keys again."""
    from valign.serving.app import create_app
    from valign.serving.audit_store import AuditStore
    from valign.serving.server import serve
    from valign.serving.service import Service
    from valign.serving.settings import Settings

    settings = Settings(
        names=tuple(name) or (Path(model).name,),
        steps=steps,
        max_steps=max(steps, max_steps),
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        max_images=queue,
        check_workers=8 if chat else 1,
        per_minute=rate,
        timeout=timeout,
        prompts=audit_prompts,
        compare=compare,
    )
    load_rules = _rules(guard, detector, head, (chat, chat_model, key_env), keys)
    locked = bool(_keys(keys).names)
    if host not in LOOPBACK and not open_to_all and not locked:
        raise UserError(f"--host {host} needs API keys: --keys FILE (`valign api-key NAME`), {API_KEYS}, or --open on purpose.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("valign").setLevel(logging.INFO)
    service = Service(
        lambda: _model(model, adapter, device), load_rules, AuditStore(audit, create=True), secret=_secret(), settings=settings
    )
    app = create_app(service)
    if playground or compare:
        from valign.serving.playground import mount

        app = mount(app, service, login=locked)
    serve(app, host=host, port=port, drain=drain, access_log=access_log)


@example("valign api-key studio --keys keys.txt")
def api_key(
    name: Annotated[str, Argument(help="whose key it is; the audit log and the file name it")],
    keys: Annotated[Path, Option(help="file of key hashes, to which it is added")] = Path("keys.txt"),
) -> None:
    """Make an API key. It is printed once and written nowhere; the file holds its hash. A line taken out locks the key out."""
    from valign.serving.keys import new_key

    out.print(new_key(name, keys), markup=False, soft_wrap=True)
    err.print(Text(f"Its hash is in {keys}. A running server learns of it by SIGHUP.", style="dim"))


def _rules(policy: str, detector: str, head: Path | None, chat: tuple[str | None, str, str | None], keys: Path | None) -> Any:
    """A function that reads policy and keys anew; what does not change is loaded once. Mistakes show before any model is loaded."""
    from valign.guard import Guard
    from valign.policy import load_policy

    if not detector:
        raise UserError(
            "--detector must name who looks at images, got nothing: oracle, nudenet, safety-checker=FOLDER, clip-probe=FOLDER. "
            "`--detector none` hands out images that nobody looked at."
        )
    if detector == "none":
        err.print(Text("Images are not checked: --detector none.", style="yellow"))
    load_policy(policy)
    _keys(keys)
    place, served, key_env = chat
    judge = resolve_chat(place, model=served, key_env=key_env) if place else None
    watcher = None if detector == "none" else resolve_detector(detector)

    def load() -> Rules:
        from valign.serving.service import Rules

        return Rules(Guard.from_policy(load_policy(policy), chat=judge, detector=watcher, head=head), _keys(keys))

    return load


def _keys(file: Path | None) -> Any:
    from valign.serving.keys import Keys

    return Keys.load(file, environment=os.environ.get(API_KEYS, ""))


def _model(name: str, adapter: Path | None, device: str) -> Any:
    model = resolve_model(name, device=device)
    if adapter is not None:
        from valign.models.diffusion.lora import load_adapter

        load_adapter(model, adapter, name="adapter")
    return model


def _secret() -> bytes:
    """Keys the prompts' hashes in the log."""
    given = os.environ.get(AUDIT_KEY, "")
    if not given:
        err.print(
            Text(f"{AUDIT_KEY} is not set: prompts are hashed with a key of this run, so no later run finds them.", style="dim")
        )
        return secrets.token_bytes(32)
    if len(given) < 16:
        raise UserError(f"{AUDIT_KEY} must have at least 16 characters, got {len(given)}. Draw a random one.")
    return given.encode()
