"""``valign serve`` and ``valign api-key``: the guard and a model behind HTTP, and the keys for it."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Argument, Context, Option

from valign.checks import UserError, option
from valign.cli.common import Anyway, ChatOptions, GuardParts, check_adapters, err, example, out, resolve_detector, resolve_model
from valign.cli.early import refuse_other_base
from valign.cli.fitting import fit_sampling
from valign.cli.options import changes, configured, record, refuse_given
from valign.memory import PAIRS, SAMPLING, TRAINING, MemoryConfig

if TYPE_CHECKING:
    from valign.serving.canaries import Canaries
    from valign.serving.service import Rules

AUDIT_KEY, API_KEYS = "VALIGN_AUDIT_KEY", "VALIGN_API_KEYS"  # variables that hold secrets
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the service listens, and how it stops."""

    host: str = option("127.0.0.1", help="address to listen on; others than this machine need keys")
    port: int = option(8000, help="port; 0 takes a free one", low=0, high=65535)
    open: bool = option(False, help="listen to other machines without keys")
    drain: int = option(60, help="seconds that a stop waits for requests under way", low=0)
    access_log: bool = option(False, help="a line per request; never with prompts or keys")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """The audit log."""

    audit: str = option("valign-audit.db", help="audit log: a path, or postgresql://USER@HOST/DATABASE")
    anchor: Path | None = option(None, help="file that keeps the audit log's head; the log's name with .head")
    log_size: int = option(
        256, help="MiB of the audit log's file after which the log goes on in a new one; SQLite only", low=1, rare=True
    )


@dataclass(frozen=True, kw_only=True)
class RulesOptions:
    """What the service checks with."""

    model: str
    policy: str
    detector: str
    trained: GuardParts
    chat: ChatOptions
    keys: Path | None
    threads: int
    configs: Path | None


