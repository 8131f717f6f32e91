"""Image grids while training: the base model above, the adapter as it stands below, at equal prompts and seeds."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from valign.data.images.grid import tile
from valign.files import atomic_path
from valign.interfaces import Sampler, SamplingConfig
from valign.models.diffusion.lora import adapter_off

GAP = 4  # pixels between images


@dataclass
class Previews:
    """Writes ``samples/step-N.png``. The prompts themselves are never printed: training prompts can be hard to read."""

    model: Sampler
    folder: Path
    prompts: tuple[str, ...]
    steps: int  # denoising steps
    off: Callable[[Any], AbstractContextManager[Any]] = adapter_off  # inside, the model is the base model
    _base: list[Image] = field(default_factory=list)

    def remember_base(self) -> None:
        """Sample the model as it is now as the base, for adapters that cannot be switched off."""
        self._base = self._sample()

    def write(self, step: int) -> Path:
        """Sample and write the grid of training step ``step``."""
        if not self._base:
            with self.off(self.model):
                self._base = self._sample()
        path = self.folder / f"step-{step:06d}.png"
        with atomic_path(path) as temporary:
            tile([self._base, self._sample()], gap=GAP).save(temporary, format="png")
        return path

    def _sample(self) -> list[Image]:
        return self.model.generate(list(self.prompts), sampling=SamplingConfig(steps=self.steps))
