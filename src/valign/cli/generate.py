"""``valign generate``: draw prompts with a model, with or without a value token."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import example, out, resolve_model


@example("valign generate 'a captain on a beach' --model shapes --values runs/livo --principle equal-heads -o runs/new")
def command(
    prompt: Annotated[list[str], Argument(help="what to draw; several give several pictures")],
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")],
    folder: Annotated[Path, Option("--out", "-o", help="new folder for the pictures")],
    values: Annotated[Path | None, Option(help="value encoder: a run of `valign train livo`, or its safetensors file")] = None,
    principle: Annotated[str, Option(help="id, text or alias of one principle; 'auto' finds it by the policy's keywords")] = "auto",
    policy: Annotated[str, Option("--policy", "-p", help="whose keywords: default, shapes or a YAML file")] = "default",
    mixing: Annotated[float, Option(min=0, max=1, help="share of pictures that get the token: about 0.5 for bias, else 1")] = 1.0,
    count: Annotated[int, Option(min=1, help="pictures per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    seed: Annotated[int, Option(help="of the first picture of each prompt")] = 0,
    steps: Annotated[int, Option(min=1, help="denoising steps")] = 50,
    guidance_scale: Annotated[float, Option(min=0, help="classifier-free guidance scale")] = 7.5,
    batch_size: Annotated[int, Option(min=1, help="pictures at a time")] = 8,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Draw pictures; with --values, a prompt that calls for a principle gets its token, all others are the base model's."""
    from valign.files import atomic_folder

    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --out, or delete it first.")
    subject: Any = resolve_model(model, device=device)
    prompts = [text for text in prompt for _ in range(count)]
    options: dict[str, Any] = {
        "seeds": [seed + number for _ in prompt for number in range(count)],
        "steps": steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
    }
    if values is None:
        pictures = subject.generate(prompts, **options)
    else:
        from valign.models.value_encoder import load_value_encoder
        from valign.models.value_pipeline import ValueGuidedPipeline
        from valign.models.value_retriever import KeywordRetriever
        from valign.policy import load_policy

        encoder = load_value_encoder(values, subject)
        retriever = KeywordRetriever(load_policy(policy)) if principle == "auto" else None
        chosen = None if principle == "auto" else principle
        pictures = ValueGuidedPipeline(subject, encoder, retriever).generate(prompts, principles=chosen, mixing=mixing, **options)
    with atomic_folder(folder) as temporary:
        for number, picture in enumerate(pictures):
            picture.save(temporary / f"{number:04d}.png")
    out.print(str(folder), markup=False, soft_wrap=True)
