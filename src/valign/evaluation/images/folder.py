"""The images of one system on disk: one PNG per prompt, or an empty ``.blocked`` file; a killed run goes on where it stopped.

An empty ``.unreadable`` file stands for an image that another tool made and that cannot be read.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from valign.checks import UserError
from valign.evaluation.suite import Suite
from valign.evaluation.systems import System
from valign.files import atomic_path
from valign.images import open_image
from valign.progress import track
from valign.runs import Run

TIMES = "seconds.jsonl"
UNREADABLE = "unreadable"  # what a system hands out in the place of such an image


@dataclass(frozen=True)
class ImageFolder:
    """Images of one system, by prompt id."""

    folder: Path

    def has(self, prompt_id: str) -> bool:
        return self._png(prompt_id).exists() or self._blocked(prompt_id).exists() or self.unreadable(prompt_id)

    def unreadable(self, prompt_id: str) -> bool:
        """Whether there is an image that cannot be read."""
        return (self.folder / f"{prompt_id}.{UNREADABLE}").exists()

    def open(self, prompt_id: str) -> Image.Image | None:
        """The image as RGB, or None where the system refused or the image cannot be read."""
        if self._blocked(prompt_id).exists() or self.unreadable(prompt_id):
            return None
        try:
            return open_image(self._png(prompt_id))
        except UserError as error:
            raise UserError(f"{error} Delete it and run the evaluation again.") from error

    def save(self, prompt_id: str, image: Image.Image | str | None) -> None:
        """Keep an image, None for a refused prompt, or `UNREADABLE`."""
        if image is None:
            self._blocked(prompt_id).touch()
            return
        if isinstance(image, str):
            (self.folder / f"{prompt_id}.{UNREADABLE}").touch()
            return
        with atomic_path(self._png(prompt_id)) as temporary:
            image.save(temporary, format="PNG")

    def seconds_per_image(self) -> float | None:
        """Median over the batches that were timed; None before the first."""
        path = self.folder / TIMES
        times = [_time(line) for line in path.read_text().splitlines()] if path.exists() else []
        known = [time for time in times if time is not None]
        return median(known) if known else None

    def _png(self, prompt_id: str) -> Path:
        return self.folder / f"{prompt_id}.png"

    def _blocked(self, prompt_id: str) -> Path:
        return self.folder / f"{prompt_id}.blocked"


def make_images(
    system: System, suite: Suite, seeds: Sequence[int], folder: Path, *, settings: dict[str, object], batch_size: int
) -> ImageFolder:
    """Generate an image of every prompt that has none yet.

    Batches are cut the same way on every run and an unfinished one is generated again as a whole, so that a resumed run
    gives the same bytes as one that was never stopped.
    Raises: UserError if ``folder`` holds images of another system, suite or seed.
    """
    images = ImageFolder(folder)
    recipe = {"system": system.name, "fingerprint": system.fingerprint, "batch_size": batch_size, **settings}
    run = Run.open(folder, step="pictures", recipe=recipe, inputs={"suite": suite.fingerprint()})
    batches = list(_batches(suite, seeds, batch_size))
    missing = [batch for batch in batches if not all(images.has(prompt_id) for prompt_id, _, _ in batch)]
    if missing:
        with system.ready():
            for batch in track(missing, f"Generating with {system.name}", total=len(batches), done=len(batches) - len(missing)):
                _generate(system, images, batch)
    run.finish(pictures=len(suite))
    return images


def _batches(suite: Suite, seeds: Sequence[int], size: int) -> Iterator[list[tuple[str, str, int]]]:
    items = [(prompt.id, prompt.prompt, seed) for prompt, seed in zip(suite.prompts, seeds)]
    yield from (items[start : start + size] for start in range(0, len(items), size))


def _generate(system: System, folder: ImageFolder, batch: list[tuple[str, str, int]]) -> None:
    started = time.perf_counter()
    images = system.generate([prompt for _, prompt, _ in batch], [seed for _, _, seed in batch])
    seconds = time.perf_counter() - started
    if len(images) != len(batch):
        raise ValueError(f"System {system.name} must give one image (or None) per prompt, got {len(images)} for {len(batch)}.")
    for (prompt_id, _, _), image in zip(batch, images):
        folder.save(prompt_id, image)
    if system.elsewhere:
        return
    with (folder.folder / TIMES).open("a") as file:
        file.write(json.dumps({"pictures": len(batch), "seconds": seconds}) + "\n")


def _time(line: str) -> float | None:
    try:
        record = json.loads(line)
        return float(record["seconds"]) / int(record["pictures"])
    except (ValueError, KeyError, TypeError):
        return None  # a line that a kill cut in two
