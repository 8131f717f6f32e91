"""``valign generate``: one picture, guarded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from typer import Argument, Option

from valign.cli.common import err, example, out, resolve_detector, resolve_model
from valign.cli.guard import BLOCKED


@example('valign generate "a flower on the left" --model shapes --guard shapes --detector oracle -o flower.png')
def command(
    prompt: Annotated[str, Argument(help="what to draw")],
    file: Annotated[Path, Option("--out", "-o", help="the picture, .png")],
    model: Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")] = "shapes",
    adapter: Annotated[Path | None, Option("--adapter", "-a", help="adapter folder")] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the guard: default, shapes, a file, or none")] = "default",
    detector: Annotated[str, Option(help="who looks at the picture: oracle, nudenet, safety-checker=FOLDER ...; joined by +")] = "",
    seed: Annotated[int, Option(help="of the first picture")] = 0,
    steps: Annotated[int, Option(min=1, help="denoising steps")] = 50,
    guidance_scale: Annotated[float, Option(help="classifier-free guidance scale")] = 7.5,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Draw a prompt that the guard lets through, or its safe rewrite. Exit code 3, and no file, if it is blocked."""
    loaded = resolve_model(model, device=device)
    if adapter is not None:
        from valign.models.lora import load_adapter

        load_adapter(loaded, adapter, name="adapter")
    if guard == "none":
        image = loaded.generate([prompt], seeds=[seed], steps=steps, guidance_scale=guidance_scale)[0]
    else:
        from valign.guard import Guard

        keeper = Guard.from_policy(guard, detector=resolve_detector(detector) if detector else None)
        found = keeper.generate(loaded, prompt, seed=seed, steps=steps, guidance_scale=guidance_scale)
        if found.image is None:
            why = found.result.decision.stop if found.result.blocked else "the picture failed its checks"
            err.print(Text(f"Blocked: {why}.", style="red"))
            raise typer.Exit(BLOCKED)
        if found.result.rewritten:
            err.print(Text(f"Drawn as: {found.result.prompt}", style="yellow"))
        if not found.checked:
            err.print(Text("The picture was not checked: no --detector was given.", style="dim"))
        image = found.image
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, format="PNG")
    out.print(str(file), markup=False, soft_wrap=True)
