"""``valign generate``: images of prompts by a model, behind a guard, with an adapter or with a value token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError, option
from valign.cli.common import err, example, out, resolve_detector, resolve_model
from valign.cli.guard import BLOCKED
from valign.cli.options import configured, record

if TYPE_CHECKING:
    from PIL.Image import Image

    from valign.guard import Guard, ValueToken
    from valign.interfaces import Retriever, SamplingConfig
    from valign.models.heads.text_probe import TextProbe
    from valign.policy import Policy


@dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """A value encoder, and what tells it the principle of a prompt."""

    values: Path | None = option(None, help="value encoder: a run of `valign train livo`, or its safetensors file")
    value_retriever: Path | None = option(
        None, help="probe of `valign train retriever`: finds the principle, and is the stage `probe` of a guard that lists it"
    )
    principle: str = option("auto", help="id, text or alias of one principle; auto finds it by the probe, or else by keywords")
    policy: str = option("default", help="policy with the keywords: default, shapes or a YAML file", flags=("--policy", "-p"))
    mixing: float = option(0.5, help="share of images that get a bias principle's token; about 0.5", low=0, high=1)

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
    cls=configured(sampling="valign.interfaces:SamplingConfig", values=ValueOptions),
)
def command(
    ctx: typer.Context,
    prompt: Annotated[list[str], Argument(help="what to show; several give several images")],
    target: Annotated[Path, Option("--out", "-o", help="the image, .png; a new folder for several")],
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes, a file, or none")] = "default",
    detector: Annotated[
        str, Option(help="detector that checks the image: oracle, nudenet, safety-checker=FOLDER ...; joined by +")
    ] = "",
    count: Annotated[int, Option(min=1, help="images per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Generate images of prompts that the guard lets through, or of their rewrites. Exit code 3 if one is blocked: it has no file.

    With --values, a prompt that calls for a principle gets its token; all others are generated as by the base model.
    """
    from valign.interfaces import SamplingConfig

    sampling, values = record(ctx, SamplingConfig), record(ctx, ValueOptions)
    several = len(prompt) * count > 1
    if target.is_dir() or (several and target.exists()):
        raise UserError(f"{target} exists. Choose another --out, or delete it first.")
    subject: Any = resolve_model(model, device=device)
    if adapter is not None:
        from valign.models.diffusion.lora import load_adapter

        load_adapter(subject, adapter, name="adapter")
    probe = values.probe(subject)
    token = values.load(subject, probe) if values.values else None
    prompts = [text for text in prompt for _ in range(count)]
    seeds = [sampling.seed + number for _ in prompt for number in range(count)]
    for text, read in zip(prompt, subject.text_read(prompt), strict=True):
        if read != text:
            err.print(f"The text encoder reads of a prompt only: {read}", style="yellow", soft_wrap=True)
    images: Sequence[Image | None]
    if guard != "none":
        images = _guarded(subject, _keeper(guard, detector, token, probe), prompts, seeds, sampling)
    elif token is None:
        images = subject.generate(prompts, seeds=seeds, sampling=sampling)
    else:
        from valign.models.diffusion.value_pipeline import ValueGuidedPipeline

        pipeline = ValueGuidedPipeline(subject, token.encoder, token.retriever)
        images = list(pipeline.generate(prompts, seeds=seeds, sampling=sampling, mixing=token.mixing))
    _save(images, target, several)
    if None in images:
        raise typer.Exit(BLOCKED)


def _keeper(policy: str, detector: str, token: ValueToken | None, probe: TextProbe | None) -> Guard:
    from valign.guard import Guard

    if not detector:
        err.print(Text("Images are not checked: no --detector was given.", style="dim"))
    return Guard.from_policy(policy, detector=resolve_detector(detector) if detector else None, token=token, probe=probe)


def _guarded(subject: Any, keeper: Guard, prompts: list[str], seeds: list[int], sampling: SamplingConfig) -> list[Image | None]:
    """An image per prompt, None for what was blocked."""
    images: list[Image | None] = []
    for text, number in zip(prompts, seeds, strict=True):
        found = keeper.generate(subject, text, seed=number, sampling=sampling)
        images.append(found.image)
        if found.image is None:
            why = found.result.decision.stop if found.result.blocked else "the image failed its checks"
            err.print(Text(f"Blocked: {why}.", style="red"))
            continue
        if found.result.rewritten:
            err.print(Text(f"Generated as: {found.result.prompt}", style="yellow"))
        if found.attempts[-1].principle:
            err.print(Text(f"Generated under the principle {found.attempts[-1].principle}.", style="dim"))
    return images


def _save(images: Sequence[Image | None], target: Path, several: bool) -> None:
    from valign.files import atomic_folder, atomic_path

    if not several:
        if images[0] is None:
            return
        with atomic_path(target) as temporary:
            images[0].save(temporary, format="PNG")
    else:
        with atomic_folder(target) as folder:
            for number, image in enumerate(images):
                if image is not None:
                    image.save(folder / f"{number:04d}.png")
    out.print(str(target), soft_wrap=True)
