"""``valign generate``: images of prompts by a model, behind a guard, with an adapter or with a value token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from valign.checks import SEEDS, UserError, check_range, option
from valign.cli.common import Anyway, check_adapters, err, example, out, resolve_detector, resolve_model
from valign.cli.early import refuse_other_base
from valign.cli.guard_prompts import BLOCKED
from valign.cli.image_output import check_target, format_of, write_all
from valign.cli.options import configured, record, refuse_given
from valign.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image

    from valign.guard import Guard, GuardedImage, ValueToken
    from valign.interfaces import Detector, Retriever, SamplingConfig
    from valign.models.heads.text_probe import TextProbe
    from valign.policy import Policy


@dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """A value encoder, and what tells it the principle of a prompt."""

    values: Path | None = option(None, help="value encoder: a run of `valign train livo`, or its safetensors file")
    value_retriever: Path | None = option(
        None, help="probe of `valign train retriever`: finds the principle, and is the stage `probe` of a guard that lists it"
    )
    principle: str = option(
        "auto", help="id, text or alias of one principle; auto finds it by the probe, or else by keywords", needs={"values": ()}
    )
    policy: str = option(
        "default", help="policy with the keywords: default, shapes or a YAML file", flags=("--policy", "-p"), needs={"values": ()}
    )
    mixing: float = option(
        0.5, help="share of images that get a bias principle's token; about 0.5", low=0, high=1, needs={"values": ()}
    )

    def load(self, model: Any, probe: TextProbe | None) -> ValueToken:
        """The encoder on ``model``. Raises: UserError if none of its principles has this name."""
        from valign.guard import ValueToken
        from valign.guard.value_retriever import Always
        from valign.models.diffusion.value_encoder import load_value_encoder
        from valign.policy import load_policy

        encoder = load_value_encoder(self.values, model)  # type: ignore[arg-type]
        if self.principle != "auto":
            return ValueToken(encoder, Always(encoder.principle(self.principle).id), self.mixing)
        return ValueToken(encoder, principle_finder(load_policy(self.policy), probe), self.mixing)

    def probe(self, model: Any) -> TextProbe | None:
        """The probe on ``model``'s text encoders, if one was given. Raises: UserError if it is another model's."""
        from valign.models.heads.text_probe import load_probe

        return None if self.value_retriever is None else load_probe(self.value_retriever, model)


def principle_finder(policy: Policy, probe: TextProbe | None) -> Retriever:
    """The policy's keywords, or the probe where there is one."""
    from valign.guard import probe_retriever
    from valign.guard.value_retriever import KeywordRetriever

    return KeywordRetriever(policy) if probe is None else probe_retriever(policy, probe)


