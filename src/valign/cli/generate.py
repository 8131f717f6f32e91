"""``valign generate``: draw prompts with a model, behind a guard, with an adapter or with a value token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import err, example, out, resolve_detector, resolve_model
from valign.cli.guard import BLOCKED

if TYPE_CHECKING:
    from PIL.Image import Image

    from valign.guard import ValueToken
    from valign.interfaces import SamplingConfig


@example('valign generate "a flower on the left" --model shapes --guard shapes --detector oracle -o flower.png')
def command(
    prompt: Annotated[list[str], Argument(help="what to draw; several give several images")],
    target: Annotated[Path, Option("--out", "-o", help="the image, .png; a new folder for several")],
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes, a file, or none")] = "default",
    detector: Annotated[str, Option(help="who looks at the image: oracle, nudenet, safety-checker=FOLDER ...; joined by +")] = "",
    values: Annotated[Path | None, Option(help="value encoder: a run of `valign train livo`, or its safetensors file")] = None,
    principle: Annotated[str, Option(help="id, text or alias of one principle; 'auto' finds it by the policy's keywords")] = "auto",
    policy: Annotated[str, Option("--policy", "-p", help="whose keywords: default, shapes or a YAML file")] = "default",
    mixing: Annotated[float, Option(min=0, max=1, help="share of images that get a bias principle's token; about 0.5")] = 0.5,
    count: Annotated[int, Option(min=1, help="images per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    seed: Annotated[int, Option(help="of the first image of each prompt")] = 0,
    steps: Annotated[int, Option(min=1, help="denoising steps")] = 50,
    guidance_scale: Annotated[float, Option(min=0, help="classifier-free guidance scale")] = 7.5,
    batch_size: Annotated[int, Option(min=1, help="images at a time, where no guard looks at each")] = 8,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Draw prompts that the guard lets through, or their safe rewrites. Exit code 3 if one is blocked: it has no file.

    With --values, a prompt that calls for a principle gets its token; all others are drawn as the base model draws them.
    """
    several = len(prompt) * count > 1
    if target.is_dir() or (several and target.exists()):
        raise UserError(f"{target} exists. Choose another --out, or delete it first.")
    from valign.interfaces import SamplingConfig

    subject: Any = resolve_model(model, device=device)
    if adapter is not None:
        from valign.models.diffusion.lora import load_adapter

        load_adapter(subject, adapter, name="adapter")
    sampling = SamplingConfig(steps=steps, guidance_scale=guidance_scale, batch_size=batch_size)
    token = None if values is None else _value_token(subject, values, principle, policy, mixing)
    prompts = [text for text in prompt for _ in range(count)]
    seeds = [seed + number for _ in prompt for number in range(count)]
    pictures: Sequence[Image | None]
    if guard != "none":
        pictures = _guarded(subject, guard, detector, token, prompts, seeds, sampling)
    elif token is None:
        pictures = subject.generate(prompts, seeds=seeds, sampling=sampling)
    else:
        from valign.models.diffusion.value_pipeline import ValueGuidedPipeline

        pipeline = ValueGuidedPipeline(subject, token.encoder, token.retriever)
        pictures = list(pipeline.generate(prompts, seeds=seeds, sampling=sampling, mixing=mixing))
    _save(pictures, target, several)
    if None in pictures:
        raise typer.Exit(BLOCKED)


def _value_token(subject: Any, values: Path, principle: str, policy: str, mixing: float) -> ValueToken:
    """The value encoder with who tells it the principle."""
    from valign.guard import ValueToken
    from valign.guard.value_retriever import Always, KeywordRetriever
    from valign.interfaces import Retriever
    from valign.models.diffusion.value_encoder import load_value_encoder
    from valign.policy import load_policy

    encoder = load_value_encoder(values, subject)
    retriever: Retriever = KeywordRetriever(load_policy(policy)) if principle == "auto" else Always(encoder.principle(principle).id)
    return ValueToken(encoder, retriever, mixing)


def _guarded(
    subject: Any,
    policy: str,
    detector: str,
    token: ValueToken | None,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingConfig,
) -> list[Image | None]:
    """An image per prompt, None for what was blocked."""
    from valign.guard import Guard

    keeper = Guard.from_policy(policy, detector=resolve_detector(detector) if detector else None, token=token)
    if not detector:
        err.print(Text("Images are not checked: no --detector was given.", style="dim"))
    pictures: list[Image | None] = []
    for text, number in zip(prompts, seeds, strict=True):
        found = keeper.generate(subject, text, seed=number, sampling=sampling)
        pictures.append(found.image)
        if found.image is None:
            why = found.result.decision.stop if found.result.blocked else "the image failed its checks"
            err.print(Text(f"Blocked: {why}.", style="red"))
            continue
        if found.result.rewritten:
            err.print(Text(f"Drawn as: {found.result.prompt}", style="yellow"))
        if found.attempts[-1].principle:
            err.print(Text(f"Drawn under the principle {found.attempts[-1].principle}.", style="dim"))
    return pictures


def _save(pictures: Sequence[Image | None], target: Path, several: bool) -> None:
    from valign.files import atomic_folder, atomic_path

    if not several:
        if pictures[0] is None:
            return
        with atomic_path(target) as temporary:
            pictures[0].save(temporary, format="PNG")
    else:
        with atomic_folder(target) as folder:
            for number, picture in enumerate(pictures):
                if picture is not None:
                    picture.save(folder / f"{number:04d}.png")
    out.print(str(target), markup=False, soft_wrap=True)