@example(
    "valign serve --model shapes --guard shapes --detector oracle",
    cls=configured(
        pipeline=True,
        early=lambda params, _: refuse_other_base(params["model"], filter(None, [params["adapter"]]), anyway=params["anyway"]),
        settings="valign.serving.settings:Settings",
        chat=ChatOptions,
        guarding=GuardParts,
        log=LogOptions,
        listen=ListenOptions,
        memory="valign.memory:MemoryConfig",
        typed={"memory": SAMPLING},
    ),
)
def command(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes or a file")] = "default",
    detector: Annotated[
        str, Option(help="detector that checks images: oracle, nudenet, safety-checker=FOLDER ..., joined by +; none must be said")
    ] = "",
    guard_threads: Annotated[
        int, Option(min=0, help="threads of torch that check a prompt; 0 is as many as torch takes, best on an idle machine only")
    ] = 1,
    keys: Annotated[Path | None, Option(help=f"file of `valign api-key`; keys in {API_KEYS} count as well")] = None,
    configs: Annotated[
        Path | None, Option(help="YAML file of safety configs and roles by name of the key's owner; read anew by SIGHUP as well")
    ] = None,
    canaries: Annotated[
        Path | None, Option(help="folder of known cases, judged every hour: block.txt, allow.txt, images in block/ and allow/")
    ] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    playground: Annotated[bool, Option("--playground", help="a web page at /playground; needs the extra [ui]")] = False,
) -> None:
    """Serve OpenAI's /v1/moderations and /v1/images/generations, guarded and logged. SIGHUP reads policy and keys again."""
    from valign.interfaces import SamplingConfig
    from valign.serving.app import create_app
    from valign.serving.audit_store import AuditStore, default_anchor
    from valign.serving.server import serve
    from valign.serving.service import Service
    from valign.serving.settings import Settings

    memory = record(ctx, MemoryConfig)
    memory.refuse_unused(TRAINING, PAIRS, why="on serve, which trains nothing")
    chat, listening, log = record(ctx, ChatOptions), record(ctx, ListenOptions), record(ctx, LogOptions)
    given = changes(ctx, Settings)
    most = max(given.get("steps", Settings.steps), given.get("max_steps", Settings.max_steps))
    settings = Settings(**{"names": (Path(model).name,), "check_workers": 8 if chat.chat else 1} | given | {"max_steps": most})
    sampling = SamplingConfig(steps=settings.steps, batch_size=settings.batch_size)
    if adapter is None:
        refuse_given(ctx, "without --adapter", "anyway")
    check_adapters(model, [adapter] if adapter else [], anyway=anyway)
    load_rules = _rules(
        RulesOptions(
            model=model,
            policy=guard,
            detector=detector,
            trained=record(ctx, GuardParts),
            chat=chat,
            keys=keys,
            threads=guard_threads,
            configs=configs,
        )
    )
    memory = fit_sampling(model, memory, device, Path(), settings.batch_size, sampling)  # what is free beside the detector
    locked = bool(_keys(keys).names)
    if listening.host not in LOOPBACK and not listening.open and not locked:
        raise UserError(
            f"--host {listening.host} needs API keys: --keys FILE (`valign api-key NAME`), {API_KEYS}, or --open on purpose."
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("valign").setLevel(logging.INFO)
    known = _canaries(canaries, detector)
    about = {"adapters": {str(adapter): _adapter_hash(adapter)} if adapter is not None else {}}
    store = AuditStore(
        log.audit,
        create=True,
        anchor=log.anchor or default_anchor(log.audit),
        secret=os.environ.get(AUDIT_KEY, "").encode(),
        max_bytes=log.log_size * 2**20,
    )
    service = Service(
        lambda: _model(model, adapter, device, anyway, memory),
        load_rules,
        store,
        secret=_secret(),
        settings=settings,
        canaries=known,
        about=about,
    )
    app = create_app(service)
    if playground or settings.compare:
        from valign.serving.playground import mount

        app = mount(app, service, login=locked)
    serve(app, host=listening.host, port=listening.port, drain=listening.drain, access_log=listening.access_log)


@example("valign api-key studio --keys keys.txt")
def api_key(
    name: Annotated[str, Argument(help="name of the key's owner, for the audit log and the file")],
    keys: Annotated[Path, Option(help="file of key hashes, to which it is added")] = Path("keys.txt"),
) -> None:
    """Make an API key. It is printed once and written nowhere; the file holds its hash. A line taken out locks the key out."""
    from valign.serving.keys import new_key

    out.print(new_key(name, keys), markup=False, soft_wrap=True)
    err.print(Text(f"Its hash is in {keys}. A running server learns of it by SIGHUP.", style="dim"))


def _rules(options: RulesOptions) -> Any:
    """A function that reads policy and keys anew; what does not change is loaded once. Mistakes show before any model is loaded."""
    from valign.guard import Guard
    from valign.policy import load_policy

    if not options.detector:
        raise UserError(
            "--detector must name what checks the images, got none: oracle, nudenet, safety-checker=FOLDER, a detector's folder. "
            "`--detector none` hands out images that nothing checked."
        )
    if options.detector == "none":
        err.print(Text("Images are not checked: --detector none.", style="yellow"))
    _configs(options.configs, load_policy(options.policy), _keys(options.keys))
    judge = options.chat.load()
    watcher = None if options.detector == "none" else resolve_detector(options.detector, model=options.model)

    def load() -> Rules:
        from valign.serving.service import Rules

        rules = load_policy(options.policy)
        own = options.trained
        guard = Guard.from_policy(rules, chat=judge, detector=watcher, head=own.head, edits=own.edits, threads=options.threads)
        known = _keys(options.keys)
        return Rules(guard, known, configs=_configs(options.configs, rules, known))

    return load


def _configs(file: Path | None, policy: Any, keys: Any) -> Any:
    from valign.serving.key_configs import load_key_configs
    from valign.serving.keys import ANONYMOUS

    return load_key_configs(file, policy, set(keys.names.values()) or {ANONYMOUS})


def _keys(file: Path | None) -> Any:
    from valign.serving.keys import Keys

    return Keys.load(file, environment=os.environ.get(API_KEYS, ""))


def _model(name: str, adapter: Path | None, device: str, anyway: bool, memory: MemoryConfig) -> Any:
    model = resolve_model(name, device=device, memory=memory)
    if adapter is not None:
        from valign.models.diffusion.lora import load_adapter

        load_adapter(model, adapter, name="adapter", anyway=anyway)
    return model


def _adapter_hash(adapter: Path) -> str:
    from valign.models.files.adapter_files import open_adapter

    return open_adapter(adapter).fingerprint()


def _canaries(folder: Path | None, detector: str) -> Canaries:
    """The operator's known cases, and those of a world whose oracle looks at the images."""
    from valign.serving.canaries import Canaries, read_canaries
    from valign.worlds import WORLDS

    given = Canaries() if folder is None else read_canaries(folder)
    watching = [world for world in WORLDS.values() if world.name in detector.split("+")]
    if "oracle" in detector.split("+"):
        watching = [next(iter(WORLDS.values())), *watching]
    return Canaries(given.prompts, (*given.images, *(image for world in watching[:1] for image in world.canaries())))


def _secret() -> bytes:
    """Keys the prompts' hashes in the log."""
    given = os.environ.get(AUDIT_KEY, "")
    if not given:
        err.print(
            Text(f"{AUDIT_KEY} is not set: prompts are hashed with a key of this run, so no later run finds them.", style="dim")
        )
        return secrets.token_bytes(32)
    if len(given) < 16:
        raise UserError(f"{AUDIT_KEY} must have at least 16 characters, got {len(given)}. Generate a random one.")
    return given.encode()