@example(
    'valign generate "a flower on the left" --model shapes --guard shapes --detector oracle -o flower.png',
    cls=configured(
        pipeline=True,
        early=lambda params, _: _refuse_early(params),
        sampling="valign.interfaces:SamplingConfig",
        values=ValueOptions,
    ),
)
def command(
    ctx: typer.Context,
    prompt: Annotated[list[str], Argument(help="what to show; several give several images")],
    target: Annotated[
        Path, Option("--out", "-o", help="the image: .png, .jpg or .webp; a new folder for several", callback=check_target)
    ],
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes, a file, or none")] = "default",
    detector: Annotated[
        str, Option(help="detector that checks the image: oracle, nudenet, safety-checker=FOLDER ...; joined by +")
    ] = "",
    count: Annotated[int, Option(min=1, help="images per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    seeds: Annotated[str, Option(help="seeds of every prompt's images, by commas: 3,7,11")] = "",
    form: Annotated[str, Option("--format", help="png, jpg or webp, for a folder; png")] = "",
    grid: Annotated[bool, Option("--grid", help="all images in one as well: a row per prompt, a column per seed")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
) -> None:
    """Generate images of prompts that the guard lets through, or of their rewrites. Exit code 3 if one is blocked: it has no file.

    Each file holds its prompt, seed, model, adapter and the guard's decision; so does a line of manifest.jsonl beside it.
    With --values, a prompt that calls for a principle gets its token; all others are generated as by the base model.
    """
    from valign.interfaces import SamplingConfig

    sampling, values = record(ctx, SamplingConfig), record(ctx, ValueOptions)
    each = _seeds(seeds, sampling.seed, count)
    several = len(prompt) * len(each) > 1
    suffix = format_of(target, several=several, wanted=form)
    if grid and not several:
        raise UserError("--grid needs several images, got one. Give several prompts, --count or --seeds.")
    if detector and guard == "none":
        raise UserError("--detector has no effect with --guard none: the guard looks at images with it. Leave one of them out.")
    watcher = resolve_detector(detector, model=model) if detector else None
    if adapter is None:
        refuse_given(ctx, "without --adapter", "anyway")
    check_adapters(model, [adapter] if adapter else [], anyway=anyway)
    subject: Any = resolve_model(model, device=device)
    if adapter is not None:
        from valign.models.diffusion.lora import load_adapter

        load_adapter(subject, adapter, name="adapter", anyway=anyway)
    probe = values.probe(subject)
    token = values.load(subject, probe) if values.values else None
    prompts = [text for text in prompt for _ in each]
    numbers = [number for _ in prompt for number in each]
    for text, read in zip(prompt, subject.text_read(prompt), strict=True):
        if read != text:
            err.print(f"The text encoder reads of a prompt only: {read}", style="yellow", soft_wrap=True)
    images: Sequence[Image | None]
    decisions: Sequence[dict[str, Any] | None] = [None] * len(prompts)
    if guard != "none":
        found = _guarded(subject, _keeper(guard, watcher, token, probe), prompts, numbers, sampling)
        images, decisions = [one.image for one in found], [_decision(one) for one in found]
    elif token is None:
        size = sampling.batch_size
        images = [
            image
            for start in track(range(0, len(prompts), size), "Generating")
            for image in subject.generate(prompts[start : start + size], seeds=numbers[start : start + size], sampling=sampling)
        ]
    else:
        from valign.models.diffusion.value_pipeline import ValueGuidedPipeline

        pipeline = ValueGuidedPipeline(subject, token.encoder, token.retriever)
        images = list(pipeline.generate(prompts, seeds=numbers, sampling=sampling, mixing=token.mixing))
    made = {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale, "model": model, "adapter": _text(adapter)}
    made |= {"model_sha256": subject.fingerprint(), "values": _text(values.values), "valign": version("valign")}
    records = [
        {"prompt": _kept(text, decision), "seed": number, **made, "guard": decision}
        for text, number, decision in zip(prompts, numbers, decisions, strict=True)
    ]
    write_all(images, records, target, suffix, several=several, columns=len(each) if grid and any(images) else 0)
    if any(images):
        out.print(str(target), soft_wrap=True)
    if None in images:
        raise typer.Exit(BLOCKED)


def _keeper(policy: str, detector: Detector | None, token: ValueToken | None, probe: TextProbe | None) -> Guard:
    from valign.guard import Guard

    if detector is None:
        err.print(Text("Images are not checked: no --detector was given.", style="dim"))
    return Guard.from_policy(policy, detector=detector, token=token, probe=probe)


def _refuse_early(params: Mapping[str, Any]) -> None:
    """Refuse seeds and formats that are none, and an adapter of another model, by the command's own parameters."""
    each = _seeds(params["seeds"], 0, params["count"])
    format_of(params["target"], several=len(params["prompt"]) * len(each) > 1, wanted=params["form"])
    refuse_other_base(params["model"], filter(None, [params["adapter"]]), anyway=params["anyway"])


def _seeds(given: str, first: int, count: int) -> list[int]:
    """The seeds of a prompt's images. Raises: UserError if they are not whole numbers, or ``--count`` is given too."""
    if not given:
        return list(range(first, first + count))
    try:
        numbers = [int(text) for text in given.split(",")]
    except ValueError:
        raise UserError(f"--seeds must be whole numbers with commas between, got {given!r}. For example --seeds 3,7,11") from None
    if count > 1:
        raise UserError("--seeds and --count were both given. Leave one of them out.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds must be distinct, got {given!r}. One seed gives one image of a prompt.")
    for number in numbers:
        check_range("--seeds", number, low=SEEDS[0], high=SEEDS[1])
    return numbers


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _decision(found: GuardedImage) -> dict[str, Any]:
    """What the guard said of prompt and image, in short."""
    decision, last = found.result.decision, found.attempts[-1] if found.attempts else None
    return {
        "action": found.result.action,
        "stage": decision.stop or None,
        "intent": decision.intent,
        "categories": list(decision.categories),
        "result": found.result.prompt,
        "style": last.style if last else None,
        "drawn_with_seed": last.seed if last else None,
        "checked": found.checked,
        "policy_sha256": decision.policy,
        "prompt_sha256": decision.prompt_sha256,
        "kept": bool(decision.prompt),
    }


def _kept(prompt: str, decision: dict[str, Any] | None) -> str | None:
    """The prompt for the record; None where a block rule says that nothing of it is kept."""
    return prompt if decision is None or decision.pop("kept") else None


def _guarded(subject: Any, keeper: Guard, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> list[GuardedImage]:
    """A result per prompt, without an image for what was blocked."""
    images: list[GuardedImage] = []
    for text, number in track(list(zip(prompts, seeds, strict=True)), "Generating"):
        found = keeper.generate(subject, text, seed=number, sampling=sampling)
        images.append(found)
        if found.image is None:
            why = found.result.decision.stop if found.result.blocked else "the image failed its checks"
            err.print(Text(f"Blocked: {why}.", style="red"))
            continue
        if found.result.rewritten:
            err.print(Text(f"Generated as: {found.result.prompt}", style="yellow"))
        if found.attempts[-1].principle:
            err.print(Text(f"Generated under the principle {found.attempts[-1].principle}.", style="dim"))
    return images
