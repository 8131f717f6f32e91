"""Training from a cache needs no encoders: on an accelerator they wait in main memory, and the U-Net has the room."""

from collections.abc import Iterator
from contextlib import contextmanager

from valign.models.diffusion.base import DiffusionModel


@contextmanager
def encoders_offloaded(model: DiffusionModel) -> Iterator[None]:
    """Keep the autoencoder and the text encoders in main memory inside the block; on a CPU nothing happens."""
    device = model.device
    if device.type != "cpu":
        for part in model.encoders:
            part.to("cpu")
    try:
        yield
    finally:
        for part in model.encoders:
            part.to(device)
